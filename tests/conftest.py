# SPDX-License-Identifier: Apache-2.0
"""Shared test setup: where CUDA is missing, Triton kernels run in Triton's interpreter and `gpu` tests are skipped.

launch/test.sh runs two pytest-xdist workers with --dist loadscope; the groups of tests that each takes at a time are
made here.
"""

import os
from typing import Any

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
    "tests/distributed",
    "tests/kernels/test_attention.py",
    "tests/training/test_parallel_training.py",
    "tests/training/test_resume.py",
    "tests/kernels/test_attention_chunk.py",
    "tests/faults/test_short_campaign.py",
    "tests/plugin/test_inspect.py",
    "tests/plugin/test_study.py",
)


def group(nodeid: str) -> str:
    """The tests that one worker runs one after another: those of a file, or those that share a launch of processes."""
    file = nodeid.partition("::")[0]
    return "tests/distributed" if file.startswith("tests/distributed/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(group(item.nodeid), len(order)))
    if torch.cuda.is_available():
        return
    marker = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(marker)
