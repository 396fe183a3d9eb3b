# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose collectives come in pieces give the losses and gradients of one rank."""

from __future__ import annotations

import pytest
import torch

LAUNCHED = "cases_async_tensor_parallel"

TOLERANCE = 2e-6  # of the largest gradient of a parameter; float32, summed in another order
TOLERANCE_ON_GPUS = 1e-5  # other kernels on the two sides besides

# In a step of two layers: each gathers for two columns, and for two rows in backward; scatters for two rows.
CALLS = {"async_tp2": (8, 4), "async_tp2_with_frozen_columns": (8, 4), "async_tp2_with_frozen_rows": (8, 4)}


def check(answer: dict[str, float], name: str, tolerance: float) -> None:
    gathered, scattered = answer.pop("_gather_and_multiply"), answer.pop("_multiply_and_scatter")
    assert (gathered, scattered) == CALLS.get(name, (gathered, scattered))
    assert gathered >= 8 and scattered >= 4
    assert sum("linear" in parameter and "weight" in parameter for parameter in answer) == 8
    assert sum("linear_qkv.bias" in parameter for parameter in answer) == 2 * ("bias" in name)
    worst = max(answer, key=lambda parameter: answer[parameter])
    assert answer[worst] <= tolerance, f"{worst}: {answer[worst]}"


@pytest.mark.parametrize(
    "name",
    [
        "async_tp2",
        "async_tp2_recomputed_in_tiles",
        "async_tp2_with_frozen_columns",
        "async_tp2_with_frozen_rows",
        "async_tp2_with_qkv_bias",
        "async_tp4",
    ],
)
def test_losses_and_gradients_are_those_of_one_rank(launched, name: str) -> None:
    check(launched[name], name, TOLERANCE)


@pytest.mark.gpu
def test_symmetric_memory_gives_the_losses_and_gradients_of_one_rank(launch_on_gpus) -> None:
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    names = ("async_tp2", "async_tp2_recomputed_in_tiles", "async_tp4")[: 3 if ranks == 4 else 2]
    answers = launch_on_gpus(ranks, LAUNCHED, f"^({'|'.join(names)})$")
    for name in names:
        check(answers[name], name, TOLERANCE_ON_GPUS)
