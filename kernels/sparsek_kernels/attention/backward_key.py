# SPDX-License-Identifier: Apache-2.0
"""Backward, key-major: dK, dV, and per key the gate gradients of the queries for which it is in F.

Every (query, key) pair belongs to exactly one of two passes. Cut each sequence into segments of SEGMENT queries (a
multiple of the list tile). At a segment's start the older selected keys are a stored list of at most topk keys:

- survivors pass: one program per (segment, block of that list). The list is sorted by score, and the key with the lower
  score is always evicted first, so it is sorted by eviction too: blocks end early together, and little work is wasted.
  Results go to fp32 partials, one row per (segment, list entry).
- band pass: one program per block of consecutive keys. It covers each key's queries from the key itself to the start of
  the first segment whose list may hold it, then adds that key's partials, segment by segment in order, finding its row by
  binary search in the sorted list, and writes dK and dV once.

Each partial and each output row is written by one program and summed in a fixed order: no atomics, bitwise reproducible.
"""

import torch
import triton
import triton.language as tl

from sparsek_kernels.attention.tile import (
    clamp_gate,
    gated_logits,
    is_fractional,
    logit_gradients,
    sequence_tile,
)


@triton.jit
def _key_step(
    k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, gate, visible, fractional, scale, scale_log2,
    GATE: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of query rows into the gradients of a block of keys; all matrices are [keys, rows].

    visible, gate, fractional broadcast to [keys, rows]; they are ignored when not MASKED, not GATED.
    """
    qk = tl.dot(k, tl.trans(q), input_precision="ieee" if IEEE else None)
    d_output = tl.dot(v, tl.trans(d_out), input_precision="ieee" if IEEE else None)
    if GATED:
        logits = gated_logits(qk, gate, scale_log2, GATE)
    else:
        logits = qk * scale_log2
    weight = tl.math.exp2(logits - lse[None, :])
    if MASKED:
        weight = tl.where(visible, weight, 0.0)
    if GATED:
        d_qk, d_gate = logit_gradients(qk, weight, d_output, delta[None, :], gate, scale, GATE)
        gate_sum += tl.sum(tl.where(fractional, d_gate, 0.0), 1)
        if GATE != 2:
            weight = weight * gate
    else:
        d_qk = weight * (d_output - delta[None, :])
    d_v = tl.dot(weight.to(d_out.dtype), d_out, d_v, input_precision="ieee" if IEEE else None)
    d_k = tl.dot(d_qk.to(q.dtype), q, d_k, input_precision="ieee" if IEEE else None)
    return d_k, d_v, gate_sum


@triton.jit
def _query_rows(
    q_base, do_base, lse_base, delta_base, i, end, tokens, q_token, q_head, do_token, do_head,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """(token, q, d_out, lse, delta) of the rows of the query tile that starts at i; surplus rows get weight 0."""
    row = tl.arange(0, QUERIES * GROUP_PAD)
    token = i + row // GROUP_PAD
    member = row % GROUP_PAD
    ok = (token < end) & (member < GROUP)
    dim = tl.arange(0, D_PAD)[None, :]
    ok_2d = ok[:, None] & (dim < D)
    token64 = token.to(tl.int64)
    q = tl.load(q_base + (token64 * q_token + member * q_head)[:, None] + dim, ok_2d, 0.0)
    d_out = tl.load(do_base + (token64 * do_token + member * do_head)[:, None] + dim, ok_2d, 0.0)
    stat = member.to(tl.int64) * tokens + token
    lse = tl.load(lse_base + stat, mask=ok, other=float("inf"))
    delta = tl.load(delta_base + stat, mask=ok, other=0.0)
    return token, q, d_out, lse, delta


@triton.jit
def attention_backward_survivors_kernel(
    Q, K, V, U, TAU, TAU_LOW, EVICT, LISTS, TILES, D_OUT, LSE, DELTA, PART_K, PART_V, PART_GATE,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    tokens, slots, list_tiles, segments, kv_heads, scale, scale_log2, floor,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr, SEGMENT: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIFORM: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Grid (segments * ceil(TOPK / KEYS), b * hkv). PART_K, PART_V [b * hkv, segments, TOPK, D], PART_GATE without D."""
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    BLOCKS: tl.constexpr = (TOPK + KEYS - 1) // KEYS
    segment = tl.program_id(0) // BLOCKS
    entry = tl.program_id(0) % BLOCKS * KEYS + tl.arange(0, KEYS)
    first, start, end, slot0, list0, _ = sequence_tile(TILES, segment, tokens, SEGMENT, PACKED)
    position = first - start
    count = tl.minimum(tl.maximum(position - WINDOW + 1, 0), TOPK)
    if (first >= end) | (tl.program_id(0) % BLOCKS * KEYS >= count):
        return

    ok = entry < count
    j = tl.load(LISTS + (bh * list_tiles + list0 + position // LIST_TILE) * TOPK + entry, mask=ok, other=0)
    u = tl.load(U + bh * tokens + j)[:, None]
    stop = tl.minimum(first + SEGMENT, end)
    alive = tl.where(ok, tl.minimum(tl.load(EVICT + bh * tokens + j), stop), 0)
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
    for i in tl.range(first, tl.max(alive, 0), QUERIES):
        token, q, d_out, lse, delta = _query_rows(
            q_base, do_base, LSE + stat_base, DELTA + stat_base, i, end, tokens, q_token, q_head, do_token, do_head,
            GROUP, GROUP_PAD, D, D_PAD, QUERIES,
        )  # fmt: skip
        if UNIFORM:
            slot = tau_base + (i - start) // STRIDE
            tau = tl.load(TAU + slot)
            tau_low = tl.load(TAU_LOW + slot)
            visible = (i < alive)[:, None]
        else:
            slot = tau_base + (token - start) // STRIDE
            tau = tl.load(TAU + slot, mask=token < end, other=0.0)[None, :]
            tau_low = tl.load(TAU_LOW + slot, mask=token < end, other=0.0)[None, :]
            visible = token[None, :] < alive[:, None]
        gate = clamp_gate(u, tau, tau_low, floor)
        fractional = is_fractional(u, tau, tau_low)
        d_k, d_v, gate_sum = _key_step(
            k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, gate, visible, fractional, scale, scale_log2,
            GATE, True, True, IEEE,
        )  # fmt: skip

    part = (bh * segments + segment) * TOPK + entry
    ok_2d = ok[:, None] & dim_ok
    tl.store(PART_K + part[:, None] * D + dim, d_k, mask=ok_2d)
    tl.store(PART_V + part[:, None] * D + dim, d_v, mask=ok_2d)
    tl.store(PART_GATE + part, gate_sum, mask=ok)


@triton.jit
def _rank_in_list(entries, u_base, count, u, j, STEPS: tl.constexpr):
    """Place of key (u, j) in a list sorted by (score descending, index ascending): entries strictly before it."""
    lo = j * 0
    hi = lo + count
    for _ in tl.static_range(STEPS):
        mid = (lo + hi) // 2
        open_ = lo < hi
        other = tl.load(entries + mid, mask=open_, other=0)
        other_u = tl.load(u_base + other)
        before = (other_u > u) | ((other_u == u) & (other < j))
        lo = tl.where(open_ & before, mid + 1, lo)
        hi = tl.where(open_ & ~before, mid, hi)
    return lo


@triton.jit
def attention_backward_band_kernel(
    Q, K, V, U, TAU, TAU_LOW, EVICT, LISTS, TILES, D_OUT, LSE, DELTA, PART_K, PART_V, PART_GATE, D_K, D_V, KEY_SUM,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    tokens, slots, list_tiles, segments, kv_heads, scale, scale_log2, floor,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr, SEGMENT: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIFORM: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, b * hkv). D_K, D_V [b, s, hkv, d] contiguous; KEY_SUM [b, hkv, s] fp32."""
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    first, start, end, slot0, list0, segment0 = sequence_tile(TILES, tl.program_id(0), tokens, KEYS, PACKED)
    if first >= end:
        return

    j = first + tl.arange(0, KEYS)
    ok = j < end
    u_base = U + bh * tokens
    u = tl.load(u_base + j, mask=ok, other=0.0)
    alive = tl.load(EVICT + bh * tokens + j, mask=ok, other=0)
    dim = tl.arange(0, D_PAD)[None, :]
    ok_2d = ok[:, None] & (dim < D)
    k = tl.load(K + batch * k_batch + head * k_head + j.to(tl.int64)[:, None] * k_token + dim, ok_2d, 0.0)
    v = tl.load(V + batch * v_batch + head * v_head + j.to(tl.int64)[:, None] * v_token + dim, ok_2d, 0.0)

    first_head = head * GROUP
    q_base = Q + batch * q_batch + first_head * q_head
    do_base = D_OUT + batch * do_batch + first_head * do_head
    stat_base = (batch * kv_heads * GROUP + first_head) * tokens
    tau_base = bh * slots + slot0

    # This pass owns key j's queries before `until`: the start of the first segment whose list may hold the key.
    segment = (j - start + WINDOW + SEGMENT - 1) // SEGMENT
    until = tl.minimum(start + segment * SEGMENT, alive)
    hi = tl.max(until, 0)
    diagonal = tl.minimum(first + KEYS, hi)
    if UNIFORM:
        leave = start + (first - start + WINDOW + STRIDE - 1) // STRIDE * STRIDE  # the first key turns non-local
        inner = tl.maximum(diagonal, tl.minimum(leave, end))
    else:
        diagonal = hi
        inner = hi

    d_k = tl.zeros([KEYS, D_PAD], tl.float32)
    d_v = tl.zeros([KEYS, D_PAD], tl.float32)
    gate_sum = tl.zeros([KEYS], tl.float32)

    for i in tl.range(first, diagonal, QUERIES):
        token, q, d_out, lse, delta = _query_rows(
            q_base, do_base, LSE + stat_base, DELTA + stat_base, i, end, tokens, q_token, q_head, do_token, do_head,
            GROUP, GROUP_PAD, D, D_PAD, QUERIES,
        )  # fmt: skip
        refresh = (token - start) // STRIDE
        tau = tl.load(TAU + tau_base + refresh, mask=token < end, other=0.0)[None, :]
        tau_low = tl.load(TAU_LOW + tau_base + refresh, mask=token < end, other=0.0)[None, :]
        local = j[:, None] > (start + refresh * STRIDE - WINDOW)[None, :]
        visible = (j[:, None] <= token[None, :]) & (token[None, :] < until[:, None])
        gate = tl.where(local, 1.0, clamp_gate(u[:, None], tau, tau_low, floor))
        fractional = is_fractional(u[:, None], tau, tau_low) & ~local
        d_k, d_v, gate_sum = _key_step(
            k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, gate, visible, fractional, scale, scale_log2,
            GATE, True, True, IEEE,
        )  # fmt: skip
    if UNIFORM:
        for i in tl.range(diagonal, inner, QUERIES):
            token, q, d_out, lse, delta = _query_rows(
                q_base, do_base, LSE + stat_base, DELTA + stat_base, i, end, tokens,
                q_token, q_head, do_token, do_head, GROUP, GROUP_PAD, D, D_PAD, QUERIES,
            )  # fmt: skip
            d_k, d_v, gate_sum = _key_step(
                k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, 1.0, True, False, scale, scale_log2,
                GATE, False, False, IEEE,
            )  # fmt: skip
        for i in tl.range(inner, hi, QUERIES):
            token, q, d_out, lse, delta = _query_rows(
                q_base, do_base, LSE + stat_base, DELTA + stat_base, i, end, tokens,
                q_token, q_head, do_token, do_head, GROUP, GROUP_PAD, D, D_PAD, QUERIES,
            )  # fmt: skip
            refresh = (i - start) // STRIDE
            tau = tl.load(TAU + tau_base + refresh)
            tau_low = tl.load(TAU_LOW + tau_base + refresh)
            local = j > start + refresh * STRIDE - WINDOW
            gate = tl.where(local, 1.0, clamp_gate(u, tau, tau_low, floor))[:, None]
            fractional = (is_fractional(u, tau, tau_low) & ~local)[:, None]
            d_k, d_v, gate_sum = _key_step(
                k, v, d_k, d_v, gate_sum, q, d_out, lse, delta, gate, (i < until)[:, None], fractional,
                scale, scale_log2, GATE, True, True, IEEE,
            )  # fmt: skip

    # Partials of the segments whose list held a key of this block, in sequence order.
    last = (tl.max(alive, 0) - start + SEGMENT - 1) // SEGMENT
    for g in tl.range((first - start + WINDOW + SEGMENT - 1) // SEGMENT, last):
        held = ok & (g >= segment) & (alive > start + g * SEGMENT)
        count = tl.minimum(tl.maximum(g * SEGMENT - WINDOW + 1, 0), TOPK)
        entries = LISTS + (bh * list_tiles + list0 + g * (SEGMENT // LIST_TILE)) * TOPK
        rank = _rank_in_list(entries, u_base, count, u, j, SEARCH_STEPS)
        part = (bh * segments + segment0 + g) * TOPK + rank
        held_2d = held[:, None] & (dim < D)
        d_k += tl.load(PART_K + part[:, None] * D + dim, mask=held_2d, other=0.0)
        d_v += tl.load(PART_V + part[:, None] * D + dim, mask=held_2d, other=0.0)
        gate_sum += tl.load(PART_GATE + part, mask=held, other=0.0)

    own = ((batch * tokens + j) * kv_heads + head)[:, None] * D + dim
    tl.store(D_K + own, (d_k * scale).to(D_K.dtype.element_ty), mask=ok_2d)
    tl.store(D_V + own, d_v.to(D_V.dtype.element_ty), mask=ok_2d)
    tl.store(KEY_SUM + bh * tokens + j, gate_sum, mask=ok)


def attention_backward_key(plan, query, key, value, scores, selection, d_out, lse, delta):
    """Launch both passes -> (d_key, d_value [b, s, hkv, d], key_sum [b, hkv, s] fp32)."""
    b, s, _, d = query.shape
    hkv = plan.kv_heads
    allocate = torch.zeros if plan.packed else torch.empty  # rows past the last sequence are never written
    d_key = allocate(key.shape, dtype=key.dtype, device=key.device)
    d_value = allocate(key.shape, dtype=key.dtype, device=key.device)
    key_sum = allocate((b, hkv, s), dtype=torch.float32, device=key.device)
    segment_tiles, segments = plan.query_tiles(plan.segment)
    part_shape = (b * hkv, segments, plan.topk)
    part_k, part_v = (
        torch.empty((*part_shape, d), dtype=torch.float32, device=key.device) for _ in range(2)
    )
    part_gate = torch.empty(part_shape, dtype=torch.float32, device=key.device)
    inputs = (
        query, key, value, scores, selection.threshold, selection.threshold_low, selection.evict, selection.lists,
    )  # fmt: skip
    numbers = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_out.stride()[:3],
        s, selection.threshold.shape[2], selection.lists.shape[2], segments, hkv,
        plan.scale, plan.scale_log2, plan.floor,
    )  # fmt: skip

    tiling = plan.backward_survivors
    blocks = triton.cdiv(plan.topk, tiling.keys)
    attention_backward_survivors_kernel[(segments * blocks, b * hkv)](
        *inputs, segment_tiles, d_out, lse, delta, part_k, part_v, part_gate, *numbers,
        **plan.constants(tiling), SEGMENT=plan.segment, QUERIES=tiling.queries, KEYS=tiling.keys,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    tiling = plan.backward_band
    tiles, grid = plan.query_tiles(tiling.keys)
    attention_backward_band_kernel[(grid, b * hkv)](
        *inputs, tiles, d_out, lse, delta, part_k, part_v, part_gate, d_key, d_value, key_sum, *numbers,
        **plan.constants(tiling), SEGMENT=plan.segment, SEARCH_STEPS=plan.topk.bit_length(),
        QUERIES=tiling.queries, KEYS=tiling.keys,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return d_key, d_value, key_sum
