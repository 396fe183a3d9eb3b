# SPDX-License-Identifier: Apache-2.0
"""What follows the scores of all KV heads: this rank's own heads, batch first, plus the position's share.

    out[i, j, k] = scores[j, i, head_start + k] + slope[head_start + k] * (position[i, j] / L_ref)

One kernel forward and one backward on a GPU; as torch operations these were ten small ones each way, which cost the
host more than the device. Division and sum are each one rounding, so that the same token gets bitwise the same score
in a decoding step, in a shard and in the whole sequence.

Legend: s sequence length, b batch, n KV heads of the model, m those of this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sparsek_kernels.launch import launch
from torch import Tensor

FORWARD_TILE = 1024  # elements
BACKWARD_TILE = 2048


@triton.jit
def _relative_positions(
    positions, length, o_row, m_row, i_batch, stride_batch, stride_row, COUNTED: tl.constexpr
):
    """position / L_ref [rows] in fp32, correctly rounded; COUNTED: the position is the row."""
    if COUNTED:
        b_position = o_row.to(tl.float32)
    else:
        b_position = tl.load(
            positions + i_batch * stride_batch + o_row * stride_row, mask=m_row, other=0
        ).to(tl.float32)
    return tl.div_rn(b_position, tl.load(length).to(tl.float32))


@triton.jit
def _position_scores_kernel(
    scores, slope, length, positions, out, tokens, batch, heads, first, own, stride_batch, stride_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(s / BLOCK_ROWS), b): one program owns BLOCK_ROWS tokens of a row of the batch and their m heads."""
    i_batch = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_col = tl.arange(0, BLOCK_COLUMNS)
    m_row = o_row < tokens
    m_col = o_col < own
    m_tile = m_row[:, None] & m_col[None, :]
    b_relative = _relative_positions(
        positions, length, o_row, m_row, i_batch, stride_batch, stride_row, COUNTED
    )
    b_slope = tl.load(slope + first + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_score = tl.load(
        scores + (o_row[:, None] * batch + i_batch) * heads + first + o_col[None, :], mask=m_tile, other=0.0
    )
    tl.store(
        out + (i_batch * tokens + o_row[:, None]) * own + o_col[None, :],
        tl.fma(b_slope[None, :], b_relative[:, None], b_score),
        mask=m_tile,
    )


def position_scores_triton(
    scores: Tensor, slope: Tensor, length: Tensor, positions: Tensor | None, head_start: int, num_heads: int
) -> Tensor:
    """`position_scores` by the kernel, for scores [s, b, n] fp32, contiguous."""
    tokens, batch, heads = scores.shape
    out = torch.empty(batch, tokens, num_heads, dtype=torch.float32, device=scores.device)
    columns = 1 << (num_heads - 1).bit_length()
    block = max(1, FORWARD_TILE // columns)
    launch(
        _position_scores_kernel,
        (-(-tokens // block), batch),
        (scores, slope, length, positions, out),
        (tokens, batch, heads, head_start, num_heads, *_strides(positions, batch, tokens)),
        {"BLOCK_ROWS": block, "BLOCK_COLUMNS": columns, "COUNTED": positions is None},
    )
    return out


@triton.jit
def _position_scores_backward_kernel(
    d_out, length, positions, d_scores, partials, tokens, batch, heads, first, own, stride_batch, stride_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, COUNTED: tl.constexpr, NEEDS_SCORES: tl.constexpr,
    NEEDS_SLOPE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(s / BLOCK_ROWS), b): one program owns BLOCK_ROWS tokens of a row of the batch and all n heads of their
    d_scores, and their share of d_slope, which it writes to partials [b, grid 0, n] in fp64, summed afterwards in a
    fixed order. Both are zero outside the rank's own heads.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_col = tl.arange(0, BLOCK_COLUMNS)
    m_row = o_row < tokens
    m_col = o_col < heads
    m_own = (o_col >= first) & (o_col < first + own)
    b_d_out = tl.load(
        d_out + (i_batch * tokens + o_row[:, None]) * own + (o_col - first)[None, :],
        mask=m_row[:, None] & m_own[None, :],
        other=0.0,
    )
    if NEEDS_SCORES:
        tl.store(
            d_scores + (o_row[:, None] * batch + i_batch) * heads + o_col[None, :],
            b_d_out,
            mask=m_row[:, None] & m_col[None, :],
        )
    if NEEDS_SLOPE:
        b_relative = _relative_positions(
            positions, length, o_row, m_row, i_batch, stride_batch, stride_row, COUNTED
        )
        tl.store(
            partials + (i_batch * tl.num_programs(0) + tl.program_id(0)) * heads + o_col,
            tl.sum(b_d_out.to(tl.float64) * b_relative.to(tl.float64)[:, None], axis=0),
            mask=m_col,
        )


def position_scores_backward_triton(
    d_out: Tensor,
    length: Tensor,
    positions: Tensor | None,
    head_start: int,
    heads: int,
    slope_dtype: torch.dtype,
    *,
    needs_scores: bool = True,
    needs_slope: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for d_out [b, s, m] fp32, of n = `heads`: (d_scores [s, b, n] fp32, d_slope [n])."""
    batch, tokens, own = d_out.shape
    columns = 1 << (heads - 1).bit_length()
    block = max(1, BACKWARD_TILE // columns)
    grid = (-(-tokens // block), batch)
    d_out = d_out.contiguous()
    d_scores = d_out.new_empty(tokens, batch, heads) if needs_scores else None
    partials = d_out.new_empty(grid[0] * batch, heads, dtype=torch.float64) if needs_slope else None
    launch(
        _position_scores_backward_kernel,
        grid,
        (d_out, length, positions, d_scores, partials),
        (tokens, batch, heads, head_start, own, *_strides(positions, batch, tokens)),
        {
            "BLOCK_ROWS": block,
            "BLOCK_COLUMNS": columns,
            "COUNTED": positions is None,
            "NEEDS_SCORES": needs_scores,
            "NEEDS_SLOPE": needs_slope,
        },
    )
    return d_scores, None if partials is None else partials.sum(0).to(slope_dtype)


def _strides(positions: Tensor | None, batch: int, tokens: int) -> tuple[int, ...]:
    """Of positions [s] or [b, s], as those of [b, s]."""
    return (0, 0) if positions is None else positions.expand(batch, tokens).stride()


def _relative(positions: Tensor | None, length: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """position / L_ref, [s, 1] or [b, s, 1]."""
    if positions is None:
        positions = torch.arange(tokens, device=length.device)
    return (positions.to(dtype) / length)[..., None]


class _PositionScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, scores: Tensor, slope: Tensor, length: Tensor, positions: Tensor | None, start: int, own: int
    ) -> Tensor:
        slope = slope.contiguous()
        ctx.save_for_backward(positions)
        # The buffer is not saved: Megatron's captured layers write its own value over it before backward. Of the slope
        # nothing is needed but what it is like; its storage may be gone by then.
        ctx.length, ctx.start, ctx.heads, ctx.slope_dtype = length, start, slope.shape[0], slope.dtype
        if scores.is_cuda and scores.dtype == torch.float32:
            return position_scores_triton(scores.contiguous(), slope, length, positions, start, own)
        mine = slice(start, start + own)
        term = _relative(positions, length, scores.shape[0], scores.dtype) * slope[mine].to(scores.dtype)
        return (scores[..., mine].transpose(0, 1) + term).contiguous()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        (positions,), length, heads = ctx.saved_tensors, ctx.length, ctx.heads
        needs_scores, needs_slope = ctx.needs_input_grad[:2]
        # With create_graph=True by torch operations, which have second derivatives.
        if d_out.is_cuda and d_out.dtype == torch.float32 and not torch.is_grad_enabled():
            gradients = position_scores_backward_triton(
                d_out, length, positions, ctx.start, heads, ctx.slope_dtype,
                needs_scores=needs_scores, needs_slope=needs_slope,
            )  # fmt: skip
            return *gradients, None, None, None, None
        batch, tokens, own = d_out.shape
        mine = slice(ctx.start, ctx.start + own)
        d_scores = d_slope = None
        if needs_scores:
            d_scores = d_out.new_zeros(tokens, batch, heads)
            d_scores[..., mine] = d_out.transpose(0, 1)
        if needs_slope:
            d_slope = d_out.new_zeros(heads, dtype=ctx.slope_dtype)
            relative = _relative(positions, length, tokens, d_out.dtype).double()
            d_slope[mine] = (d_out * relative).sum((0, 1)).to(ctx.slope_dtype)
        return d_scores, d_slope, None, None, None, None


def position_scores(
    scores: Tensor,
    slope: Tensor,
    reference_length: Tensor,
    positions: Tensor | None,
    *,
    head_start: int,
    num_heads: int,
) -> Tensor:
    """Heads head_start ... head_start + num_heads - 1 of scores [s, b, n] plus slope * position / L_ref: [b, s, m].

    scores fp32 or fp64, whose dtype the result has; slope [n] in any float type; reference_length the int64 scalar
    L_ref on the same device; positions [s] or [b, s], None for 0 ... s - 1. The result is contiguous.

    Differentiable in scores and slope, with zeros for other ranks' heads. The slope's gradient is accumulated in
    fp64: the gradients of scores that share a threshold sum to zero, so that most of it cancels.
    """
    return _PositionScores.apply(scores, slope, reference_length, positions, head_start, num_heads)
