# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Forward kernels where all queries of a tile share one refresh point (a stride of at least 64 that the tile divides).

Then a listed key has one gate for the whole tile, which `list_gates_kernel` computes; the list needs no eviction test,
the band no gates, and only the last block of either a mask. What is left per (query, key) is the softmax itself.
"""

import triton
import triton.language as tl

from sparsek_kernels.attention.tile import (
    LOGIT,
    absorb,
    clamp_gate,
    gated_logits,
    load_rows,
    load_rows_where,
    sequence_tile,
    store_output,
)


@triton.jit(do_not_specialize=["slots", "list_tiles", "kv_heads"])
def list_gates_kernel(
    U, TAU, TAU_LOW, LISTS, GATES, u_batch, u_token, u_head, slots, list_tiles, kv_heads, floor,
    TOPK: tl.constexpr, TOPK_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (list tiles, b * hkv). GATES [b, hkv, list_tiles, TOPK] fp32: gates of LISTS at the tile's refresh point, 1
    in empty places. With a stride of at least 64, slot t is the refresh point of list tile t."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    entry = tl.arange(0, TOPK_PAD)
    at = (bh * list_tiles + tile) * TOPK + entry
    j = tl.load(LISTS + at, mask=entry < TOPK, other=-1)
    u_base = U + (bh // kv_heads) * u_batch + (bh % kv_heads) * u_head
    u = tl.load(u_base + j.to(tl.int64) * u_token, mask=j >= 0, other=0.0)
    slot = bh * slots + tile
    gate = clamp_gate(u, tl.load(TAU + slot), tl.load(TAU_LOW + slot), floor)
    tl.store(GATES + at, tl.where(j >= 0, gate, 1.0), mask=entry < TOPK)


@triton.jit
def _absorb_scaled(acc, row_max, row_sum, qk, scale_log2, v, IEEE: tl.constexpr):
    """`absorb` of qk * scale_log2 for a scale >= 0: scaling after the maximum saves a product per element."""
    new_max = tl.maximum(row_max, tl.max(qk, 1) * scale_log2)
    weight = tl.math.exp2(qk * scale_log2 - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee" if IEEE else None)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["tokens", "list_tiles", "kv_heads", "past"])
def attention_forward_uniform_kernel(
    Q, K, V, GATES, LISTS, TILES, OUT, LSE,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    tokens, list_tiles, kv_heads, past, scale_log2,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, HEADS_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BAND_KEYS: tl.constexpr, BAND_STAGES: tl.constexpr,
    NEGATIVE: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, b * hkv); arguments as in `attention_forward_kernel`, STRIDE the list tile too.

    NEGATIVE: the softmax scale is -scale_log2 / log2(e); the sign goes into the queries, which is exact.
    """
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    first, start, end, _, list0, _ = sequence_tile(TILES, tl.program_id(0), tokens, QUERIES, PACKED)
    if CARRIED > 0:
        first, start, list0 = first - past % QUERIES, -past, -(past // STRIDE)
    if first >= end:
        return

    ROWS: tl.constexpr = QUERIES * HEADS_PAD
    row = tl.arange(0, ROWS)
    token = first + row // HEADS_PAD
    member = FIRST + row % HEADS_PAD
    row_ok = (token < end) & (member < LAST)
    if CARRIED > 0:
        row_ok &= token >= 0
    dim = tl.arange(0, D_PAD)
    dim_ok = dim < D
    q_rows = Q + batch * q_batch + token.to(tl.int64) * q_token + (head * GROUP + member) * q_head
    q = tl.load(q_rows[:, None] + dim[None, :], mask=row_ok[:, None] & dim_ok[None, :], other=0.0)
    if NEGATIVE:
        q = -q
    k_base = K + batch * k_batch + head * k_head
    v_base = V + batch * v_batch + head * v_head

    position = first - start
    if CARRIED > 0:
        position = tl.maximum(position, past)
    tile = position // STRIDE
    base = tile * STRIDE  # position of the refresh point of all queries of the tile
    list_at = (bh * list_tiles + list0 + tile) * TOPK
    list_base = LISTS + list_at
    gate_base = GATES + list_at
    count = tl.minimum(tl.maximum(base - WINDOW + 1, 0), TOPK)

    row_max = tl.full([ROWS], -1e30, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)

    # Selected keys, gathered in full blocks. Indices are loaded one block ahead, so that the gathers can be pipelined.
    lane = tl.arange(0, KEYS)
    full = count // KEYS * KEYS
    ahead = tl.load(list_base + lane, mask=lane < TOPK, other=0)
    for n in tl.range(0, full, KEYS):
        j = ahead.to(tl.int64)
        ahead = tl.load(list_base + tl.minimum(n + KEYS, full - KEYS) + lane)
        k = load_rows(k_base, j * k_token, dim, D, D_PAD)
        gate = tl.load(gate_base + n + lane)[None, :]
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        v = load_rows(v_base, j * v_token, dim, D, D_PAD)
        logits = gated_logits(qk, gate, scale_log2, GATE)
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, logits, gate, v, GATE != LOGIT, IEEE)
    TAIL: tl.constexpr = 32 if KEYS > 32 else KEYS
    tail = tl.arange(0, TAIL)
    for n in tl.range(full, count, TAIL, num_stages=1):
        ok = n + tail < count
        j = tl.load(list_base + n + tail, mask=ok, other=0).to(tl.int64)
        gate = tl.load(gate_base + n + tail, mask=ok, other=1.0)[None, :]
        k = load_rows_where(ok, k_base, j * k_token, dim, D)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        logits = tl.where(ok[None, :], gated_logits(qk, gate, scale_log2, GATE), float("-inf"))
        v = load_rows_where(ok, v_base, j * v_token, dim, D)
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, logits, gate, v, GATE != LOGIT, IEEE)

    # The band: [lo, mid) is seen by all queries of the tile, [mid, hi) crosses the diagonal or the end of the sequence.
    lo = start + tl.maximum(base - WINDOW + 1, 0)
    hi = tl.minimum(first + QUERIES, end)
    mid = lo + tl.maximum(first - lo + 1, 0) // BAND_KEYS * BAND_KEYS
    band = tl.arange(0, BAND_KEYS)
    for n in tl.range(lo, mid, BAND_KEYS, num_stages=BAND_STAGES):
        j = (CARRIED + n + band).to(tl.int64)
        k = load_rows(k_base, j * k_token, dim, D, D_PAD)
        v = load_rows(v_base, j * v_token, dim, D, D_PAD)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        acc, row_max, row_sum = _absorb_scaled(acc, row_max, row_sum, qk, scale_log2, v, IEEE)
    for n in tl.range(mid, hi, TAIL, num_stages=1):
        ok = n + tail < hi
        j = (CARRIED + n + tail).to(tl.int64)
        k = load_rows_where(ok, k_base, j * k_token, dim, D)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        visible = ((n + tail)[None, :] <= token[:, None]) & ok[None, :]
        logits = tl.where(visible, qk * scale_log2, float("-inf"))
        v = load_rows_where(ok, v_base, j * v_token, dim, D)
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, logits, 1.0, v, False, IEEE)

    store_output(
        OUT, LSE, acc, row_max, row_sum, batch, token, head * GROUP + member, row_ok, tokens, kv_heads * GROUP,
        D, D_PAD,
    )  # fmt: skip
