# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Kernels of one decoding step: each row's newest token attends to the rows of its cache.

`cache_decode_kernel` streams a piece of the rows of one (row, KV head) for the whole query-head group at once. Where
one piece per pair would not fill the chip the rows are split, and `cache_combine_kernel` adds the pieces in a fixed
order. Every output and every partial is written by one program: no atomics, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsek_kernels.attention.tile import LOGIT, clamp_gate, gated_logits


@triton.jit
def cache_decode_kernel(
    Q, KEY, VALUE, SCORE, THRESHOLD, LENGTH, OUT, PARTIAL, STATISTICS,
    q_batch, q_head, kv_heads, scale_log2, floor,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, GATE: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    SPLITS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, b * hkv); a program owns PIECE rows. Q [b, hq, d] strided; caches as in `layout.Buffers`.

    SPLITS == 1: OUT [b, hq, d]. Else PARTIAL [b, hq, SPLITS, d] fp32, unnormalised, and STATISTICS [b, hq, 2, SPLITS]
    fp32: the maximum logit (in log2 units) and the sum of weights relative to it.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    RING: tl.constexpr = WINDOW + STRIDE
    ROWS: tl.constexpr = TOPK + RING
    position = tl.load(LENGTH + pair) - 1
    local_from = tl.maximum(position // STRIDE * STRIDE - WINDOW + 1, 0)
    tau = tl.load(THRESHOLD + pair * 2)
    tau_low = tl.load(THRESHOLD + pair * 2 + 1)

    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, D_PAD)
    q_ok = (member < GROUP)[:, None] & (dim < D)[None, :]
    q_rows = Q + batch * q_batch + (head * GROUP + member) * q_head
    q = tl.load(q_rows[:, None] + dim[None, :], mask=q_ok, other=0.0)

    row_max = tl.full([GROUP_PAD], -1e30, tl.float32)
    row_sum = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    lane = tl.arange(0, BLOCK)
    key = KEY + pair * ROWS * D + dim[None, :]
    value = VALUE + pair * ROWS * D + dim[None, :]
    score = SCORE + pair * ROWS
    for n in tl.range(split * PIECE, tl.minimum(split * PIECE + PIECE, ROWS), BLOCK):
        row = n + lane
        selected = row < TOPK
        recent = (
            position - (position + RING - (row - TOPK)) % RING
        )  # the position that lives in a place of the ring
        read = (selected | (recent >= local_from)) & (row < ROWS)
        mask = read[:, None] & (dim < D)[None, :]
        k = tl.load(key + row[:, None] * D, mask=mask, other=0.0)
        u = tl.load(score + row, mask=selected, other=0.0)
        v = tl.load(value + row[:, None] * D, mask=mask, other=0.0)
        present = u > float("-inf")
        gate = tl.where(selected & present, clamp_gate(tl.where(present, u, 0.0), tau, tau_low, floor), 1.0)[
            None, :
        ]
        qk = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
        logits = tl.where((read & present)[None, :], gated_logits(qk, gate, scale_log2, GATE), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weight = tl.math.exp2(logits - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weight, 1)
        if GATE != LOGIT:
            weight = weight * gate
        acc = acc * rescale[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee" if IEEE else None)
        row_max = new_max

    out_row = (batch * kv_heads + head) * GROUP + member  # row of [b * hq]
    if SPLITS == 1:
        acc = acc / row_sum[:, None]
        tl.store(OUT + out_row[:, None] * D + dim[None, :], acc.to(OUT.dtype.element_ty), mask=q_ok)
    else:
        tl.store(PARTIAL + (out_row[:, None] * SPLITS + split) * D + dim[None, :], acc, mask=q_ok)
        tl.store(STATISTICS + out_row * (2 * SPLITS) + split, row_max, mask=member < GROUP)
        tl.store(STATISTICS + out_row * (2 * SPLITS) + SPLITS + split, row_sum, mask=member < GROUP)


@triton.jit
def cache_combine_kernel(
    PARTIAL, STATISTICS, OUT,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (b * hq): OUT [b, hq, d] from the pieces of `cache_decode_kernel`; one without keys has maximum -1e30."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PAD)
    dim = tl.arange(0, D_PAD)
    row_max = tl.load(STATISTICS + row * (2 * SPLITS) + split, mask=split < SPLITS, other=-1e30)
    row_sum = tl.load(STATISTICS + row * (2 * SPLITS) + SPLITS + split, mask=split < SPLITS, other=0.0)
    weight = tl.math.exp2(row_max - tl.max(row_max, 0))
    mask = (split < SPLITS)[:, None] & (dim < D)[None, :]
    part = tl.load(PARTIAL + (row * SPLITS + split[:, None]) * D + dim[None, :], mask=mask, other=0.0)
    acc = tl.sum(part * weight[:, None], 0) / tl.sum(row_sum * weight, 0)
    tl.store(OUT + row * D + dim, acc.to(OUT.dtype.element_ty), mask=dim < D)
