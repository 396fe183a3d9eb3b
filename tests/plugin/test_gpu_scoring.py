# SPDX-License-Identifier: Apache-2.0
"""The scorer's kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparsek_megatron.linear_score import linear_score
from sparsek_megatron.position_scores import position_scores


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


def position_inputs(
    tokens: int, batch: int, heads: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores [s, b, n] fp32, slope [n], L_ref = 131,072)."""
    generator = torch.Generator("cuda").manual_seed(tokens + heads)
    scores = torch.randn(tokens, batch, heads, generator=generator, device="cuda")
    slope = 256 * torch.randn(heads, generator=generator, device="cuda")
    return scores, slope.to(dtype), torch.tensor(131_072, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["counted", "shared", "by row"])
@pytest.mark.parametrize(
    ("tokens", "batch", "heads", "first", "own"),
    [(1, 1, 8, 0, 8), (1025, 2, 8, 0, 8), (1025, 2, 8, 4, 2), (111, 2, 3, 2, 1), (1 << 20, 1, 8, 0, 8)],
)
def test_scores_with_positions_match_double_precision(
    tokens: int, batch: int, heads: int, first: int, own: int, kind: str, dtype: torch.dtype
) -> None:
    scores, slope, length = position_inputs(tokens, batch, heads, dtype)
    positions = {
        "counted": None,
        "shared": torch.arange(tokens, device="cuda") + 100_000,
        "by row": torch.randint(0, 1 << 20, (batch, tokens), device="cuda"),
    }[kind]
    leaves = [scores.requires_grad_(), slope.requires_grad_()]
    out = position_scores(scores, slope, length, positions, head_start=first, num_heads=own)
    d_out = torch.randn(out.shape, device="cuda")
    d_scores, d_slope = torch.autograd.grad(out, leaves, d_out)
    places = torch.arange(tokens, device="cuda") if positions is None else positions
    relative = (places.double() / 131_072).expand(batch, tokens)[..., None]
    mine = slice(first, first + own)
    want = scores[..., mine].double().transpose(0, 1) + slope[mine].double() * relative
    assert out.dtype == torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)
    want_scores = torch.zeros_like(scores)
    want_scores[..., mine] = d_out.transpose(0, 1)
    assert torch.equal(d_scores, want_scores)
    want_slope = torch.zeros(heads, dtype=torch.float64, device="cuda")
    want_slope[mine] = (d_out.double() * relative).sum((0, 1))
    absolute = (d_out.double() * relative).abs().sum((0, 1)).max()
    assert d_slope.dtype == dtype
    assert ((d_slope - want_slope).abs() <= torch.finfo(dtype).eps * want_slope.abs() + 2**-24 * absolute).all()
    again = torch.autograd.grad(
        position_scores(scores, slope, length, positions, head_start=first, num_heads=own), leaves, d_out
    )
    assert torch.equal(again[0], d_scores) and torch.equal(again[1], d_slope)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "first", "own"), [(1, 0, 8), (2, 0, 8), (2, 4, 2), (1, 5, 1)])
def test_a_tokens_score_has_the_same_bits_alone_in_a_part_and_in_the_whole(
    batch: int, first: int, own: int, dtype: torch.dtype
) -> None:
    """And whatever the type and shape of its positions, and however many heads the rank has."""
    tokens = 5000
    scores, slope, length = position_inputs(tokens, batch, 8, dtype)
    heads = {"head_start": first, "num_heads": own}
    whole = position_scores(scores, slope, length, None, **heads)
    every = position_scores(scores, slope, length, None, head_start=0, num_heads=8)
    assert torch.equal(every[..., first : first + own], whole)
    places = torch.arange(tokens, device="cuda")
    assert torch.equal(position_scores(scores, slope, length, places, **heads), whole)
    for size in (100, 1250):
        parts = zip(scores.split(size), places.split(size), strict=True)
        split = [position_scores(part, slope, length, place, **heads) for part, place in parts]
        assert torch.equal(torch.cat(split, 1), whole), size
    for place in (0, 1, 16, 777, 4999):
        one = torch.full((batch, 1), place, device="cuda")
        for positions in (one, one[0], one.int()):
            alone = position_scores(scores[place : place + 1], slope, length, positions, **heads)
            assert torch.equal(alone, whole[:, place : place + 1]), place


@pytest.mark.gpu
def test_second_derivatives_are_not_those_of_a_kernel_that_autograd_cannot_see() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator("cuda").manual_seed(3)
        x, w, slope = (
            torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()
            for shape in ((50, 2, 16), (16, 3), (3,))
        )
        length = torch.tensor(64, device="cuda")
        out = position_scores(linear_score(x, w), slope, length, None, head_start=1, num_heads=2)
        first = torch.autograd.grad(out.square().sum(), (x, w, slope), create_graph=True)
        penalty = torch.stack([g.square().mean() for g in first]).sum()
        found.append(torch.autograd.grad(penalty, (x, w, slope)))
    for got, want in zip(*found, strict=True):
        assert want.any() and (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.gpu
def test_no_scoring_call_waits_for_the_device() -> None:
    _, slope, length = position_inputs(1000, 2, 8, torch.bfloat16)
    x = torch.randn(1000, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(64, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    slope.requires_grad_()

    def run() -> None:
        out = position_scores(linear_score(x, w), slope, length, None, head_start=0, num_heads=8)
        torch.autograd.grad(out, (x, w, slope), torch.ones_like(out))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_strided_inputs_give_the_bits_of_contiguous_ones() -> None:
    """Every other hidden value, transposed weights, scores cut out of more heads, every other slope."""
    scores, slope, length = position_inputs(333, 2, 8)
    x, w = torch.randn(333, 2, 128, device="cuda")[..., ::2], torch.randn(3, 64, device="cuda").t()
    cases = (
        (linear_score, (x, w)),
        (
            lambda scores, slope: position_scores(scores, slope, length, None, head_start=1, num_heads=2),
            (scores[..., 2:6], slope[::2]),
        ),
    )
    for function, strided in cases:
        assert not any(each.is_contiguous() for each in strided)
        found = []
        for inputs in (strided, [each.contiguous() for each in strided]):
            leaves = [each.detach().requires_grad_() for each in inputs]
            out = function(*leaves)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
