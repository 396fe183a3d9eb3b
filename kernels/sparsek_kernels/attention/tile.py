# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by the attention kernels: which queries a program owns, gates, and the softmax of a block.

Coordinates: a query has an index i in 0 ... s - 1 of this call. Packed sequences start at `start` and end before `end`;
positions count from `start`, refresh points and list tiles restart there.

Rows of a query tile pack query heads of one group, FIRST ... LAST - 1 (`plan.Part`): row m is query `first + m //
HEADS_PAD`, head `FIRST + m % HEADS_PAD`. HEADS_PAD: their number, rounded up to a power of two; the rest is masked.
"""

import triton
import triton.language as tl

KEY_VALUE: tl.constexpr = tl.constexpr(0)
VALUE: tl.constexpr = tl.constexpr(1)
LOGIT: tl.constexpr = tl.constexpr(2)
GATE_CODE = {"key_value": 0, "value": 1, "logit": 2}


@triton.jit
def sequence_tile(TILES, index, tokens, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """(first, start, end, slot0, list0, segment0) of tile `index` of SIZE tokens.

    first: first token of the tile; start, end: its sequence; slot0, list0, segment0: the first refresh slot, list tile
    and backward segment of that sequence. TILES int32 [tiles, 6] holds these when PACKED; `first >= end` marks an
    unused tile.
    """
    if PACKED:
        row = TILES + index * 6
        a, b, c = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        return a, b, c, tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    return index * SIZE, 0, tokens, 0, 0, 0


@triton.jit
def clamp_gate(u, tau, tau_low, floor):
    """clamp(u - tau, floor, 1): the SparseK gate; tau = -inf (a pool not yet full) gives 1."""
    return tl.minimum(tl.maximum((u - tau) - tau_low, floor), 1.0)


@triton.jit
def is_fractional(u, tau, tau_low):
    """Membership in F, decided as `clamp_gate` computes: both backward passes must agree to the bit."""
    x = (u - tau) - tau_low
    return (x > 0.0) & (x < 1.0)


@triton.jit
def gated_logits(qk, gate, scale_log2, GATE: tl.constexpr):
    """Logits in units of log 2 from dot products and gates (broadcastable)."""
    if GATE == KEY_VALUE:
        return qk * (gate * scale_log2)
    elif GATE == LOGIT:
        return qk * scale_log2 + tl.log2(gate)
    else:
        return qk * scale_log2


@triton.jit
def load_rows(base, offset, dim, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows [keys, D_PAD] of K or V at `offset` elements from `base`; no mask where D needs no padding."""
    if D == D_PAD:
        return tl.load(base + offset[:, None] + dim[None, :])
    else:
        return tl.load(base + offset[:, None] + dim[None, :], mask=(dim < D)[None, :], other=0.0)


@triton.jit
def load_rows_where(ok, base, offset, dim, D: tl.constexpr):
    """`load_rows` of the rows that are `ok`, zeros elsewhere."""
    return tl.load(base + offset[:, None] + dim[None, :], mask=ok[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def absorb(acc, row_max, row_sum, logits, gate, v, GATED: tl.constexpr, IEEE: tl.constexpr):
    """Online softmax: one block of logits [rows, keys] and its values [keys, d] into the running state. GATED: the gate
    is on the values too."""
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    weight = tl.math.exp2(logits - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weight, 1)
    if GATED:
        weight = weight * gate
    acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee" if IEEE else None)
    return acc, new_max, row_sum


@triton.jit
def store_output(
    OUT, LSE, acc, row_max, row_sum, batch, token, query_head, row_ok, tokens, heads,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """End of the online softmax: rows [rows, D_PAD] of OUT [b, s, hq, D] and their LSE [b, hq, s], where `row_ok`."""
    dim = tl.arange(0, D_PAD)
    out_rows = OUT + ((batch * tokens + token) * heads + query_head) * D
    ok = row_ok[:, None] & (dim < D)[None, :]
    tl.store(out_rows[:, None] + dim[None, :], (acc / row_sum[:, None]).to(OUT.dtype.element_ty), mask=ok)
    tl.store(LSE + (batch * heads + query_head) * tokens + token, row_max + tl.log2(row_sum), mask=row_ok)


@triton.jit
def logit_gradients(qk, weight, d_output, delta, gate, scale, GATE: tl.constexpr):
    """Backward of one block: (gradient of the dot products divided by `scale`, gradient of the gates).

    weight: softmax weights; d_output: dO . v; delta: dO . O of the row. All broadcastable to qk.
    With l the logit and o = sum softmax * m * v:  dl = weight * (m * dov - delta), and per placement
    key_value l = scale * m * qk: dqk = scale * m * dl, dm = weight * dov + scale * qk * dl;
    value     l = scale * qk:     dqk = scale * dl,     dm = weight * dov;
    logit     l = scale * qk + log m, o = sum softmax * v: dl = weight * (dov - delta), dqk = scale * dl, dm = dl / m.
    """
    if GATE == KEY_VALUE:
        d_logit = weight * (gate * d_output - delta)
        return d_logit * gate, weight * d_output + d_logit * (qk * scale)
    elif GATE == VALUE:
        d_logit = weight * (gate * d_output - delta)
        return d_logit, weight * d_output
    else:
        d_logit = weight * (d_output - delta)
        return d_logit, d_logit / gate
