# SPDX-License-Identifier: Apache-2.0
"""x @ w with few output columns, in fp32, where a row's result does not depend on the other rows.

Selection is discontinuous, so the same token must get bitwise the same score whatever shard or chunk it
arrives in (tensor parallel sizes, recompute, chunked prefill). A library matmul picks its reduction order by
shape and does not promise that; here every row is reduced in one fixed order.

The backward pass is one kernel on a GPU: it reads x once and writes dx once, in x's own dtype. Gradients of scores are
fp32, and bfloat16 products would lose 16 of their bits; each is used as the sum of two bfloat16 numbers instead.

Legend: rows = tokens, h = hidden size, n = num_query_groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sparsek_kernels.launch import launch
from torch import Tensor

BLOCK_ROWS = 64
BLOCK_HIDDEN = 64
CPU_ROWS = 1024
BACKWARD_ROWS = 1024


@triton.jit
def _linear_score_kernel(
    x, w, out, rows, hidden, columns, stride_x, stride_w,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(rows / BLOCK_ROWS),): one program owns BLOCK_ROWS rows and all columns, so nothing is
    combined.
    """
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_col = tl.arange(0, BLOCK_COLUMNS)
    o_hid = tl.arange(0, BLOCK_HIDDEN)
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        i_hid = start + o_hid
        m_hid = i_hid < hidden
        b_x = tl.load(
            x + o_row[:, None] * stride_x + i_hid[None, :],
            mask=(o_row[:, None] < rows) & m_hid[None, :],
            other=0.0,
        )
        b_w = tl.load(
            w + i_hid[:, None] * stride_w + o_col[None, :],
            mask=m_hid[:, None] & (o_col[None, :] < columns),
            other=0.0,
        )
        if NATIVE:
            b_acc = tl.dot(b_x, b_w, b_acc)
        else:
            b_acc = tl.dot(b_x.to(tl.float32), b_w.to(tl.float32), b_acc, input_precision="ieee")
    tl.store(
        out + o_row[:, None] * columns + o_col[None, :],
        b_acc,
        mask=(o_row[:, None] < rows) & (o_col[None, :] < columns),
    )


