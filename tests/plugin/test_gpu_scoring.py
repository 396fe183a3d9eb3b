# SPDX-License-Identifier: Apache-2.0
"""The scorer's backward kernel on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparsek_megatron.linear_score import linear_score


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "heads"), [(20_000, 8), (1000, 1), (777, 5)])
def test_gradients_on_a_gpu_lose_no_more_than_their_own_rounding(
    rows: int, heads: int, dtype: torch.dtype
) -> None:
    """du is not rounded to the weights' dtype first."""
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, 256, generator=generator, device="cuda").to(dtype).requires_grad_()
    w = torch.randn(256, heads, generator=generator, device="cuda").to(dtype).requires_grad_()
    du = torch.randn(rows, heads, generator=generator, device="cuda")
    du *= torch.logspace(-4, 0, rows, device="cuda")[:, None]
    dx, dw = torch.autograd.grad(linear_score(x, w), (x, w), du)
    parts = (
        (dx, du.double() @ w.double().t(), du.double().abs() @ w.double().t().abs()),
        (dw, x.double().t() @ du.double(), x.double().t().abs() @ du.double().abs()),
    )
    for got, want, absolute in parts:
        assert got.dtype == dtype
        rounding = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
        assert ((got.double() - want).abs() <= rounding + 2**-16 * absolute).all()
