# SPDX-License-Identifier: Apache-2.0
"""TP1 = TP2 = TP2 with sequence parallelism = TP4: losses and gradients of every parameter."""

from __future__ import annotations

import pytest

LAUNCHED = "cases_parity"

TOLERANCE = 1e-5

CASES = (
    "tp2",
    "tp2_sp",
    "tp2_sp_multi_token_prediction",
    "tp4_fewer_kv_heads_than_ranks",
    "tp4_sp_fewer_kv_heads_than_ranks",
    "tp2_sp_layernorm_qk_norm_own_scorer_norm_mlp_scorer",
    "tp2_qk_norm_detached_scores",
    "tp2_sp_packed_sequences",
    "tp2_sp_full_recompute",
    "ep2_tp2_sp_experts",
)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_those_of_one_rank(launched, name: str) -> None:
    errors = launched[name]
    layers = 3 if name == "tp2_sp_multi_token_prediction" else 2
    assert sum("scorer.weight" in n for n in errors) == layers
    assert sum("scorer.slope" in n for n in errors) == layers
    assert sum("layernorm.weight" in n for n in errors) >= 5
    worst = max(errors, key=lambda n: errors[n])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]}"


@pytest.mark.parametrize("split", ["tp2", "tp2_sp", "tp4_sp"])
def test_a_covering_selection_is_the_stock_dense_model(launched, split: str) -> None:
    errors = launched["covering_selection_against_the_stock_dense_model"][split]
    assert len(errors) == 1 + 15
    worst = max(errors, key=lambda n: errors[n])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]}"


def test_replicated_weights_start_equal_on_all_ranks(launched) -> None:
    names = launched["replicated_weights_start_equal_on_all_ranks"]
    assert sum("scorer" in name for name in names) == 2 * 5


def test_the_comparison_sees_a_missing_sum_over_ranks(launched) -> None:
    errors = launched["control_without_the_sum_over_ranks"]
    assert min(errors.values()) > 0.02, errors
