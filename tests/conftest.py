# SPDX-License-Identifier: Apache-2.0
"""Shared test setup: tests marked `gpu` are collected everywhere and run only where CUDA is available."""

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    marker = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(marker)
