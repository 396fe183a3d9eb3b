# SPDX-License-Identifier: Apache-2.0
"""Micro-batches add up in fp32 under every ZeRO stage with bf16 weights, against float64; a NaN leaves nothing behind.

The optimizer's first moment tells what gradient it was given. In bf16 the sums were off by 3e-2. On GPUs, where
DeepSpeed reduces on a stream of its own, also `wait_by_stream`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import finish, read_results, start_program
from test_parallel_training import COMPILED, OFFLOAD

WORKER = str(Path(__file__).with_name("accumulation_worker.py"))
FP32 = 2e-6  # a few roundings of sums of 32 numbers
NORM = 1e-4  # one micro-batch is reduced in bf16; memory that was taken too early is off by anything
CASES: dict[str, dict[str, Any]] = {
    **{f"zero{n}": {"zero_stage": n} for n in (1, 2, 3)},
    **{f"zero{n}_clipped": {"zero_stage": n, "clip_grad": 0.2} for n in (1, 2, 3)},
    # What a user's file may switch off: other ways through DeepSpeed's reduction.
    **{f"zero{n}_all_reduce": {"zero_stage": n, "settings": {"reduce_scatter": False}} for n in (1, 2, 3)},
    **{f"zero{n}_scattered": {"zero_stage": n, "settings": {"contiguous_gradients": False}} for n in (1, 2, 3)},
}
OFFLOADED = {f"zero{n}_offload": {"zero_stage": n, "offload": True} for n in (1, 2, 3)}
# The optimizer of a GPU, which leaves a step with a NaN undone without the host's knowledge.
FUSED = {f"zero{n}_fused": {"zero_stage": n, "fused": True, "clip_grad": 0.2} for n in (1, 2)}
FIRST = {f"first_step_of_zero{n}": {"by": "first_step", "zero_stage": n} for n in (0, 1)}
GPU_CASES = {f"zero{n}": {"zero_stage": n} for n in (1, 2, 3)}
WAITING = {
    f"zero{stage}_{count}": {"by": "end_of_backward", "zero_stage": stage, "micro_batches": count}
    for stage in (1, 2) for count in (1, 3)
}  # fmt: skip
GPUS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]


def named(cases: dict[str, dict[str, Any]], ranks: int, **more: Any) -> list[Any]:
    return [ranks, {f"{name}_on_{ranks}": {**more, **case} for name, case in cases.items()}]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    cases = CASES | FUSED | (OFFLOADED if OFFLOAD else {})
    launches = [named(cases, ranks, micro_batches=32) for ranks in (1, 2)] + [named(FIRST, 1)]
    return read_results(finish(start_program(WORKER, json.dumps(launches))))


def check(result: dict[str, Any], *, on_device: bool = False) -> None:
    assert result["on_device"] == on_device
    assert result["optimizer"] in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
    assert max(result["gradient"]) < FP32 and max(result["norm"]) < FP32
    assert result["nan_norm"] == float("inf") and result["nan_changes_nothing"]
    assert result["skipped"] == 1 and result["steps"] == [2.0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", [*CASES, *FUSED, *(pytest.param(name, marks=COMPILED) for name in OFFLOADED)])
def test_micro_batches_add_up_in_fp32(results, case, ranks):
    check(results[f"{case}_on_{ranks}"], on_device=case in FUSED)


@pytest.mark.parametrize("case", list(FIRST))
def test_no_step_is_taken_before_the_first(results, case):
    """DeepSpeed's optimizer for bf16 without ZeRO took one on zeros as it was made."""
    assert results[f"{case}_on_1"] == {"before": [], "kept": True, "after": [1.0]}


@pytest.fixture(scope="module")
def gpu_results() -> dict[int, dict[str, Any]]:
    found = {}
    for ranks in (1, 2)[: torch.cuda.device_count()]:
        cases = named(GPU_CASES, ranks, micro_batches=32)[1] | named(WAITING | ({} if ranks > 1 else FIRST), ranks)[1]
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        process = start_program("-m", *launcher, WORKER, json.dumps([[ranks, cases]]), gpu=True)
        found[ranks] = read_results(finish(process))
    return found


@pytest.mark.gpu
def test_no_step_is_taken_before_the_first_on_a_gpu(gpu_results):
    assert gpu_results[1]["first_step_of_zero0_on_1"] == {"before": [], "kept": True, "after": [1.0]}


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", GPUS)
@pytest.mark.parametrize("case", GPU_CASES)
def test_micro_batches_add_up_in_fp32_on_the_reduction_stream(gpu_results, case, ranks):
    check(gpu_results[ranks][f"{case}_on_{ranks}"], on_device=case != "zero3")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", GPUS)
@pytest.mark.parametrize("case", WAITING)
def test_backward_ends_without_a_wait_of_the_host_and_with_the_same_bits(gpu_results, case, ranks):
    result = gpu_results[ranks][f"{case}_on_{ranks}"]
    ours, theirs = result["by_stream"], result["by_host"]
    assert max(ours["off"]) < NORM
    assert ours["norms"] == theirs["norms"] and len(set(ours["norms"])) == 6
    assert ours["weights"] == theirs["weights"]
    assert ours["waits"] == 0 and theirs["waits"] > 0
