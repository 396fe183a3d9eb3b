# SPDX-License-Identifier: Apache-2.0
"""Checkpoints move between parallel splits and between dense and SparseK models bit for bit."""

from __future__ import annotations

import pytest

LAUNCHED = "cases_checkpoint"


@pytest.mark.parametrize("case", ["checkpoint_saved_at_tp2", "checkpoint_of_a_layer_pattern"])
@pytest.mark.parametrize("split", ["tp1", "tp4", "tp2_pp2"])
def test_a_checkpoint_saved_at_tp2_loads_bitwise_under_another_split(launched, case: str, split: str) -> None:
    answer = launched[case]
    scorers = {name for name in answer["saved"] if "scorer" in name}
    assert len(scorers) == (12 if case == "checkpoint_saved_at_tp2" else 6)
    assert {name.rsplit(".", 1)[1] for name in scorers} == {"weight", "slope", "reference_length"}
    assert answer[split] == []


@pytest.mark.parametrize("layers", ["stacked=True", "stacked=False"])
def test_a_dense_checkpoint_loads_into_sparsek_and_exports_back_bitwise(launched, layers: str) -> None:
    answer = launched["dense_checkpoint_into_sparsek_and_back"][layers]
    assert answer["dense"] == [], "everything but the scorers is the dense model's"
    assert answer["scorers"] == [], "the scorers keep their initial values"
    assert answer["initialised"]
    assert "is not a dense checkpoint of this model: " in answer["another_model"]
    assert "\n" not in answer["another_model"]
    if layers == "stacked=True":  # with a virtual pipeline
        assert "got 1 of the 2 model chunks" in answer["some_chunks"]
    assert answer["exported"] == []


def test_hf_weights_land_on_every_tensor_and_pipeline_rank(launched) -> None:
    answer = launched["hf_weights_under_tp2_pp2"]
    assert answer["different"] == []
    assert len(answer["left"]) == 8 and all("scorer" in name for name in answer["left"])
    assert not answer["padding"], "rows of the padded vocabulary are zero"
