# SPDX-License-Identifier: Apache-2.0
"""Context parallelism gives the whole sequence's outputs, bitwise, and gradients; its traffic does not grow with it."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext

from sparsek_megatron.context_parallel import LAYOUTS, check_agreement, shard_positions
from sparsek_megatron.refuse import check_inference

LAUNCHED = "cases_context_parallel"


@pytest.mark.parametrize("cp", [2, 4])
def test_outputs_and_gradients_are_those_of_the_whole_sequence(launched, cp: int) -> None:
    answers = launched[f"context_parallel_cp{cp}"]
    assert len(answers) == 24
    for name, (out, *gradients) in answers.items():
        assert out == 0.0, name  # the same keys in the same order: the same bits
        assert max(gradients) < 1e-12, f"{name}: {gradients}"


def test_received_bytes_do_not_depend_on_the_length(launched) -> None:
    answer = launched["context_parallel_traffic"]
    assert answer["128"] == answer["256"] == answer["512"] > 0


def test_received_bytes_are_linear_in_what_a_chunk_needs(launched) -> None:
    """Per chunk of the sequence and KV head, forward and backward; 4 ranks hold 8 chunks of a batch of 2."""
    answer = launched["context_parallel_traffic"]
    topk, window, stride, pool, dim, element = 6, 8, 4, 24, 8, 4
    heads_and_rows, others = 2 * 4, 6
    recent = window + stride - 1
    row = 2 * dim * element  # key and value
    gathered = others * (8 * pool + 4 * recent + 4 * (pool + recent) + 2 * topk * row)
    halo = 2 * 2 * recent * row  # at most two chunks' halos in, and two chunks' gradients back
    assert answer["256"] <= heads_and_rows * (gathered + halo)
    assert answer["pool"] - answer["256"] == heads_and_rows * others * (8 + 4) * 24
    assert answer["topk"] - answer["256"] == heads_and_rows * others * 2 * 6 * row
    for name, more in (("window", 8), ("stride", 4)):
        assert 0 < answer[name] - answer["256"] <= heads_and_rows * more * (others * 8 + 4 * row)


def test_lengths_and_methods_that_do_not_fit_are_named(launched) -> None:
    said = launched["context_parallel_refusals"]
    assert "sequence of 30 tokens: not divisible by 2 x context_parallel_size = 4" in said["length"]
    assert "pad it to 32" in said["length"]
    assert "sequence of 10 tokens" in said["packed"]
    assert "--cp-comm-type all_gather: use p2p" in said["method"]
    assert "1 KV heads on this tensor-parallel rank do not divide" in said["heads"]


def test_generation_under_context_parallelism_is_refused() -> None:
    context = StaticInferenceContext(1, 64)
    with pytest.raises(NotImplementedError, match="inference_context with --context-parallel-size 2"):
        check_inference(context, training=False, packed=False, context_parallel_size=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_partition_the_sequence(layout: str) -> None:
    held = [shard_positions(48, 4, rank, layout).tolist() for rank in range(4)]
    assert sorted(p for part in held for p in part) == list(range(48))
    assert held[1] == ([*range(6, 12), *range(36, 42)] if layout == "zigzag" else [*range(12, 24)])


def agree(settings: list[dict[str, object]]) -> list[str]:
    """What each of some ranks, here threads, says about its settings."""
    store = dist.HashStore()
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
    same: dict[str, object] = {"topk": 512, "window": 512}
    assert agree([same, dict(same), dict(same)]) == ["", "", ""]
    said = agree([same, same, {**same, "window": 256}])
    expected = "window is 512 on rank 0 and 256 on rank 2"
    assert all(expected in words for words in said), said
