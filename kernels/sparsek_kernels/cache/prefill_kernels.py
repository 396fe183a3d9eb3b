# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Kernels between the cache and the kernels of training, one launch each way for a piece of a prompt.

Before a piece, `cache_extend_kernel` writes the E keys that its tokens can see, in the order of `selection.types`: the
pool, of which the selected rows alone are ever read, the last window + stride - 1 tokens, the piece. After it,
`cache_store_kernel` fills the cache from them. A program owns a block of rows of one (row, KV head): no atomics, and
neither kernel reads what it writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsek_kernels.selection.keys import EMPTY, key_index, key_score


@triton.jit
def _load(rows, index, token_stride, dim, mask, D: tl.constexpr):
    offset = index.to(tl.int64)[:, None] * token_stride
    return tl.load(rows + offset + dim[None, :], mask=mask[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens", "oldest", "kv_heads"])
def cache_extend_kernel(
    NEW_KEY, NEW_VALUE, NEW_SCORE, KEY, VALUE, SCORE, PLACES, POOLS, KEYS, VALUES, SCORES,
    k_batch, k_token, k_head, v_batch, v_token, v_head, u_batch, u_token, u_head, kv_heads, tokens, oldest,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, POOL: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of E, b * hkv). NEW_KEY, NEW_VALUE [b, s, hkv, d], NEW_SCORE [b, s, hkv], strided; KEYS, VALUES
    [b, E, hkv, d], SCORES [b, hkv, E] contiguous; the rest as in `layout.Buffers`. oldest: place in the ring of the
    first of the last window + stride - 1 tokens.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    RING: tl.constexpr = WINDOW + STRIDE
    ROWS: tl.constexpr = TOPK + RING
    BASE: tl.constexpr = POOL + RING - 1
    size = BASE + tokens
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    selected, recent, new = j < TOPK, (j >= POOL) & (j < BASE), (j >= BASE) & (j < size)
    place = tl.load(PLACES + pair * TOPK + j, mask=selected, other=0)
    row = tl.where(selected, place, TOPK + (oldest + j + (RING - POOL % RING)) % RING)
    token = (j - BASE).to(tl.int64)

    u = tl.load(POOLS + pair * POOL + j, mask=j < POOL, other=0.0)
    u = tl.where(recent, tl.load(SCORE + pair * ROWS + row, mask=recent, other=0.0), u)
    fresh = tl.load(NEW_SCORE + batch * u_batch + head * u_head + token * u_token, mask=new, other=0.0)
    tl.store(SCORES + pair * size + j, tl.where(new, fresh, u), mask=j < size)

    dim = tl.arange(0, D_PAD)
    held = selected | recent
    out = ((batch * size + j) * kv_heads + head)[:, None] * D + dim[None, :]
    mask = (held | new)[:, None] & (dim < D)[None, :]
    old = _load(KEY + pair * ROWS * D, row, D, dim, held, D)
    fresh = _load(NEW_KEY + batch * k_batch + head * k_head, token, k_token, dim, new, D)
    tl.store(KEYS + out, tl.where(new[:, None], fresh, old), mask=mask)
    old = _load(VALUE + pair * ROWS * D, row, D, dim, held, D)
    fresh = _load(NEW_VALUE + batch * v_batch + head * v_head, token, v_token, dim, new, D)
    tl.store(VALUES + out, tl.where(new[:, None], fresh, old), mask=mask)


@triton.jit(do_not_specialize=["slots", "first", "oldest", "kv_heads"])
def cache_store_kernel(
    KEYS, VALUES, SCORES, BEST, HIGH, LOW, KEY, VALUE, SCORE, PLACES, THRESHOLD, POOLS,
    k_batch, k_token, k_head, v_batch, v_token, v_head, u_batch, u_token, u_head, kv_heads,
    best_batch, best_head, slots, first, oldest,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, POOL: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the pool or of the rows, whichever are more; b * hkv). KEYS, VALUES, SCORES of the E keys,
    strided; BEST [b, hkv, POOL], strided, the pool after the piece as keys of `selection.keys`; HIGH, LOW
    [b, hkv, slots]. first: index in E of the first of the last window + stride - 1 tokens, negative before the
    sequence; oldest: its place in the ring. The length is the caller's to write: launches do not depend on it.
    """
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    RING: tl.constexpr = WINDOW + STRIDE
    ROWS: tl.constexpr = TOPK + RING
    entry = block * BLOCK + tl.arange(0, BLOCK)
    best = tl.load(BEST + batch * best_batch + head * best_head + entry, mask=entry < POOL, other=EMPTY)
    tl.store(POOLS + pair * POOL + entry, key_score(best), mask=entry < POOL)
    selected, recent = entry < TOPK, (entry >= TOPK) & (entry < ROWS - 1)
    tl.store(PLACES + pair * TOPK + entry, entry, mask=selected)

    source = tl.where(selected, key_index(best), first + entry - TOPK)
    row = tl.where(selected, entry, TOPK + (oldest + entry + (RING - TOPK % RING)) % RING)
    held = tl.where(selected, best != EMPTY, recent & (source >= 0))
    write = selected | recent
    u = SCORES + batch * u_batch + head * u_head + source.to(tl.int64) * u_token
    tl.store(SCORE + pair * ROWS + row, tl.load(u, mask=held, other=float("-inf")), mask=write)
    dim = tl.arange(0, D_PAD)
    out = (pair * ROWS + row)[:, None] * D + dim[None, :]
    mask = write[:, None] & (dim < D)[None, :]
    tl.store(
        KEY + out, _load(KEYS + batch * k_batch + head * k_head, source, k_token, dim, held, D), mask=mask
    )
    tl.store(
        VALUE + out, _load(VALUES + batch * v_batch + head * v_head, source, v_token, dim, held, D), mask=mask
    )
    if block == 0:
        tl.store(THRESHOLD + pair * 2, tl.load(HIGH + pair * slots + slots - 1))
        tl.store(THRESHOLD + pair * 2 + 1, tl.load(LOW + pair * slots + slots - 1))
