# SPDX-License-Identifier: Apache-2.0
"""(tensor, context, pipeline, data) parallel meshes against one process in fp32: loss and every gradient.

Over gloo on CPU, four and eight processes; over NCCL with the Triton kernels on two or four GPUs (`-m gpu`).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

LAUNCHED = "cases_mesh"

TOLERANCE = 1e-5
# bf16 rounds every activation and weight gradient to 8 bits: a sum over ranks in another order moves the last ones.
# A logit moves by up to 2^-9, in either direction: the mean of thousands of tokens hides most of it, 2.6e-5 of a loss
# were left on four GPUs. Positions that are wrong under CP change it by 9e-3, and a third of the selections (on CPU).
GPU_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
GPU_LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
# bf16 under TP: matrix products change their shape, scores their last bit, and nearly equal keys change places: 97 to
# 110 of 24,576 on four GPUs, where gradients but the scorers' were off by up to 0.035.
BF16_TP_SELECTIONS = 0.02
BF16_TP_GRADIENT = 0.2
NEED_FOUR = ("mesh_tp4", "mesh_cp4", "mesh_tp2_cp2", "mesh_tp2_cp2_sp")
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
    "mesh_cp2_packed_padded",
    "mesh_cp2_a2a_packed",
)


def check(
    answer: dict[str, Any], parameters: int, tolerance: float, loss_tolerance: float = TOLERANCE
) -> None:
    gradients = answer["gradients"]
    assert len(gradients) == parameters
    assert sum("scorer" in name for name in gradients) >= 4
    assert answer["different_selections"] == 0
    assert answer["loss"] <= loss_tolerance
    wrong = {name: error for name, error in gradients.items() if not error <= tolerance}  # NaN too
    assert not wrong, wrong


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
    assert min(error for name, error in errors.items() if "scorer" in name) > 1e-2  # weights and slopes


def check_gpus(answers: Any, ranks: int, dtype: str) -> None:
    """Every case that fits on `ranks` GPUs, 2 or 4; names all that are wrong."""
    wrong = []
    for name in (*DENSE, "mesh_ep2"):
        answer = answers[name]
        assert (answer is None) == (ranks < 4 and name in NEED_FOUR), name
        if answer is None:
            continue
        try:
            if dtype == "bfloat16" and "tp" in name:
                check_other_selections(answer, parameters_of(name))
            else:
                check(answer, parameters_of(name), GPU_TOLERANCE[dtype], GPU_LOSS_TOLERANCE[dtype])
        except AssertionError as err:
            loss, selections = answer["loss"], answer["different_selections"]
            wrong.append(f"{name}: {err} (loss {loss:.1e}, {selections} other selections)")
    assert not wrong, "\n".join(wrong)


def check_other_selections(answer: dict[str, Any], parameters: int) -> None:
    """bf16 under TP: nearly equal keys may change places, and the scorers' gradients are then another function's."""
    gradients = answer["gradients"]
    assert len(gradients) == parameters
    assert answer["different_selections"] <= BF16_TP_SELECTIONS * answer["selections"]
    assert answer["loss"] <= GPU_LOSS_TOLERANCE["bfloat16"]
    wrong = {
        name: error
        for name, error in gradients.items()
        if not (error <= BF16_TP_GRADIENT or ("scorer" in name and math.isfinite(error)))
    }
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", list(GPU_TOLERANCE))
def test_every_case_on_gpus_is_checked(launched, dtype: str) -> None:
    """The check of the next test, on gloo's answers: as they are, and with each of them as wrong positions make it."""
    names = (*DENSE, "mesh_ep2")
    answers = {name: launched[name] for name in names}
    check_gpus(answers, 4, dtype)
    for name in names:
        right = answers[name]
        for wrong in (
            None,
            {**right, "different_selections": right["selections"] // 30},
            {**right, "loss": 9e-3},
            {**right, "gradients": {**right["gradients"], "embedding.word_embeddings.weight": 0.5}},
            {**right, "gradients": {**right["gradients"], "decoder.layers.1.self_attention.scorer.slope": math.nan}},
        ):
            with pytest.raises(AssertionError):
                check_gpus({**answers, name: wrong}, 4, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_TOLERANCE))
def test_gpus(launch_on_gpus, dtype: str) -> None:
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    check_gpus(launch_on_gpus(ranks, LAUNCHED, "^mesh_", MESH_DTYPE=dtype), ranks, dtype)
