# SPDX-License-Identifier: Apache-2.0
"""Bytes that this rank receives from others, by collective, counted from the tensors that are sent."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

_counters: list[dict[str, int]] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[dict[str, int]]:
    """A dictionary that fills with received bytes by collective for as long as the context is open."""
    counter: dict[str, int] = defaultdict(int)
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def received(collective: str, size: int) -> None:
    """Note `size` bytes received in one collective."""
    for counter in _counters:
        counter[collective] += size