def linear_score_triton(x: Tensor, w: Tensor) -> Tensor:
    """[rows, h] @ [h, n] -> [rows, n] fp32, tile sizes fixed whatever the number of rows."""
    rows, hidden = x.shape
    columns = w.shape[1]
    out = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    launch(
        _linear_score_kernel,
        (-(-rows // BLOCK_ROWS),),
        (x, w, out),
        (rows, hidden, columns, x.stride(0), w.stride(0)),
        {
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_HIDDEN": BLOCK_HIDDEN,
            "BLOCK_COLUMNS": max(16, 1 << (columns - 1).bit_length()),
            "NATIVE": x.dtype == w.dtype and x.dtype in (torch.float16, torch.bfloat16),
        },
    )
    return out


@triton.jit
def _linear_score_backward_kernel(
    x, w, du, dx, partials, rows, hidden, columns, stride_x, stride_w,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(rows / ROWS), ceil(h / BLOCK_HIDDEN)): one program owns ROWS rows of BLOCK_HIDDEN columns of dx, and
    their share of dw, which it writes to partials [grid 0, h, n]; summed afterwards in a fixed order.

    SPLIT (x and w in bfloat16): du is the sum of two bfloat16 tiles, each multiplied on its own.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    o_hid = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    o_col = tl.arange(0, BLOCK_COLUMNS)
    m_hid = o_hid < hidden
    m_col = o_col < columns
    b_w = tl.load(
        w + o_hid[None, :] * stride_w + o_col[:, None], mask=m_hid[None, :] & m_col[:, None], other=0.0
    )
    b_dw = tl.zeros([BLOCK_HIDDEN, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        o_row = first + start + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        b_du = tl.load(
            du + o_row[:, None] * columns + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0
        )
        if SPLIT:
            b_high = b_du.to(tl.bfloat16)
            b_low = (b_du - b_high.to(tl.float32)).to(tl.bfloat16)
        if NEEDS_DX:
            if SPLIT:
                b_dx = tl.dot(b_low, b_w, tl.dot(b_high, b_w))
            else:
                b_dx = tl.dot(b_du, b_w.to(tl.float32), input_precision="ieee")
            tl.store(
                dx + o_row[:, None] * hidden + o_hid[None, :],
                b_dx.to(dx.dtype.element_ty),
                mask=m_row[:, None] & m_hid[None, :],
            )
        if NEEDS_DW:
            b_x = tl.load(
                x + o_row[None, :] * stride_x + o_hid[:, None],
                mask=m_row[None, :] & m_hid[:, None],
                other=0.0,
            )
            if SPLIT:
                b_dw = tl.dot(b_x, b_low, tl.dot(b_x, b_high, b_dw))
            else:
                b_dw = tl.dot(b_x.to(tl.float32), b_du, b_dw, input_precision="ieee")
    if NEEDS_DW:
        tl.store(
            partials + (tl.program_id(0).to(tl.int64) * hidden + o_hid[:, None]) * columns + o_col[None, :],
            b_dw,
            mask=m_hid[:, None] & m_col[None, :],
        )


def linear_score_backward_triton(
    x: Tensor, w: Tensor, du: Tensor, *, needs_dx: bool = True, needs_dw: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `linear_score_triton` for du [rows, n] fp32: (dx [rows, h] like x, dw [h, n] like w)."""
    rows, hidden = x.shape
    columns = w.shape[1]
    du = du.contiguous()
    split = x.dtype == w.dtype == torch.bfloat16
    block_hidden = 128 if split else 64  # fp32 products on a tile of 128 spill registers
    pieces = -(-rows // BACKWARD_ROWS)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    partials = du.new_empty(pieces, hidden, columns) if needs_dw else None
    launch(
        _linear_score_backward_kernel,
        (pieces, -(-hidden // block_hidden)),
        (x, w, du, x if dx is None else dx, du if partials is None else partials),
        (rows, hidden, columns, x.stride(0), w.stride(0)),
        {
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_HIDDEN": block_hidden,
            "BLOCK_COLUMNS": max(16, 1 << (columns - 1).bit_length()),
            "ROWS": BACKWARD_ROWS,
            "SPLIT": split,
            "NEEDS_DX": needs_dx,
            "NEEDS_DW": needs_dw,
        },
    )
    return dx, None if partials is None else partials.sum(0).to(w.dtype)


def linear_score_torch(x: Tensor, w: Tensor) -> Tensor:
    """[rows, h] @ [h, n] -> [rows, n] by elementwise products and row sums; fp32, or fp64 for fp64 input."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = w.to(dtype).t().contiguous()
    out = torch.empty(x.shape[0], w.shape[1], dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], CPU_ROWS):
        part = x[start : start + CPU_ROWS].to(dtype)
        for column in range(w.shape[1]):
            out[start : start + CPU_ROWS, column] = (part * columns[column]).sum(-1)
    return out


def _rows(x: Tensor) -> Tensor:
    """x [..., h] as [rows, h], the elements of a row side by side."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _LinearScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        flat, w = _rows(x), w.contiguous()
        in_kernel = x.is_cuda and x.dtype != torch.float64
        scores = linear_score_triton(flat, w) if in_kernel else linear_score_torch(flat, w)
        return scores.view(*x.shape[:-1], w.shape[1])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad
        flat, w = _rows(x), w.contiguous()
        du = grads[0].reshape(-1, w.shape[1])
        # With create_graph=True by torch operations, which have second derivatives.
        if x.is_cuda and du.dtype == torch.float32 and not torch.is_grad_enabled():
            dx, dw = linear_score_backward_triton(flat, w, du, needs_dx=needs_dx, needs_dw=needs_dw)
        else:
            dx = (du @ w.to(du.dtype).t()).to(x.dtype) if needs_dx else None
            dw = (flat.to(du.dtype).t() @ du).to(w.dtype) if needs_dw else None
        return None if dx is None else dx.view(x.shape), dw


def linear_score(x: Tensor, w: Tensor) -> Tensor:
    """Scores of tokens: x [..., h] in any float type, w [h, n] -> [..., n] fp32 (fp64 where x is fp64).

    Differentiable in both; gradients have the dtypes of x and w and are accumulated in fp32.
    """
    return _LinearScore.apply(x, w)
