# SPDX-License-Identifier: Apache-2.0
"""Training saved at TP2 with megatron-core's distributed optimizer goes on at TP1 and TP4 as if never stopped."""

from __future__ import annotations

import pytest

LAUNCHED = "cases_optimizer"


@pytest.mark.parametrize("split", ["tp1", "tp4", "tp4_sp"])
def test_resumed_steps_equal_the_uninterrupted_ones(launched, split: str) -> None:
    errors = launched["optimizer_state_saved_at_tp2"][split]
    assert len(errors["losses"]) == len(errors["norms"]) == 3
    assert max(errors["losses"]) <= 1e-5
    assert max(errors["norms"]) <= 1e-4


def test_the_comparison_sees_a_lost_optimizer_state(launched) -> None:
    errors = launched["optimizer_state_saved_at_tp2"]["tp1_without_the_optimizer"]
    assert max(errors["losses"]) > 1e-3
