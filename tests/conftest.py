# SPDX-License-Identifier: Apache-2.0
"""Shared test setup: where CUDA is missing, Triton kernels run in Triton's interpreter and `gpu` tests are skipped.

launch/test.sh runs two pytest-xdist workers; the groups of tests that each takes at a time are made here.
"""

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

# A worker that is free takes the next group: the short ones are left for the end, where they keep both busy.
LONGEST_FIRST = (
    "distributed",
    "test_attention.py",
    "test_parallel_training.py",
    "test_resume.py",
    "test_attention_chunk.py",
    "test_short_campaign.py",
    "test_inspect.py",
    "test_study.py",
)


def _group(item: pytest.Item) -> str:
    """Name of the tests that one worker must run, because they share a launch of processes or a trained model."""
    launched = {"launched", "launched_on_eight"} & set(getattr(item, "fixturenames", ()))
    return "distributed" if launched else item.path.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        order = {name: place for place, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: order.get(_group(item), len(order)))
    if torch.cuda.is_available():
        return
    marker = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(marker)
