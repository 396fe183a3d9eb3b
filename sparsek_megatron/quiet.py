# SPDX-License-Identifier: Apache-2.0
"""Warnings of dependencies that a user of the programs can do nothing about. Import nothing heavy here."""

import warnings

_KNOWN = (
    r".*Apex (is|are) not installed",  # optional everywhere; the run's first line says which optimizer it uses
    r"full scope is deprecated",  # megatron-core's own default
    r"`torch\.distributed\.\w+` is deprecated",  # names that megatron-core calls
)


def quiet_dependencies() -> None:
    """Ignore those warnings in this process; call it before megatron-core is imported."""
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
