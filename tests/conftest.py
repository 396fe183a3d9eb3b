# SPDX-License-Identifier: Apache-2.0
"""Shared test setup: where CUDA is missing, Triton kernels run in Triton's interpreter and `gpu` tests are skipped."""

import os

import hypothesis
import pytest
import torch

# A change must not fail for a case that an earlier one would have failed for too: CI draws the same examples each time.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

if not torch.cuda.is_available():  # read when a kernel is defined: set before any import of ours
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    marker = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(marker)
