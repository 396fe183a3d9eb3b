# SPDX-License-Identifier: Apache-2.0
"""Context parallelism gives the whole sequence's outputs, bitwise, and gradients; its traffic does not grow with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from sparsek_megatron.context_parallel import (
    LAYOUTS,
    context_parallel_attention,
    shard_positions,
)
from sparsek_megatron.refuse import check_inference

LAUNCHED = "cases_context_parallel"


@pytest.mark.parametrize("cp", [2, 4])
def test_outputs_and_gradients_are_those_of_the_whole_sequence(launched, cp: int) -> None:
    answers = launched[f"context_parallel_cp{cp}"]
    assert len(answers) == 24
    for name, (out, *gradients) in answers.items():
        assert out == 0.0, name  # the same keys in the same order: the same bits
        assert max(gradients) < 1e-12, f"{name}: {gradients}"


def check_twice(answer: dict[str, list[float]]) -> None:
    assert answer == {layout: [0.0] * 5 for layout in LAYOUTS}


def test_two_runs_give_the_same_bits(launched) -> None:
    check_twice(launched["context_parallel_twice"])


@pytest.mark.gpu
def test_two_runs_on_gpus_give_the_same_bits(launch_on_gpus) -> None:
    check_twice(launch_on_gpus(2, LAUNCHED, "^context_parallel_twice$")["context_parallel_twice"])


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


def test_selection_work_per_token_does_not_grow_with_the_length(launched) -> None:
    """What the start states cost does not depend on the length; the rest is linear in a rank's own tokens."""
    answer = launched["context_parallel_work"]
    short, middle, long = (answer[f"cp4, {n}"] for n in (128, 256, 512))
    for part in ("start states", "sums over chunks"):
        assert 0 < short[part] == middle[part] == long[part]
    for part in ("summaries", "walk"):
        assert 0 < long[part] - middle[part] == 2 * (middle[part] - short[part])
        assert long[part] / 512 < middle[part] / 256 < short[part] / 128


def test_local_selection_depends_on_the_own_tokens_alone(launched) -> None:
    answer = launched["context_parallel_work"]
    for n in (128, 256):
        for part in ("summaries", "walk"):
            assert answer[f"cp2, {n}"][part] == answer[f"cp4, {2 * n}"][part]


class GroupOfTwo:
    """A context-parallel group that cannot send anything: what is refused must be refused before."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def call(
    *, heads: int = 4, kv_heads: int = 2, batch: int = 1, tokens: int = 32, keys: int | None = None,
    bounds: list[int] | None = None, dtype: torch.dtype = torch.float32, **changes: Any,
) -> torch.Tensor:  # fmt: skip
    """Context-parallel attention of a rank's `tokens`."""
    query = torch.randn(batch, tokens, heads, 8, requires_grad=True)
    key, value = torch.randn(2, batch, keys or tokens, kv_heads, 8, requires_grad=True)
    scores = torch.randn(batch, keys or tokens, kv_heads, dtype=dtype, requires_grad=True)
    options: dict[str, Any] = {"topk": 4, "window": 4, "stride": 4, "pool": 8, "gate": "value", **changes}
    group: Any = GroupOfTwo()
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, dtype=options.pop("of", torch.int32))
    return context_parallel_attention(query, key, value, scores, group=group, softmax_scale=1.0, **options)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"gate": "foo"}, "gate must be one of key_value, value, logit, got 'foo'"),
    "backend": ({"backend": "foo"}, "backend must be one of auto, triton, torch, got 'foo'"),
    "pool": ({"pool": 3}, "pool must be at least topk = 4, got 3"),
    "topk": ({"topk": 0}, "topk must be an int of at least 1, got 0"),
    "heads": ({"heads": 3}, "query has 3 heads, not a multiple of key's 2"),
    "lengths": ({"keys": 24}, r"key has shape \(1, 24, 2, 8\); query \(1, 32, 4, 8\) needs"),
    "no tokens": ({"tokens": 0}, r"query has no tokens \(s = 0\)"),
    "scores": ({"dtype": torch.bfloat16}, "scores has dtype torch.bfloat16"),
    "packed rows": ({"batch": 2, "bounds": [0, 64]}, "scores must have batch 1 with cu_seqlens, got batch 2"),
    "decreasing": ({"bounds": [0, 32, 16, 64]}, r"never decrease and end at or before s = 64, got \[0, 32, 16,"),
    "late start": ({"bounds": [8, 32, 64]}, r"cu_seqlens must start at 0, .* got \[8, 32, 64\]"),
    "past the end": ({"bounds": [0, 32, 68]}, "end at or before s = 64, got"),
    "int64": ({"bounds": [0, 64], "of": torch.int64}, r"cu_seqlens must be int32 of shape \[num_seqs \+ 1\]"),
    "a list": ({"cu_seqlens": [0, 64]}, "cu_seqlens must be an int32 tensor, got list"),
    "odd length": ({"tokens": 15}, "30 tokens: not divisible by 2 x context_parallel_size = 4 .* pad it to 32"),
    "odd sequence": ({"bounds": [0, 10, 64]}, "sequence of 10 tokens: not divisible by 2 x context_parallel_size"),
    "layout": ({"layout": "striped"}, "layout='striped': must be one of zigzag, contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["p2p", "a2a"])
@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_one_process_refuses_is_refused_before_anything_is_sent(
    changes: dict[str, Any], said: str, method: str
) -> None:
    with pytest.raises(ValueError, match=said):
        call(cp_comm_type=method, **changes)


def test_methods_that_do_not_fit_are_named() -> None:
    with pytest.raises(NotImplementedError, match="--cp-comm-type all_gather: use p2p"):
        call(cp_comm_type="all_gather")
    with pytest.raises(ValueError, match="1 KV heads on this tensor-parallel rank do not divide"):
        call(cp_comm_type="a2a", kv_heads=1)


def test_a_packed_batch_without_sequences_gives_zeros_and_gradients() -> None:
    out = call(bounds=[0, 0])
    assert out.shape == (1, 32, 4, 8) and not out.any()
    out.sum().backward()


def test_generation_under_context_parallelism_is_refused() -> None:
    context = StaticInferenceContext(1, 64)
    with pytest.raises(NotImplementedError, match="inference_context with --context-parallel-size 2"):
        check_inference(context, training=False, packed=False, context_parallel_size=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_partition_the_sequence(layout: str) -> None:
    held = [shard_positions(48, 4, rank, layout).tolist() for rank in range(4)]
    assert sorted(p for part in held for p in part) == list(range(48))
    assert held[1] == ([*range(6, 12), *range(36, 42)] if layout == "zigzag" else [*range(12, 24)])
