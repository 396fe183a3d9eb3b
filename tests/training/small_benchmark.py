# SPDX-License-Identifier: Apache-2.0
"""The training benchmark with a model that takes milliseconds a step, and made-up events of its profiles."""

import sys

import pytest
from programs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))

import benchmark_training

SMALL = (
    *("--shape", "tiny", "--topk", "8", "--window", "8", "--stride", "8"),
    *("--vocab-size", "512", "--warmup", "1", "--steps", "1"),
)


def started_with(*arguments):
    """The program with a small model, should it run; the dense arm and 64 tokens where no others are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["benchmark_training.py", *SMALL, "--tokens", "64", "--arms", "dense", *arguments]
        )
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the program sets it: not beyond this call
        benchmark_training.main()


def event(name, category, start, duration, thread=1, **arguments):
    """One of a profiler's trace; times in microseconds."""
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "pid": 1, "tid": thread,
            "args": arguments}  # fmt: skip
