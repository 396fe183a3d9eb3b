# SPDX-License-Identifier: Apache-2.0
"""A model's chunked loss is its ordinary loss on one rank: losses and the gradient of every parameter."""

from __future__ import annotations

import pytest

LAUNCHED = "cases_loss"

TOLERANCE = 2e-6  # of the largest gradient of a parameter; float32, reduced in another order
LOSS_TOLERANCE = 1e-6

CASES = (
    "loss_on_one_rank",
    "loss_on_two_ranks",
    "loss_under_sequence_parallelism",
    "loss_on_four_ranks_a_token_at_a_time",
    "loss_of_tied_embeddings",
    "loss_in_one_chunk",
    "loss_with_tiled_mlp_and_offloaded_checkpoints",
)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_whole_logits(launched, name: str) -> None:
    errors = launched[name]
    assert errors.pop("logit width") == 0.0
    assert errors.pop("losses") <= LOSS_TOLERANCE
    assert ("output_layer.weight" in errors) is ("tied" not in name)
    worst = max(errors, key=lambda n: errors[n])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]}"
