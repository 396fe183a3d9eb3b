# SPDX-License-Identifier: Apache-2.0
"""Megatron's own DDP, distributed optimizer and pipeline schedules with SparseK layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

LAUNCHED = "cases_training"


def check(answer: dict[str, Any], *, gradients: bool, tolerance: float = 1e-5) -> None:
    assert max(answer["losses"]) <= 1e-5
    assert max(answer["norms"]) <= 1e-4, "the global gradient norm counts every parameter once"
    if gradients:
        assert sum("scorer" in name for name in answer["gradients"]) >= 4
        worst = max(answer["gradients"].items(), key=lambda item: item[1])
        assert worst[1] <= tolerance, worst


def test_twenty_steps_on_pp2_tp2_with_sequence_parallelism_follow_one_process_and_learn(launched) -> None:
    answer = launched["training_tp2_pp2_sp"]
    check(answer, gradients=True)
    losses = answer["course"]
    assert len(losses) == 20
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.1


def test_context_parallelism_in_a_pipeline_follows_one_process(launched) -> None:
    check(launched["training_cp2_pp2"], gradients=True)


@pytest.mark.gpu
def test_pipelines_over_nccl(launch_on_gpus) -> None:
    """With the Triton kernels: the first two on four GPUs, a pipeline alone on two."""
    gpus = torch.cuda.device_count()
    names = ("training_tp2_pp2_sp", "training_cp2_pp2") if gpus >= 4 else ("training_pp2",)
    answers = launch_on_gpus(4 if gpus >= 4 else 2, LAUNCHED, f"^({'|'.join(names)})$")
    for name in names:
        check(answers[name], gradients=True)


def test_finalize_model_grads_adds_nothing_to_complete_gradients_with_data_parallelism(launched) -> None:
    """With overlapped communication, and q/k norms included, which Megatron would sum again by their slot's name."""
    check(launched["training_tp2_dp2_sp_qk_norm"], gradients=False)


# A slope's gradient is one number, the sum of many that cancel: other sums of fp32 leave 7e-6 of it.
SPLIT_BATCH_TOLERANCE = 5e-5


@pytest.mark.parametrize("name", ["training_dp", "training_tp2_dp"])
def test_gradients_reduced_by_ddp_are_those_of_the_whole_batch(launched, name: str) -> None:
    """On (tensor, data) meshes of 1 x 4 and 2 x 2."""
    check(launched[name], gradients=True, tolerance=SPLIT_BATCH_TOLERANCE)


def test_gradients_reduced_by_ddp_over_two_ranks_are_those_of_the_whole_batch(launched_on_two) -> None:
    check(launched_on_two["training_dp"], gradients=True, tolerance=SPLIT_BATCH_TOLERANCE)


def test_a_covering_selection_in_a_pipeline_is_the_stock_dense_model(launched) -> None:
    answer = launched["covering_selection_on_pp2_tp2_sp"]
    assert max(answer["losses"]) <= 1e-5
    assert len(answer["gradients"]) == 15
    worst = max(answer["gradients"].items(), key=lambda item: item[1])
    assert worst[1] <= 1e-5, worst


@pytest.mark.parametrize("split", ["pp2", "pp2_vpp2", "pp2_vpp2_layer_spec"])
def test_dense_layers_keep_their_global_place_under_pipeline_splits(launched, split: str) -> None:
    answers = launched["dense_layers_under_virtual_pipelines"]
    expected = {"0": False, "1": True, "2": True, "3": False}
    assert answers["reference"] == expected
    assert answers[split]["kinds"] == expected
    check(answers[split], gradients=True)
