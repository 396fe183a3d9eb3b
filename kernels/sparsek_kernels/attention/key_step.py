# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Device functions of the two key-major backward passes: stream rows of queries into gradients of a key block."""

import triton
import triton.language as tl

from sparsek_kernels.attention.tile import LOGIT, gated_logits, logit_gradients


@triton.jit
def key_step(
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
        if GATE != LOGIT:
            weight = weight * gate
    else:
        d_qk = weight * (d_output - delta[None, :])
    d_v = tl.dot(weight.to(d_out.dtype), d_out, d_v, input_precision="ieee" if IEEE else None)
    d_k = tl.dot(d_qk.to(q.dtype), q, d_k, input_precision="ieee" if IEEE else None)
    return d_k, d_v, gate_sum


@triton.jit
def query_rows(
    q_base, do_base, lse_base, delta_base, i, member, end, tokens, q_token, q_head, do_token, do_head,
    D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """(token, q, d_out, lse, delta) of QUERIES consecutive queries from i of one head of the group.

    Rows past the end of the sequence, and before a call that continues one, are zero and get lse = inf, hence weight 0.
    """
    token = i + tl.arange(0, QUERIES)
    ok = token < end
    if CARRIED > 0:
        ok &= token >= 0
    dim = tl.arange(0, D_PAD)[None, :]
    ok_2d = ok[:, None] & (dim < D)
    row = token.to(tl.int64)
    q = tl.load(q_base + member * q_head + row[:, None] * q_token + dim, ok_2d, 0.0)
    d_out = tl.load(do_base + member * do_head + row[:, None] * do_token + dim, ok_2d, 0.0)
    stat = row + member * tokens
    lse = tl.load(lse_base + stat, mask=ok, other=float("inf"))
    delta = tl.load(delta_base + stat, mask=ok, other=0.0)
    return token, q, d_out, lse, delta
