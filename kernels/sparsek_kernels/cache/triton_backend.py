# SPDX-License-Identifier: Apache-2.0
"""Launches of generation: prefill through the kernels of training, and the two kernels of a decoding step.

The sizes of a decoding step depend on shapes alone, so it can be captured in a CUDA graph. Those of prefill depend on
the rows' common length too; the host waits for the device in neither.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sparsek_kernels.attention.plan import LOG2E
from sparsek_kernels.attention.tile import GATE_CODE
from sparsek_kernels.cache.append_kernel import cache_append_kernel
from sparsek_kernels.cache.decode_kernel import cache_combine_kernel, cache_decode_kernel
from sparsek_kernels.cache.layout import Buffers, CacheSettings
from sparsek_kernels.cache.prefill_kernels import cache_extend_kernel, cache_store_kernel
from sparsek_kernels.cache.state import stand_in_length
from sparsek_kernels.launch import launch

MAX_PAIRS = 65_535  # (row, KV head) pairs are the second dimension of the grids of prefill
PREFILL_BLOCK = 32  # rows that a program moves between the cache and the keys of a piece
MAX_CHUNK = 64  # newcomers that one merge takes; a longer stride merges several times


@dataclass(frozen=True)
class DecodeTiling:
    """block: rows per step of a program; programs_per_sm: pieces are made until the grid has that many."""

    block: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# 16-bit inputs, measured on Hopper (kernels/benchmarks/README.md); fp32 rows are twice as long.
HALF_PRECISION = DecodeTiling(block=64, num_warps=4, num_stages=3, programs_per_sm=1)
FULL_PRECISION = DecodeTiling(block=32, num_warps=4, num_stages=2, programs_per_sm=1)


def _pad(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def prefill_triton(
    buffers: Buffers,
    settings: CacheSettings,
    past: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Append s tokens to rows that all hold `past`, and return their attention: query [b, s, hq, d] -> the same shape.

    key, value [b, s, hkv, d], scores [b, s, hkv] fp32. The cache is written by the last launch. About ten launches and
    as many allocations: a piece of 32k tokens takes the GPU longer than the host.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, tokens, heads = scores.shape
    pairs, stand_in = batch * heads, stand_in_length(settings, past)
    if pairs > MAX_PAIRS:
        raise NotImplementedError(
            f"{batch} rows of {heads} heads in one prefill; the triton backend takes up to {MAX_PAIRS} in all"
        )
    sizes = (settings.topk, settings.window, settings.stride, settings.pool)
    names = ("TOPK", "WINDOW", "STRIDE", "POOL")
    constants = dict(zip(names, sizes, strict=True)) | {
        "D": settings.head_dim,
        "D_PAD": max(16, _pad(settings.head_dim)),
        "BLOCK": PREFILL_BLOCK,
    }
    recent = settings.ring - 1
    first, keys, values, every = tokens - recent, key, value, scores
    if past:
        size = settings.pool + recent + tokens
        first = settings.pool + tokens
        keys, values = (x.new_empty(batch, size, heads, settings.head_dim) for x in (key, value))
        every = scores.new_empty(batch, heads, size)
        held = (buffers.key, buffers.value, buffers.score, buffers.place, buffers.pool)
        launch(
            cache_extend_kernel, (-(-size // PREFILL_BLOCK), pairs),
            (key, value, scores, *held, keys, values, every),
            (*key.stride()[:3], *value.stride()[:3], *scores.stride(), heads, tokens, (past + 1) % settings.ring),
            constants,
        )  # fmt: skip
        every = every.transpose(1, 2)
    thresholds, size_of_f, lists, intervals, best = torch.ops.sparsek.select(
        every, None, stand_in, tokens, *sizes, past > 0, settings.hard, True
    )
    (high, low), (evict, start, end) = thresholds.unbind(0), intervals.unbind(0)
    out, _ = torch.ops.sparsek.attention(
        query, keys, values, every, high, low, evict, lists, start, end, size_of_f, None, *sizes, stand_in,
        settings.gate, settings.softmax_scale,
    )  # fmt: skip
    entries = max(settings.pool, settings.rows)
    fields = ("key", "value", "score", "place", "threshold", "pool")
    launch(
        cache_store_kernel, (-(-entries // PREFILL_BLOCK), pairs),
        (keys, values, every, best, high, low, *(getattr(buffers, name) for name in fields)),
        (
            *keys.stride()[:3], *values.stride()[:3], *every.stride(), heads,
            *best.stride()[:2], high.shape[2], first, (past + tokens + 1) % settings.ring,
        ),
        constants,
    )  # fmt: skip
    buffers.length.fill_(past + tokens)
    return out


def append_triton(
    buffers: Buffers, settings: CacheSettings, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
) -> None:
    """Store one token per row, refresh where due. key, value [b, hkv, d] (unit stride in d), scores [b, hkv] fp32."""
    pool_pad = _pad(settings.pool)
    cache_append_kernel[(settings.batch_size * settings.num_kv_heads,)](
        key, value, scores,
        buffers.key, buffers.value, buffers.score, buffers.place, buffers.threshold, buffers.length, buffers.pool,
        *key.stride()[:2], *value.stride()[:2], *scores.stride(), settings.num_kv_heads,
        TOPK=settings.topk, WINDOW=settings.window, STRIDE=settings.stride,
        POOL=settings.pool, POOL_PAD=pool_pad, LOG_PAD=pool_pad.bit_length() - 1,
        CHUNK=min(MAX_CHUNK, _pad(settings.stride)), D=settings.head_dim, D_PAD=_pad(settings.head_dim),
        num_warps=4 if pool_pad <= 2048 else 8 if pool_pad <= 4096 else 16,
    )  # fmt: skip


def attend_triton(
    buffers: Buffers, settings: CacheSettings, query: torch.Tensor, tiling: DecodeTiling | None = None
) -> torch.Tensor:
    """Attention of each row's newest token: query [b, hq, d] (unit stride in d) -> [b, hq, d] contiguous."""
    batch, heads, dim = query.shape
    pairs = batch * settings.num_kv_heads
    full = settings.dtype == torch.float32
    tiling = tiling or (FULL_PRECISION if full else HALF_PRECISION)
    blocks = -(-settings.rows // tiling.block)
    wanted = -(-tiling.programs_per_sm * _multiprocessors(query.device) // pairs)
    piece = -(-blocks // min(max(wanted, 1), blocks))
    splits = -(-blocks // piece)
    out = torch.empty(batch, heads, dim, dtype=query.dtype, device=query.device)
    partial = statistics = out  # never touched by a single piece
    if splits > 1:
        partial = torch.empty(batch * heads * splits * dim, dtype=torch.float32, device=query.device)
        statistics = torch.empty(batch * heads * splits * 2, dtype=torch.float32, device=query.device)
    group = heads // settings.num_kv_heads
    cache_decode_kernel[(splits, pairs)](
        query, buffers.key, buffers.value, buffers.score, buffers.threshold, buffers.length, out, partial, statistics,
        *query.stride()[:2], settings.num_kv_heads, settings.softmax_scale * LOG2E, settings.floor,
        TOPK=settings.topk, WINDOW=settings.window, STRIDE=settings.stride, GATE=GATE_CODE[settings.gate],
        GROUP=group, GROUP_PAD=max(16, _pad(group)), D=dim, D_PAD=max(16, _pad(dim)),
        BLOCK=tiling.block, PIECE=piece * tiling.block, SPLITS=splits, IEEE=full,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if splits > 1:
        cache_combine_kernel[(batch * heads,)](
            partial, statistics, out,
            D=dim, D_PAD=max(16, _pad(dim)), SPLITS=splits, SPLITS_PAD=_pad(splits), num_warps=4,
        )  # fmt: skip
    return out
