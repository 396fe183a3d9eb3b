# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Forward kernel: one program per (tile of queries x a part of their query-head group, key/value head).

A program gathers the K/V rows of the keys selected at its list tile's start, then streams the contiguous band
from `window` before that point to its last query. Nothing else can be attended (kernels/README.md, fact 3), and
each row of the output is owned by one program, so no atomics are needed and results are bitwise reproducible.

This is the kernel of any stride: gates and the eviction test `i < evict_j` per (query, key). Where all queries of a
tile share one refresh point, `forward_uniform.py` has less to do.
"""

import torch
import triton
import triton.language as tl

from sparsek_kernels.attention.forward_uniform import attention_forward_uniform_kernel, list_gates_kernel
from sparsek_kernels.attention.plan import AttentionPlan, Part
from sparsek_kernels.attention.tile import (
    LOGIT,
    absorb,
    clamp_gate,
    gated_logits,
    sequence_tile,
    store_output,
)
from sparsek_kernels.launch import Launch, Named
from sparsek_kernels.selection.plan import power_of_2


@triton.jit(do_not_specialize=["tokens", "slots", "list_tiles", "kv_heads", "past"])
def attention_forward_kernel(
    Q, K, V, U, TAU, TAU_LOW, EVICT, LISTS, TILES, OUT, LSE,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, u_batch, u_token, u_head,
    tokens, slots, list_tiles, kv_heads, past, scale_log2, floor,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr,
    GATE: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, HEADS_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, IEEE: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, b * hkv). U [b, hkv, s] by its strides; EVICT [b, hkv, s]; TAU, TAU_LOW [b, hkv, slots];
    LISTS [b, hkv, list_tiles, TOPK].

    OUT [b, s, hq, d] contiguous; LSE [b, hq, s] fp32, log2 of the softmax denominator including its maximum.
    A launch does the query heads FIRST ... LAST - 1 of every group (`plan.Part`).
    CARRIED keys precede this call's tokens in K, V, U, EVICT and LISTS, and `past` tokens precede them in the sequence
    (`selection.types`, with a state); tiles then keep to positions, so the first one may start before this call.
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
    token_ok = (token < end) & (token >= 0)
    row_ok = token_ok & (member < LAST)
    dim = tl.arange(0, D_PAD)
    dim_ok = dim < D
    q_rows = Q + batch * q_batch + token.to(tl.int64) * q_token + (head * GROUP + member) * q_head
    q = tl.load(q_rows[:, None] + dim[None, :], mask=row_ok[:, None] & dim_ok[None, :], other=0.0)

    k_base = K + batch * k_batch + head * k_head + dim[None, :]
    v_base = V + batch * v_batch + head * v_head + dim[None, :]
    u_base = U + batch * u_batch + head * u_head
    evict_base = EVICT + bh * (CARRIED + tokens)

    position = first - start
    if CARRIED > 0:
        position = tl.maximum(position, past)
    tile = position // LIST_TILE
    base = tile * LIST_TILE  # position of the list tile's start, a refresh point
    if CARRIED > 0:
        base = tl.maximum(base, past // STRIDE * STRIDE)  # the first list was taken when this call began
    list_base = LISTS + (bh * list_tiles + list0 + tile) * TOPK
    count = tl.minimum(tl.maximum(base - WINDOW + 1, 0), TOPK)
    refresh = (token - start) // STRIDE
    slot = bh * slots + slot0 + refresh
    tau = tl.load(TAU + slot, mask=token_ok, other=0.0)[:, None]
    tau_low = tl.load(TAU_LOW + slot, mask=token_ok, other=0.0)[:, None]
    local_from = (start + refresh * STRIDE - WINDOW + 1)[:, None]

    row_max = tl.full([ROWS], -1e30, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    lane = tl.arange(0, KEYS)

    # Selected keys, gathered. Indices are loaded one block ahead, so the gathers themselves can be pipelined.
    ahead = tl.load(list_base + lane, mask=lane < count, other=0)
    for n in tl.range(0, count, KEYS):
        j = ahead
        ok = n + lane < count
        ahead = tl.load(list_base + n + KEYS + lane, mask=n + KEYS + lane < count, other=0)
        offset = j.to(tl.int64)
        k = tl.load(k_base + offset[:, None] * k_token, mask=dim_ok[None, :], other=0.0)
        u = tl.load(u_base + offset * u_token)
        if CARRIED > 0:
            u = tl.where(ok, u, 0.0)  # an empty place of the carried pool has score -inf
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        gate = clamp_gate(u[None, :], tau, tau_low, floor)
        logits = gated_logits(qk, gate, scale_log2, GATE)
        alive = tl.load(evict_base + j)
        logits = tl.where(ok[None, :] & (token[:, None] < alive[None, :]), logits, float("-inf"))
        v = tl.load(v_base + offset[:, None] * v_token, mask=dim_ok[None, :], other=0.0)
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, logits, gate, v, GATE != LOGIT, IEEE)

    # The band: up to the last query's own key, gated where it has left that query's window.
    lo = start + tl.maximum(base - WINDOW + 1, 0)
    hi = tl.minimum(first + QUERIES, end)
    for n in tl.range(lo, hi, KEYS):
        j = n + lane
        ok = j < hi
        offset = (CARRIED + j).to(tl.int64)
        k = tl.load(k_base + offset[:, None] * k_token, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        u = tl.load(u_base + offset * u_token, mask=ok, other=0.0)
        alive = tl.load(evict_base + CARRIED + j, mask=ok, other=0)
        gate = clamp_gate(u[None, :], tau, tau_low, floor)
        gate = tl.where(j[None, :] >= local_from, 1.0, gate)
        visible = (j[None, :] <= token[:, None]) & ok[None, :] & (token[:, None] < alive[None, :])
        logits = tl.where(visible, gated_logits(qk, gate, scale_log2, GATE), float("-inf"))
        v = tl.load(v_base + offset[:, None] * v_token, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, logits, gate, v, GATE != LOGIT, IEEE)

    store_output(
        OUT, LSE, acc, row_max, row_sum, batch, token, head * GROUP + member, row_ok, tokens, kv_heads * GROUP,
        D, D_PAD,
    )  # fmt: skip


def attention_forward(plan: AttentionPlan, query, key, value, scores, selection) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch: scores [b, hkv, s], any strides -> out [b, s, hq, d], lse [b, hq, s]. Sizes from `plan.plan_for`."""
    b, s, hq, d = query.shape
    allocate = torch.zeros if plan.packed else torch.empty  # rows past the last sequence are never written
    out = allocate((b, s, hq, d), dtype=query.dtype, device=query.device)
    lse = allocate((b, hq, s), dtype=torch.float32, device=query.device)
    lists = selection.lists
    buffers = {
        "query": query, "key": key, "value": value, "scores": scores, "tau": selection.threshold,
        "tau_low": selection.threshold_low, "evict": selection.evict, "lists": lists, "out": out, "lse": lse,
    }  # fmt: skip
    for n, part in enumerate(plan.parts):
        buffers[f"tiles{n}"] = plan.tiles(part.forward.queries, selection.cu_seqlens)
    if any(plan.uniform(part.forward) for part in plan.parts):
        buffers["gates"] = torch.empty(lists.shape, dtype=torch.float32, device=query.device)
    plan.run(_launches, buffers)
    return out, lse


