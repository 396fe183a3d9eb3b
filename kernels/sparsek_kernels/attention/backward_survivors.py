# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Backward, key-major, first part: dK and dV of older keys, segment by segment, into fp32 partials.

One program per (segment of queries, block of the keys it selects: `segments.py`). The list is sorted by score, and of
two listed keys the lower score is always evicted first, so it is sorted by eviction too: a block ends with its first
key and little work is wasted. In natural key order one long-lived key would make its whole block long.
"""

import triton
import triton.language as tl

from sparsek_kernels.attention.key_step import key_step, query_rows
from sparsek_kernels.attention.segments import leave_window, segment_tile
from sparsek_kernels.attention.tile import clamp_gate, is_fractional


@triton.jit
def attention_backward_survivors_kernel(
    Q, K, V, U, TAU, TAU_LOW, EVICT, TILES, D_OUT, LSE, DELTA,
    LISTS, ENTRANTS, ENTRANT_COUNT, PART_K, PART_V, PART_GATE,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    tokens, past, slots, segments, kv_heads, scale, scale_log2, floor, list_tiles,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIFORM: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr,
    CARRIED: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Grid (segments * (ceil(TOPK / KEYS) + ceil(CAPACITY / KEYS)), b * hkv): blocks of the list, then of the entrants.

    PART_K, PART_V [b * hkv, segments * (TOPK + CAPACITY), D] fp32, PART_GATE without D.
    """
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    LIST_BLOCKS: tl.constexpr = (TOPK + KEYS - 1) // KEYS
    BLOCKS: tl.constexpr = LIST_BLOCKS + (CAPACITY + KEYS - 1) // KEYS
    segment = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first, start, end, slot0, own_list, base = segment_tile(
        TILES, segment, tokens, past, SEGMENT, STRIDE, LIST_TILE, PACKED, CARRIED
    )
    if first >= end:
        return
    if block < LIST_BLOCKS:
        first_entry = block * KEYS
        count = tl.minimum(tl.maximum(base - start - WINDOW + 1, 0), TOPK)
        entries = LISTS + (bh * list_tiles + own_list) * TOPK
        first_row = segment * (TOPK + CAPACITY) + first_entry
    else:
        first_entry = (block - LIST_BLOCKS) * KEYS
        count = tl.load(ENTRANT_COUNT + bh * segments + segment)
        count = tl.where(count <= CAPACITY, count, 0)
        entries = ENTRANTS + (bh * segments + segment) * CAPACITY
        first_row = segment * (TOPK + CAPACITY) + TOPK + first_entry
    if first_entry >= count:
        return

    lane = tl.arange(0, KEYS)
    ok = first_entry + lane < count
    j = tl.load(entries + first_entry + lane, mask=ok, other=0)
    keys = CARRIED + tokens
    u = tl.load(U + bh * keys + j)[:, None]
    stop = tl.minimum(first + SEGMENT, end)
    alive = tl.where(ok, tl.minimum(tl.load(EVICT + bh * keys + j), stop), 0)
    # Before, the band pass owns the key.
    since = tl.maximum(leave_window(j - CARRIED, start, WINDOW, STRIDE), base)
    if CARRIED > 0:
        since = tl.where(j < POOL, base, since)
    lo = tl.min(tl.where(ok, since, stop), 0)
    dim = tl.arange(0, D_PAD)[None, :]
    dim_ok = dim < D
    k = tl.load(K + batch * k_batch + head * k_head + j.to(tl.int64)[:, None] * k_token + dim, dim_ok, 0.0)
    v = tl.load(V + batch * v_batch + head * v_head + j.to(tl.int64)[:, None] * v_token + dim, dim_ok, 0.0)

    first_head = head * GROUP
    q_base = Q + batch * q_batch + first_head * q_head
    do_base = D_OUT + batch * do_batch + first_head * do_head
    stat_base = (batch * kv_heads * GROUP + first_head) * tokens
    tau_base = bh * slots + slot0

    d_k = tl.zeros([KEYS, D_PAD], tl.float32)
    d_v = tl.zeros([KEYS, D_PAD], tl.float32)
    gate_sum = tl.zeros([KEYS], tl.float32)
    for n in tl.range(0, tl.cdiv(tl.max(alive, 0) - lo, QUERIES) * GROUP):  # queries outer, heads inner
        i = lo + n // GROUP * QUERIES
        if UNIFORM and not PACKED and CARRIED == 0:
            i = tl.multiple_of(i, QUERIES)
        token, q, d_out, lse, delta = query_rows(
            q_base, do_base, LSE + stat_base, DELTA + stat_base, i, n % GROUP, end, tokens,
            q_token, q_head, do_token, do_head, D, D_PAD, QUERIES, CARRIED,
        )  # fmt: skip
        if UNIFORM:
            slot = tau_base + (i - start) // STRIDE
            tau = tl.load(TAU + slot)
            tau_low = tl.load(TAU_LOW + slot)
            visible = ((i >= since) & (i < alive))[:, None]
        else:
            slot = tau_base + (token - start) // STRIDE
            tau = tl.load(TAU + slot, mask=token < end, other=0.0)[None, :]
            tau_low = tl.load(TAU_LOW + slot, mask=token < end, other=0.0)[None, :]
            visible = (token[None, :] >= since[:, None]) & (token[None, :] < alive[:, None])
        gate = clamp_gate(u, tau, tau_low, floor)
        fractional = is_fractional(u, tau, tau_low)
        d_k, d_v, gate_sum = key_step(
            k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, gate, visible, fractional, scale, scale_log2,
            GATE, True, True, IEEE,
        )  # fmt: skip

    part = bh * segments * (TOPK + CAPACITY) + first_row + lane
    ok_2d = ok[:, None] & dim_ok
    tl.store(PART_K + part[:, None] * D + dim, d_k, mask=ok_2d)
    tl.store(PART_V + part[:, None] * D + dim, d_v, mask=ok_2d)
    tl.store(PART_GATE + part, gate_sum, mask=ok)
