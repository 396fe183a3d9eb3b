# SPDX-License-Identifier: Apache-2.0
"""Training saved at TP2 with megatron-core's distributed optimizer goes on at TP1 and TP4 as if never stopped."""

from __future__ import annotations

import pytest

LAUNCHED = "cases_optimizer"


def worst(got: dict[str, list[float]], want: dict[str, list[float]], key: str) -> float:
    assert len(got[key]) == len(want[key]) == 3
    return max(abs(a - b) / abs(b) for a, b in zip(got[key], want[key], strict=True))


@pytest.mark.parametrize("split", ["tp1", "tp4", "tp4_sp"])
def test_resumed_steps_equal_the_uninterrupted_ones(launched, split: str) -> None:
    answer = launched["optimizer_state_saved_at_tp2"]
    assert worst(answer[split], answer["uninterrupted"], "losses") <= 1e-5
    assert worst(answer[split], answer["uninterrupted"], "norms") <= 1e-4


def test_the_comparison_sees_a_lost_optimizer_state(launched) -> None:
    answer = launched["optimizer_state_saved_at_tp2"]
    assert worst(answer["tp1_without_the_optimizer"], answer["uninterrupted"], "losses") > 1e-3
