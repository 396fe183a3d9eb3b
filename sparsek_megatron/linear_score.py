# SPDX-License-Identifier: Apache-2.0
"""x @ w with few output columns, in fp32, where a row's result does not depend on the other rows.

Selection is discontinuous, so the same token must get bitwise the same score whatever shard or chunk it
arrives in (tensor parallel sizes, recompute, chunked prefill). A library matmul picks its reduction order by
shape and does not promise that; here every row is reduced in one fixed order.

Legend: rows = tokens, h = hidden size, n = num_query_groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 64
BLOCK_HIDDEN = 64
CPU_ROWS = 1024
BACKWARD_ROWS = 8192


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
    kernel: Any = _linear_score_kernel
    kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        x, w, out, rows, hidden, columns, x.stride(0), w.stride(0),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_HIDDEN=BLOCK_HIDDEN,
        BLOCK_COLUMNS=max(16, triton.next_power_of_2(columns)),
        NATIVE=x.dtype == w.dtype and x.dtype in (torch.float16, torch.bfloat16),
    )  # fmt: skip
    return out


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


class _LinearScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        if x.is_cuda and x.dtype != torch.float64:
            return linear_score_triton(x, w)
        return linear_score_torch(x, w)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (du,) = grads
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (du @ w.to(du.dtype).t()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros(w.shape, dtype=du.dtype, device=du.device)
            for start in range(0, x.shape[0], BACKWARD_ROWS):
                rows = slice(start, start + BACKWARD_ROWS)
                dw.addmm_(x[rows].to(du.dtype).t(), du[rows])
            dw = dw.to(w.dtype)
        return dx, dw


def linear_score(x: Tensor, w: Tensor) -> Tensor:
    """Scores of tokens: x [..., h] in any float type, w [h, n] -> [..., n] fp32 (fp64 where x is fp64).

    Differentiable in both; gradients have the dtypes of x and w and are accumulated in fp32.
    """
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return _LinearScore.apply(flat, w.contiguous()).view(*x.shape[:-1], w.shape[1])
