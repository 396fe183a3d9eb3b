# SPDX-License-Identifier: Apache-2.0
"""(tensor, context, pipeline, data) parallel meshes against one process in fp32: loss and every gradient.

Over gloo on CPU, four and eight processes; over NCCL with the Triton kernels on two or four GPUs (`-m gpu`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

LAUNCHED = "cases_mesh"

TOLERANCE = 1e-5
# bf16 rounds every activation and weight gradient to 8 bits: a sum over ranks in another order moves the last ones.
GPU_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
DENSE = (
    "mesh_tp2",
    "mesh_tp2_sp",
    "mesh_tp4",
    "mesh_dp",
    "mesh_cp2",
    "mesh_cp4",
    "mesh_cp2_a2a",
    "mesh_tp2_cp2",
    "mesh_tp2_cp2_sp",
    "mesh_cp2_recompute",
    "mesh_cp2_selective_recompute_own_norm_of_the_scorer",
    "mesh_cp2_packed",
    "mesh_cp2_a2a_packed",
)


def check(answer: dict[str, Any], parameters: int, tolerance: float) -> None:
    gradients = answer["gradients"]
    assert len(gradients) == parameters
    assert sum("scorer" in name for name in gradients) >= 4
    assert answer["different_selections"] == 0
    assert answer["loss"] <= tolerance
    worst = max(gradients, key=lambda name: gradients[name])
    assert gradients[worst] <= tolerance, f"{worst}: {gradients[worst]}"


def parameters_of(name: str) -> int:
    return 33 if "ep2" in name else 21 if "own_norm" in name else 19


@pytest.mark.parametrize("name", [*DENSE, "mesh_ep2"])
def test_loss_and_every_gradient_equal_those_of_one_process(launched, name: str) -> None:
    check(launched[name], parameters_of(name), TOLERANCE)


def test_eight_ranks_of_tensor_context_and_data_parallelism(launched_on_eight) -> None:
    check(launched_on_eight["mesh_tp2_cp2_dp2_sp"], 19, TOLERANCE)


def test_the_comparison_sees_a_gradient_that_does_not_come_back(launched) -> None:
    """Control: the same mesh with the gradients of carried rows dropped."""
    errors = launched["control_without_gradients_of_carried_rows"]["gradients"]
    assert max(error for name, error in errors.items() if "linear_qkv" in name) > 1e-2
    assert max(error for name, error in errors.items() if "scorer" in name) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_TOLERANCE))
def test_gpus(launch_on_gpus, dtype: str) -> None:
    """Selections may swap where a product's shape changed with the mesh: then gradients are not comparable."""
    ranks = min(torch.cuda.device_count(), 4)
    if ranks < 2:
        pytest.skip("needs two GPUs")
    answers = launch_on_gpus(ranks, "cases_mesh", "^mesh_", MESH_DTYPE=dtype)
    compared = 0
    for name in (*DENSE, "mesh_ep2"):
        answer = answers[name]
        if answer is not None and answer["different_selections"] == 0:
            check(answer, parameters_of(name), GPU_TOLERANCE[dtype])
            compared += 1
    assert compared >= 4
