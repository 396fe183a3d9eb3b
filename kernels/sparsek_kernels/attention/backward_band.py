# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Backward, key-major, second part: local dK and dV on top of the collected partials, written once.

One program per block of consecutive keys; it owns those rows of dK and dV, so no atomics. With a state, blocks keep to
positions from the first recent token on; further blocks hold the carried pool, which has partials only.
"""

import triton
import triton.language as tl

from sparsek_kernels.attention.key_step import key_step, query_rows
from sparsek_kernels.attention.segments import leave_window
from sparsek_kernels.attention.tile import clamp_gate, is_fractional, sequence_tile


@triton.jit
def attention_backward_band_kernel(
    Q, K, V, U, TAU, TAU_LOW, EVICT, TILES, D_OUT, LSE, DELTA,
    ENTRANT_COUNT, KEY_ROW, PART_K, PART_V, PART_GATE, D_K, D_V, KEY_SUM,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    tokens, past, slots, segments, kv_heads, scale, scale_log2, floor, band_blocks, band_first,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIFORM: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr,
    CARRIED: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, b * hkv): band_blocks blocks from token band_first on, then those of the carried pool.

    D_K, D_V [b, E, hkv, d] contiguous; KEY_SUM [b, hkv, E] fp32 (E keys: `selection.types`).
    """
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    first, start, end, slot0, _list0, segment0 = sequence_tile(TILES, tl.program_id(0), tokens, KEYS, PACKED)
    if CARRIED > 0:
        first, start, slot0, segment0 = first + band_first, -past, -(past // STRIDE), -(past // SEGMENT)
        end = tokens
        if tl.program_id(0) >= band_blocks:
            first, end = (tl.program_id(0) - band_blocks) * KEYS - CARRIED, POOL - CARRIED
    if first >= end:
        return

    keys = CARRIED + tokens
    j = first + tl.arange(0, KEYS)
    e = CARRIED + j
    ok = j < end
    dim = tl.arange(0, D_PAD)[None, :]
    if CARRIED > 0:
        in_pool = end < tokens
        ok &= in_pool | (e >= POOL)
    ok_2d = ok[:, None] & (dim < D)
    u = tl.load(U + bh * keys + e, mask=ok, other=0.0)
    alive = tl.load(EVICT + bh * keys + e, mask=ok, other=0)

    first_head = head * GROUP
    q_base = Q + batch * q_batch + first_head * q_head
    do_base = D_OUT + batch * do_batch + first_head * do_head
    stat_base = (batch * kv_heads * GROUP + first_head) * tokens
    tau_base = bh * slots + slot0

    # This pass owns key j's local queries and, where the segment that it leaves the window in kept no entrants,
    # the rest of that segment. The key's older queries are in its partials.
    segment = (j - start + WINDOW + SEGMENT - 1) // SEGMENT
    leave = leave_window(j, start, WINDOW, STRIDE)
    inside = ok & (leave < end)
    origin = first
    if CARRIED > 0:
        origin = tl.maximum(first, past // STRIDE * STRIDE - past)  # of the call's queries
        inside &= leave > past // STRIDE * STRIDE - past
    count = tl.load(ENTRANT_COUNT + bh * segments + segment0 + segment - 1, mask=inside, other=0)
    dense = count > CAPACITY
    until = tl.minimum(tl.where(dense, start + segment * SEGMENT, leave), alive)
    if CARRIED > 0:
        until = tl.where(in_pool, first, until)  # no query of the call comes before: no local ones
    hi = tl.max(until, 0)
    diagonal = tl.minimum(tl.maximum(first + KEYS, origin), hi)

    row = tl.load(KEY_ROW + bh * keys + e, mask=ok, other=-1)
    held = row >= 0
    held_2d = held[:, None] & (dim < D)
    part = bh * segments * (TOPK + CAPACITY) + row
    d_k = tl.load(PART_K + part[:, None] * D + dim, mask=held_2d, other=0.0)
    d_v = tl.load(PART_V + part[:, None] * D + dim, mask=held_2d, other=0.0)
    gate_sum = tl.load(PART_GATE + part, mask=held, other=0.0)

    k = tl.load(K + batch * k_batch + head * k_head + e.to(tl.int64)[:, None] * k_token + dim, ok_2d, 0.0)
    v = tl.load(V + batch * v_batch + head * v_head + e.to(tl.int64)[:, None] * v_token + dim, ok_2d, 0.0)

    if UNIFORM:  # queries for which every key of the block is local and visible
        inner = tl.minimum(leave_window(first, start, WINDOW, STRIDE), end)
        inner = tl.maximum(diagonal, tl.minimum(inner, hi) if CARRIED > 0 else inner)
        for n in tl.range(0, tl.cdiv(inner - diagonal, QUERIES) * GROUP):
            i = diagonal + n // GROUP * QUERIES
            if not PACKED and CARRIED == 0:
                i = tl.multiple_of(i, QUERIES)
            _token, q, d_out, lse, delta = query_rows(
                q_base, do_base, LSE + stat_base, DELTA + stat_base, i, n % GROUP, end, tokens,
                q_token, q_head, do_token, do_head, D, D_PAD, QUERIES, CARRIED,
            )  # fmt: skip
            d_k, d_v, gate_sum = key_step(
                k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, 1.0, True, False, scale, scale_log2,
                GATE, False, False, IEEE,
            )  # fmt: skip
        skipped = inner - diagonal
    else:
        skipped = 0
    for n in tl.range(0, tl.cdiv(hi - skipped - origin, QUERIES) * GROUP):  # the diagonal, then the rest
        i = origin + n // GROUP * QUERIES
        if UNIFORM:
            i = tl.where(i < diagonal, i, i + skipped)
            if not PACKED and CARRIED == 0:
                i = tl.multiple_of(i, QUERIES)
        token, q, d_out, lse, delta = query_rows(
            q_base, do_base, LSE + stat_base, DELTA + stat_base, i, n % GROUP, end, tokens,
            q_token, q_head, do_token, do_head, D, D_PAD, QUERIES, CARRIED,
        )  # fmt: skip
        visible = j[:, None] <= token[None, :]
        if UNIFORM:  # one refresh point a tile: gates and evictions are per key
            refresh = (i - start) // STRIDE
            tau = tl.load(TAU + tau_base + refresh)
            tau_low = tl.load(TAU_LOW + tau_base + refresh)
            local = j > start + refresh * STRIDE - WINDOW
            gate = tl.where(local, 1.0, clamp_gate(u, tau, tau_low, floor))[:, None]
            fractional = (is_fractional(u, tau, tau_low) & ~local)[:, None]
            visible &= (i < until)[:, None]
        else:
            refresh = (token - start) // STRIDE
            tau = tl.load(TAU + tau_base + refresh, mask=token < end, other=0.0)[None, :]
            tau_low = tl.load(TAU_LOW + tau_base + refresh, mask=token < end, other=0.0)[None, :]
            local = j[:, None] > (start + refresh * STRIDE - WINDOW)[None, :]
            gate = tl.where(local, 1.0, clamp_gate(u[:, None], tau, tau_low, floor))
            fractional = is_fractional(u[:, None], tau, tau_low) & ~local
            visible &= token[None, :] < until[:, None]
        d_k, d_v, gate_sum = key_step(
            k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, gate, visible, fractional, scale, scale_log2,
            GATE, True, True, IEEE,
        )  # fmt: skip

    own = ((batch * keys + e) * kv_heads + head)[:, None] * D + dim
    if CARRIED > 0:  # a recent token from before the sequence's start is no key
        real = in_pool | (j >= start)
        d_k = tl.where(real[:, None], d_k, 0.0)
        d_v = tl.where(real[:, None], d_v, 0.0)
        gate_sum = tl.where(real, gate_sum, 0.0)
    tl.store(D_K + own, (d_k * scale).to(D_K.dtype.element_ty), mask=ok_2d)
    tl.store(D_V + own, d_v.to(D_V.dtype.element_ty), mask=ok_2d)
    tl.store(KEY_SUM + bh * keys + e, gate_sum, mask=ok)
