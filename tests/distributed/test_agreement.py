# SPDX-License-Identifier: Apache-2.0
"""Ranks that were started with different settings say so, and a comparison waits only where every rank takes part."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from sparsek_megatron.context_parallel import check_agreement, check_agreement_with_the_first

SAME: dict[str, object] = {"topk": 512, "window": 512, "cp_comm_type": None}


def hash_store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def agree(settings: list[dict[str, object]]) -> list[str]:
    """What each of some ranks, here threads, says about its settings."""
    store = hash_store()
    said = [""] * len(settings)

    def rank(number: int) -> None:
        try:
            check_agreement(settings[number], store, number, len(settings))
        except ValueError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return said


def test_ranks_that_disagree_name_the_field_and_both_values() -> None:
    assert agree([SAME, dict(SAME), dict(SAME)]) == ["", "", ""]
    said = agree([SAME, SAME, {**SAME, "window": 256}])
    expected = "window is 512 on rank 0 and 256 on rank 2"
    assert all(expected in words for words in said), said


def test_a_rank_alone_waits_for_nobody_and_later_ones_compare_with_it() -> None:
    store = hash_store()
    check_agreement_with_the_first(SAME, store, 3, name="layers")
    check_agreement_with_the_first(dict(SAME), store, 0, name="layers")
    with pytest.raises(
        ValueError, match="cp_comm_type is None on rank 3 and 'a2a' on rank 1; start every rank"
    ):
        check_agreement_with_the_first({**SAME, "cp_comm_type": "a2a"}, store, 1, name="layers")
    check_agreement_with_the_first({**SAME, "cp_comm_type": "a2a"}, store, 1, name="other layers")


def test_a_pipeline_stage_without_sparsek_layers_is_not_waited_for(launched_on_two) -> None:
    assert launched_on_two["agreement_where_a_stage_has_no_sparsek_layer"] == ["", ""]


def test_models_of_megatrons_own_script_that_disagree_name_the_setting(launched_on_two) -> None:
    said = launched_on_two["agreement_of_other_settings_on_rank_0"]
    differences = "pool is 64 on rank 1 and 32 on rank 0, topk is 16 on rank 1 and 8 on rank 0"
    assert said[0].startswith(f"ranks disagree on their configuration: {differences}; start every rank with")
    assert said[1] == "", "rank 1 built its first layer before"
