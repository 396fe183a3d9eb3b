# SPDX-License-Identifier: Apache-2.0
"""SparseK attention under megatron-core's static inference contexts: a cache of constant size in each layer.

megatron-core's static batching keeps a key/value memory of `max_sequence_length` tokens in the context and hands core
attention all of it. SparseK layers keep a `SparseKCache` each in the same context instead, made on first use: prefill
and every later step see the new tokens only.

Legend: s new tokens, b rows of this call, np query heads, ng KV heads, hn head dimension, tp tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from sparsek_kernels import SparseKCache
from torch import Tensor

from sparsek_megatron.config import SparseKConfig

_ATTRIBUTE = "sparsek_layer_caches"  # of a context: layer number -> SparseKCache


class _NoDenseLayers(dict):
    """Where stock attention would allocate its key/value memory."""

    def __contains__(self, layer_number: object) -> bool:
        raise NotImplementedError(
            f"layer {layer_number} is dense: its memory has one length for all rows; use megatron-core's "
            "StaticInferenceContext, with prompts of one length"
        )


class SparseKInferenceContext(StaticInferenceContext):
    """A static context whose rows may have prompts of different lengths, for models of SparseK layers only.

    Prefill as with `StaticInferenceContext`: `batch_size_offset` names the first of the call's rows and
    `sequence_len_offset` the position of its first token, 0 to start over. Calls of one token per row in decode mode
    (`enable_decode_mode()`) take all rows at once and each row's position from its own cache, on the device: nothing in
    such a step depends on the host, so it can be captured in a CUDA graph.

    Learned position embeddings and RoPE tables reach `max_sequence_length`; the caches do not depend on it.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        super().__init__(max_batch_size, max_sequence_length)
        self.key_value_memory_dict = _NoDenseLayers()


class CachedScores(NamedTuple):
    """What travels to core attention in place of the scores: they and the rows of the cache that take the tokens."""

    scores: Tensor  # [b, s, ng/tp] fp32
    cache: SparseKCache


def layer_caches(context: Any) -> dict[int, SparseKCache]:
    """The SparseK caches of a static context by layer number; empty before the first forward."""
    return context.__dict__.setdefault(_ATTRIBUTE, {})


def cache_bytes(context: Any) -> int:
    """Bytes of all SparseK caches of a context on this rank."""
    return sum(cache.nbytes for cache in layer_caches(context).values())


def _own_positions(context: Any, tokens: int) -> bool:
    """Whether each row's position comes from its own cache."""
    return isinstance(context, SparseKInferenceContext) and context.is_decode_only() and tokens == 1


def new_positions(context: Any, layer_number: int, tokens: int) -> Tensor:
    """Positions of the tokens of a call before the layer's cache takes them: [s], or [b, 1] where rows differ."""
    cache = layer_caches(context)[layer_number]
    if _own_positions(context, tokens):
        return cache.lengths.long()[:, None]
    start = context.sequence_len_offset
    return torch.arange(start, start + tokens, device=cache.device)


def cache_rows(
    context: StaticInferenceContext, attention: Any, sparsek: SparseKConfig, *, batch: int, tokens: int
) -> SparseKCache:
    """The rows of this layer's cache that a call works on.

    attention: the `SparseKSelfAttention`, whose sizes and device make the cache on first use.

    Raises ValueError where the context's cache is another model's, or the call does not continue what its rows hold.
    """
    cache = _layer_cache(context, attention, sparsek)
    if _own_positions(context, tokens):
        if batch != context.max_batch_size:
            raise ValueError(
                f"a decoding step of {batch} rows: SparseKInferenceContext steps all its {context.max_batch_size} rows"
            )
        return cache
    first, offset = context.batch_size_offset, context.sequence_len_offset
    if first + batch > context.max_batch_size:
        raise ValueError(
            f"rows {first} ... {first + batch - 1} with an inference context of "
            f"max_batch_size={context.max_batch_size}: make the context larger"
        )
    if offset + tokens > context.max_sequence_length:
        raise ValueError(
            f"{offset} + {tokens} tokens pass the inference context's max_sequence_length="
            f"{context.max_sequence_length}: make the context longer"
        )
    rows = cache.rows(first, first + batch)
    if offset == 0:
        rows.reset()
    elif (held := rows.lengths_on_host()) != [offset] * batch:
        raise ValueError(
            f"inference_context.sequence_len_offset={offset}, but these rows hold {held} tokens: a cache of "
            "constant size cannot go back; call reset() on the context and run the whole prompt"
        )
    return rows


def _layer_cache(context: StaticInferenceContext, attention: Any, sparsek: SparseKConfig) -> SparseKCache:
    """This layer's cache of all rows: the one in the context, or a new one."""
    caches, number = layer_caches(context), attention.layer_number
    weight = (
        attention.scorer.weight
    )  # a model may have been converted since: its dtype is not the configuration's
    settings = {
        "batch_size": context.max_batch_size,
        "num_kv_heads": attention.num_query_groups_per_partition,
        "head_dim": attention.hidden_size_per_attention_head,
        "topk": sparsek.topk,
        "window": sparsek.window,
        "stride": sparsek.stride,
        "pool": sparsek.pool,
        "gate": sparsek.gate,
        "softmax_scale": attention.core_attention.softmax_scale,
        "dtype": weight.dtype,
    }
    if number not in caches:
        caches[number] = SparseKCache(**settings, device=weight.device, backend=sparsek.backend)
    cache = caches[number]
    for name, wanted in (*settings.items(), ("device", weight.device)):
        found = cache.device if name == "device" else getattr(cache.settings, name)
        if found != wanted:
            raise ValueError(
                f"inference_context holds a cache of {name}={found} for layer {number}, and this model has "
                f"{name}={wanted}: make a new context"
            )
    return cache


def rotary_at(table: Tensor | None, positions: Tensor) -> Tensor | None:
    """Rotary angles of some positions: table [max_sequence_length, 1, 1, dim], positions [s] or [b, 1].

    Returns [s, 1, 1, dim], or [1, b, 1, dim]. None stays None.
    """
    if table is None:
        return None
    if positions.dim() == 1:
        return table.index_select(0, positions)
    return table.index_select(0, positions[:, 0]).transpose(0, 1)


def attend_cached(query: Tensor, key: Tensor, value: Tensor, cached: CachedScores) -> Tensor:
    """Attention of new tokens on top of the cache, which takes them in.

    query [s, b, np/tp, hn], key and value [s, b, ng/tp, hn] -> [s, b, np/tp * hn].
    """
    tensors = (x.transpose(0, 1) for x in (query, key, value))
    query, key, value = tensors
    attend = cached.cache.decode if query.shape[1] == 1 else cached.cache.prefill
    return attend(query, key, value, cached.scores).transpose(0, 1).flatten(2)