def _launches(plan: AttentionPlan, x: Named) -> list[Launch]:
    slots, list_tiles = x["tau"].shape[2], x["lists"].shape[2]
    rows = plan.batch * plan.kv_heads
    strides = (*x["query"].stride()[:3], *x["key"].stride()[:3], *x["value"].stride()[:3])
    u_strides = (x["scores"].stride(0), x["scores"].stride(2), x["scores"].stride(1))

    def launch(n: int, part: Part) -> Launch:
        tiling, tiles = part.forward, f"tiles{n}"
        grid = (plan.num_tiles(tiling.queries), rows)
        constants = {**plan.constants(tiling), **part.launch, **tiling.launch, "CARRIED": plan.carried}
        if not constants.pop("UNIFORM"):
            tensors = (
                "query", "key", "value", "scores", "tau", "tau_low", "evict", "lists", tiles, "out", "lse"
            )  # fmt: skip
            numbers = (plan.tokens, slots, list_tiles, plan.kv_heads, plan.past, plan.scale_log2, plan.floor)
            return Launch(attention_forward_kernel, grid, (*tensors, *strides, *u_strides, *numbers), constants)
        del constants["LIST_TILE"]
        band_keys, band_stages = tiling.band or (tiling.keys, tiling.num_stages)
        constants.update(NEGATIVE=plan.scale_log2 < 0, BAND_KEYS=band_keys, BAND_STAGES=band_stages)
        return Launch(
            attention_forward_uniform_kernel,
            grid,
            (
                "query", "key", "value", "gates", "lists", tiles, "out", "lse",
                *strides, plan.tokens, list_tiles, plan.kv_heads, plan.past, abs(plan.scale_log2),
            ),
            constants,
        )  # fmt: skip

    launches = [launch(n, part) for n, part in enumerate(plan.parts)]
    if "gates" not in x:
        return launches
    gates = Launch(
        list_gates_kernel,
        (list_tiles, rows),
        (
            "scores", "tau", "tau_low", "lists", "gates",
            *u_strides, slots, list_tiles, plan.kv_heads, plan.floor,
        ),
        {"TOPK": plan.topk, "TOPK_PAD": power_of_2(plan.topk)},
    )  # fmt: skip
    return [gates, *launches]
