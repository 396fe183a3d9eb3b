# SPDX-License-Identifier: Apache-2.0
"""Own heads, batch first, plus slope * position / L_ref: kernel and torch path against float64."""

from __future__ import annotations

import pytest
import torch

from sparsek_megatron.position_scores import (
    position_scores,
    position_scores_backward_triton,
    position_scores_triton,
)

LENGTH = torch.tensor(4096)
# (n, first own head, own heads): all, some of the middle, one that several ranks use, one that is all there is
LAYOUTS = [(8, 0, 8), (6, 2, 3), (3, 2, 1), (1, 0, 1)]


def inputs(tokens: int, batch: int, heads: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(scores [s, b, n], slope [n], positions), all fp32 or int64."""
    generator = torch.Generator().manual_seed(tokens + batch)
    scores = torch.randn(tokens, batch, heads, generator=generator)
    slope = 64 * torch.randn(heads, generator=generator)
    positions = {
        "counted": None,
        "shared": torch.randint(0, 100_000, (tokens,), generator=generator),
        "int32": torch.randint(0, 100_000, (tokens,), generator=generator, dtype=torch.int32),
        "by row": torch.randint(0, 100_000, (batch, tokens), generator=generator),
        "strided": torch.randint(0, 100_000, (tokens, batch), generator=generator).t(),
    }[kind]
    return scores, slope, positions


KINDS = ("counted", "shared", "int32", "by row", "strided")


def expected(
    scores: torch.Tensor, slope: torch.Tensor, positions: torch.Tensor | None, first: int, own: int
) -> torch.Tensor:
    """The formula in float64, for positions spread to [b, s]."""
    tokens, batch, _ = scores.shape
    places = torch.arange(tokens) if positions is None else positions
    relative = places.expand(batch, tokens).double() / 4096
    heads = range(first, first + own)
    return torch.stack([scores[:, :, k].double().t() + slope[k].double() * relative for k in heads], -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "first", "own"), LAYOUTS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (63, 2), (111, 1), (1025, 2)])
def test_kernel_and_torch_path_match_double_precision(
    tokens: int, batch: int, heads: int, first: int, own: int, kind: str
) -> None:
    scores, slope, positions = inputs(tokens, batch, heads, kind)
    leaves = [scores.requires_grad_(), slope.requires_grad_()]
    want = expected(scores, slope, positions, first, own)
    d_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    want_scores, want_slope = torch.autograd.grad(want, leaves, d_out.double())
    out = position_scores(scores, slope, LENGTH, positions, head_start=first, num_heads=own)
    in_torch = (out, *torch.autograd.grad(out, leaves, d_out))
    scores, slope = scores.detach(), slope.detach()
    in_kernel = (
        position_scores_triton(scores, slope, LENGTH, positions, first, own),
        *position_scores_backward_triton(d_out, LENGTH, positions, first, slope.shape[0], slope.dtype),
    )
    for got, d_scores, d_slope in (in_torch, in_kernel):
        assert d_scores is not None and d_slope is not None
        assert got.dtype == torch.float32 and got.is_contiguous() and d_scores.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
        assert torch.equal(d_scores, want_scores)  # not rounded; zero outside the own heads
        torch.testing.assert_close(d_slope, want_slope, rtol=1e-5, atol=1e-4)
        others = [k for k in range(heads) if not first <= k < first + own]
        assert not d_slope[others].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slope_in_half_precision_has_a_gradient_that_is_rounded_once(dtype: torch.dtype) -> None:
    scores, slope, _ = inputs(3000, 1, 4, "counted")
    slope = slope.to(dtype).requires_grad_()
    want = expected(scores, slope, None, 0, 4)
    (want_slope,) = torch.autograd.grad(want.sum(), slope)
    out = position_scores(scores, slope, LENGTH, None, head_start=0, num_heads=4)
    (in_torch,) = torch.autograd.grad(out.sum(), slope)
    slope = slope.detach()
    kernel = position_scores_triton(scores, slope, LENGTH, None, 0, 4)
    d_out = torch.ones_like(kernel)
    _, in_kernel = position_scores_backward_triton(d_out, LENGTH, None, 0, slope.shape[0], slope.dtype)
    for got in (out, kernel):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    assert torch.equal(in_torch, want_slope) and in_kernel is not None and torch.equal(in_kernel, want_slope)


def test_a_slopes_gradient_survives_cancellation() -> None:
    """Its sum is 1e-7 of its terms: fp32 would lose all of it."""
    scores, slope, _ = inputs(1025, 1, 2, "counted")
    place = torch.arange(1025)[None, :, None].expand(1, 1025, 2)
    d_out = torch.where(place % 2 == 0, 1.0, -1.0) / (place + 1).float() ** 0.5
    d_out[:, -1] -= (d_out.double() * place).sum(1).float() / 1024
    want = (d_out.double() * (place.double() / 4096)).sum((0, 1))
    out = position_scores(scores, slope.requires_grad_(), LENGTH, None, head_start=0, num_heads=2)
    (in_torch,) = torch.autograd.grad(out, slope, d_out)
    _, in_kernel = position_scores_backward_triton(d_out, LENGTH, None, 0, slope.shape[0], slope.dtype)
    for got in (in_torch, in_kernel):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)  # pyright: ignore


def test_a_tokens_bits_do_not_depend_on_the_tokens_beside_it() -> None:
    scores, slope, _ = inputs(1025, 2, 6, "counted")
    whole = position_scores_triton(scores, slope, LENGTH, None, 2, 3)
    parts = [
        position_scores_triton(x.contiguous(), slope, LENGTH, p, 2, 3)
        for x, p in zip(scores.split(111), torch.arange(1025).split(111), strict=True)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    scores, slope, positions = inputs(111, 2, 6, "by row")
    d_out = torch.randn(2, 111, 3)
    d_scores, d_slope = position_scores_backward_triton(d_out, LENGTH, positions, 2, slope.shape[0], slope.dtype)
    some = {"needs_scores": False}
    alone = position_scores_backward_triton(d_out, LENGTH, positions, 2, slope.shape[0], slope.dtype, **some)
    assert alone[0] is None and torch.equal(alone[1], d_slope)  # pyright: ignore
    some = {"needs_slope": False}
    alone = position_scores_backward_triton(d_out, LENGTH, positions, 2, slope.shape[0], slope.dtype, **some)
    assert alone[1] is None and torch.equal(alone[0], d_scores)  # pyright: ignore
    for leaf in (scores, slope):
        leaf.requires_grad_()
        out = position_scores(scores, slope, LENGTH, positions, head_start=2, num_heads=3)
        (gradient,) = torch.autograd.grad(out, leaf, d_out)
        torch.testing.assert_close(gradient, d_scores if leaf is scores else d_slope)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_of_the_scores_is_a_tensor_of_its_own(batch: int) -> None:
    """A sum over ranks follows in place: it must not reach the gradient that came in, nor miss a copy of its own."""
    scores, slope, _ = inputs(63, batch, 1, "counted")
    out = position_scores(scores.requires_grad_(), slope, LENGTH, None, head_start=0, num_heads=1)
    for d_out in (torch.ones_like(out), torch.ones(()).expand_as(out)):
        (in_torch,) = torch.autograd.grad(out, scores, d_out, retain_graph=True)
        in_kernel, _ = position_scores_backward_triton(d_out, LENGTH, None, 0, slope.shape[0], slope.dtype)
        for got in (in_torch, in_kernel):
            assert got is not None and got.is_contiguous() and (got == 1).all()
            got.add_(1)
            assert (d_out == 1).all()


def test_an_incoming_gradient_may_have_strides() -> None:
    scores, slope, _ = inputs(63, 2, 3, "counted")
    d_out = torch.randn(2, 3, 63).transpose(1, 2)
    strided = position_scores_backward_triton(d_out, LENGTH, None, 0, slope.shape[0], slope.dtype)
    plain = position_scores_backward_triton(d_out.contiguous(), LENGTH, None, 0, slope.shape[0], slope.dtype)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))  # pyright: ignore
    out = position_scores(scores.requires_grad_(), slope, LENGTH, None, head_start=0, num_heads=3)
    assert torch.equal(torch.autograd.grad(out, scores, d_out)[0], plain[0])  # pyright: ignore


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "first", "own"), LAYOUTS)
def test_gradients_in_double_precision(heads: int, first: int, own: int, kind: str) -> None:
    scores, slope, positions = inputs(5, 2, heads, kind)
    leaves = [x.double().requires_grad_() for x in (scores, slope)]

    def function(scores: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return position_scores(scores, slope, LENGTH, positions, head_start=first, num_heads=own)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_what_is_written_over_or_released_before_backward_is_not_missed() -> None:
    """The reference length as Megatron's captured layers do it, the slope as ZeRO-3 does."""
    scores, slope, _ = inputs(63, 1, 4, "counted")
    length = LENGTH.clone()
    leaves = [scores.requires_grad_(), slope.requires_grad_()]
    out = position_scores(scores, slope, length, None, head_start=0, num_heads=4)
    length.copy_(LENGTH)
    with torch.no_grad():
        slope.zero_()
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(gradients[1], torch.full((4,), float(torch.arange(63).sum()) / 4096))
