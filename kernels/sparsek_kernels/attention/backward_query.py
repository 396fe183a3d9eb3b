# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Backward, query-major: dQ, delta = rowsum(dO * O), and per query the gate gradients of its keys in F.

Same tiles and key order as the forward kernel; the probabilities are recomputed from LSE. Each row of dQ is
owned by one program, so no atomics. `query_sum` is the sum over the keys of F, and over the query heads of the
group, of dL/dm; it feeds the mean over F of the score gradient (`sparsek_kernels.selection.score_gradient`).
"""

import torch
import triton
import triton.language as tl

from sparsek_kernels.attention.plan import AttentionPlan, Part
from sparsek_kernels.attention.tile import (
    clamp_gate,
    gated_logits,
    is_fractional,
    logit_gradients,
    sequence_tile,
)
from sparsek_kernels.launch import Launch, Named


@triton.jit
def attention_backward_query_kernel(
    Q, K, V, U, TAU, TAU_LOW, EVICT, LISTS, TILES, OUT, D_OUT, LSE, D_Q, DELTA, QUERY_SUM,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    tokens, slots, list_tiles, kv_heads, past, scale, scale_log2, floor,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, HEADS_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIFORM: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr,
    CARRIED: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, b * hkv). OUT, D_Q [b, s, hq, d] contiguous; DELTA [b, hq, s]; QUERY_SUM [b, hkv, s].

    FIRST, LAST, CARRIED, past: as in the forward kernel. The launch with FIRST > 0 adds to QUERY_SUM.
    """
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    first, start, end, slot0, list0, _ = sequence_tile(TILES, tl.program_id(0), tokens, QUERIES, PACKED)
    if CARRIED > 0:
        first -= past % QUERIES
        start, slot0, list0 = -past, -(past // STRIDE), -(past // LIST_TILE)
    if first >= end:
        return

    ROWS: tl.constexpr = QUERIES * HEADS_PAD
    row = tl.arange(0, ROWS)
    token = first + row // HEADS_PAD
    member = FIRST + row % HEADS_PAD
    token_ok = token < end
    if CARRIED > 0:
        token_ok &= token >= 0
    row_ok = token_ok & (member < LAST)
    dim = tl.arange(0, D_PAD)
    dim_ok = dim < D
    ok_2d = row_ok[:, None] & dim_ok[None, :]
    query_head = head * GROUP + member
    token64 = token.to(tl.int64)
    q = tl.load(
        (Q + batch * q_batch + token64 * q_token + query_head * q_head)[:, None] + dim[None, :], ok_2d, 0.0
    )
    d_out_rows = D_OUT + batch * do_batch + token64 * do_token + query_head * do_head
    d_out = tl.load(d_out_rows[:, None] + dim[None, :], ok_2d, 0.0)
    own_rows = ((batch * tokens + token) * (kv_heads * GROUP) + query_head) * D
    out = tl.load(OUT + own_rows[:, None] + dim[None, :], ok_2d, 0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    stat_rows = (batch * (kv_heads * GROUP) + query_head) * tokens + token
    tl.store(DELTA + stat_rows, delta, mask=row_ok)
    lse = tl.load(LSE + stat_rows, mask=row_ok, other=float("inf"))  # inf: surplus rows get weight 0
    delta = delta[:, None]

    k_base = K + batch * k_batch + head * k_head + dim[None, :]
    v_base = V + batch * v_batch + head * v_head + dim[None, :]
    u_base = U + bh * (CARRIED + tokens)
    evict_base = EVICT + bh * (CARRIED + tokens)

    position = first - start
    if CARRIED > 0:
        position = tl.maximum(position, past)
    tile = position // LIST_TILE
    base = tile * LIST_TILE
    if CARRIED > 0:
        base = tl.maximum(base, past // STRIDE * STRIDE)
    list_base = LISTS + (bh * list_tiles + list0 + tile) * TOPK
    count = tl.minimum(tl.maximum(base - WINDOW + 1, 0), TOPK)
    if UNIFORM:
        slot = bh * slots + slot0 + position // STRIDE
        tau = tl.load(TAU + slot)
        tau_low = tl.load(TAU_LOW + slot)
    else:
        refresh = (token - start) // STRIDE
        slot = bh * slots + slot0 + refresh
        tau = tl.load(TAU + slot, mask=token_ok, other=0.0)[:, None]
        tau_low = tl.load(TAU_LOW + slot, mask=token_ok, other=0.0)[:, None]
        local_from = (start + refresh * STRIDE - WINDOW + 1)[:, None]

    d_q = tl.zeros([ROWS, D_PAD], tl.float32)
    gate_sum = tl.zeros([ROWS], tl.float32)
    lane = tl.arange(0, KEYS)

    ahead = tl.load(
        list_base + lane, mask=lane < count, other=0
    )  # one block ahead: the gathers can be pipelined
    for n in tl.range(0, count, KEYS):
        j = ahead
        ok = n + lane < count
        ahead = tl.load(list_base + n + KEYS + lane, mask=n + KEYS + lane < count, other=0)
        offset = j.to(tl.int64)[:, None]
        k = tl.load(k_base + offset * k_token, mask=dim_ok[None, :], other=0.0)
        v = tl.load(v_base + offset * v_token, mask=dim_ok[None, :], other=0.0)
        u = tl.load(u_base + j)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        gate = clamp_gate(u[None, :], tau, tau_low, floor)
        logits = gated_logits(qk, gate, scale_log2, GATE)
        if UNIFORM:
            visible = ok[None, :]
        else:
            alive = tl.load(evict_base + j)
            visible = ok[None, :] & (token[:, None] < alive[None, :])
        weight = tl.where(visible, tl.math.exp2(logits - lse[:, None]), 0.0)
        d_output = tl.dot(d_out, tl.trans(v), input_precision="ieee" if IEEE else None)
        d_qk, d_gate = logit_gradients(qk, weight, d_output, delta, gate, scale, GATE)
        d_q = tl.dot(d_qk.to(k.dtype), k, d_q, input_precision="ieee" if IEEE else None)
        gate_sum += tl.sum(tl.where(is_fractional(u[None, :], tau, tau_low), d_gate, 0.0), 1)

    lo = start + tl.maximum(base - WINDOW + 1, 0)
    hi = tl.minimum(first + QUERIES, end)
    if UNIFORM:
        mid = lo + tl.maximum(first - lo + 1, 0) // KEYS * KEYS
        for n in tl.range(lo, mid, KEYS):
            offset = (CARRIED + n + lane).to(tl.int64)[:, None]
            k = tl.load(k_base + offset * k_token, mask=dim_ok[None, :], other=0.0)
            v = tl.load(v_base + offset * v_token, mask=dim_ok[None, :], other=0.0)
            qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
            weight = tl.math.exp2(qk * scale_log2 - lse[:, None])
            d_output = tl.dot(d_out, tl.trans(v), input_precision="ieee" if IEEE else None)
            d_qk = weight * (d_output - delta)
            d_q = tl.dot(d_qk.to(k.dtype), k, d_q, input_precision="ieee" if IEEE else None)
    else:
        mid = lo
    for n in tl.range(mid, hi, KEYS):
        j = n + lane
        ok = j < hi
        offset = (CARRIED + j).to(tl.int64)[:, None]
        k = tl.load(k_base + offset * k_token, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        v = tl.load(v_base + offset * v_token, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        d_output = tl.dot(d_out, tl.trans(v), input_precision="ieee" if IEEE else None)
        visible = (j[None, :] <= token[:, None]) & ok[None, :]
        if UNIFORM:
            weight = tl.where(visible, tl.math.exp2(qk * scale_log2 - lse[:, None]), 0.0)
            d_qk = weight * (d_output - delta)
        else:
            u = tl.load(u_base + CARRIED + j, mask=ok, other=0.0)
            alive = tl.load(evict_base + CARRIED + j, mask=ok, other=0)
            local = j[None, :] >= local_from
            gate = tl.where(local, 1.0, clamp_gate(u[None, :], tau, tau_low, floor))
            logits = gated_logits(qk, gate, scale_log2, GATE)
            visible &= token[:, None] < alive[None, :]
            weight = tl.where(visible, tl.math.exp2(logits - lse[:, None]), 0.0)
            d_qk, d_gate = logit_gradients(qk, weight, d_output, delta, gate, scale, GATE)
            fractional = is_fractional(u[None, :], tau, tau_low) & ~local
            gate_sum += tl.sum(tl.where(fractional, d_gate, 0.0), 1)
        d_q = tl.dot(d_qk.to(k.dtype), k, d_q, input_precision="ieee" if IEEE else None)

    tl.store(D_Q + own_rows[:, None] + dim[None, :], (d_q * scale).to(D_Q.dtype.element_ty), mask=ok_2d)
    gate_sum = tl.sum(tl.reshape(gate_sum, [QUERIES, HEADS_PAD]), 1)
    own_token = first + tl.arange(0, QUERIES)
    own_ok = own_token < end
    if CARRIED > 0:
        own_ok &= own_token >= 0
    own_sum = QUERY_SUM + bh * tokens + own_token
    if FIRST > 0:
        gate_sum += tl.load(own_sum, mask=own_ok, other=0.0)
    tl.store(own_sum, gate_sum, mask=own_ok)


def attention_backward_query(plan: AttentionPlan, query, key, value, scores, selection, out, d_out, lse):
    """Launch -> (d_query [b, s, hq, d], delta [b, hq, s] fp32, query_sum [b, hkv, s] fp32)."""
    b, s, hq, _ = query.shape
    allocate = torch.zeros if plan.packed else torch.empty  # rows past the last sequence are never written
    d_query = allocate(query.shape, dtype=query.dtype, device=query.device)
    delta = allocate((b, hq, s), dtype=torch.float32, device=query.device)
    query_sum = allocate((b, plan.kv_heads, s), dtype=torch.float32, device=query.device)
    buffers = {
        "query": query, "key": key, "value": value, "scores": scores, "tau": selection.threshold,
        "tau_low": selection.threshold_low, "evict": selection.evict, "lists": selection.lists,
        "out": out, "d_out": d_out, "lse": lse, "d_query": d_query, "delta": delta, "query_sum": query_sum,
    }  # fmt: skip
    for n, part in enumerate(plan.parts):
        buffers[f"tiles{n}"] = plan.tiles(part.backward_query.queries, selection.cu_seqlens)
    plan.run(_launches, buffers)
    return d_query, delta, query_sum


def _launches(plan: AttentionPlan, x: Named) -> list[Launch]:
    strides = [stride for name in ("query", "key", "value", "d_out") for stride in x[name].stride()[:3]]
    numbers = (
        plan.tokens, x["tau"].shape[2], x["lists"].shape[2], plan.kv_heads, plan.past,
        plan.scale, plan.scale_log2, plan.floor,
    )  # fmt: skip

    def launch(n: int, part: Part) -> Launch:
        tensors = (
            "query", "key", "value", "scores", "tau", "tau_low", "evict", "lists", f"tiles{n}", "out", "d_out", "lse",
            "d_query", "delta", "query_sum",
        )  # fmt: skip
        tiling = part.backward_query
        constants = {**plan.constants(tiling), **part.launch, "CARRIED": plan.carried, **tiling.launch}
        grid = (plan.num_tiles(tiling.queries), plan.batch * plan.kv_heads)
        return Launch(attention_backward_query_kernel, grid, (*tensors, *strides, *numbers), constants)

    return [launch(n, part) for n, part in enumerate(plan.parts)]
