# SPDX-License-Identifier: Apache-2.0
"""The SparseK operator: Euclidean projection onto {p : 0 <= p <= 1, sum p = k}.

    p_j = clamp(z_j - tau, 0, 1)   with tau such that sum_j p_j = k          (arXiv 2406.16747)
    dz_j = g_j - mean over F of g  for j in F = {0 < p < 1},  0 elsewhere

The Jacobian is the symmetric projector diag(1_F) - 1_F 1_F^T / |F|, constant where F is, so the backward is its own
derivative and double backward comes for free.
"""

from __future__ import annotations

import torch

from .operator_kernel import MAX_ROW, gates_triton
from .selection.threshold import solve_sorted


def _threshold(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tau relative to z_(k), and z_(k): [m, n] float -> ([m, 1], [m, 1]) float64, for 1 <= k < n."""
    z = rows.double().sort(dim=-1, descending=True).values
    kth = z[:, k - 1 : k]
    z = z - kth
    numerator, size = solve_sorted(z, k)
    gap = z[:, k : k + 1]
    relative = torch.where(gap <= -1.0, 0.5 * (gap - 1.0), (numerator / size).unsqueeze(-1))
    return relative, kth


def _gates_torch(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [m, n] and membership of F [m, n] bool, in torch."""
    relative, kth = _threshold(rows, k)
    distance = (rows.double() - kth) - relative
    return distance.clamp(0.0, 1.0).to(rows.dtype), (distance > 0.0) & (distance < 1.0)


def _gates(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if rows.is_cuda and rows.shape[1] <= MAX_ROW and rows.dtype != torch.float64:
        return gates_triton(rows if rows.stride(1) == 1 else rows.contiguous(), k)
    return _gates_torch(rows, k)


def _gates_fake(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    return out, torch.empty(rows.shape, dtype=torch.bool, device=rows.device)


_LIBRARY = torch.library.Library("sparsek", "FRAGMENT")
_LIBRARY.define("gates(Tensor rows, int k) -> (Tensor, Tensor)")
_LIBRARY.impl("gates", _gates, "CompositeExplicitAutograd")
torch.library.register_fake("sparsek::gates", _gates_fake, lib=_LIBRARY)


class _Project(torch.autograd.Function):
    """The projector of one set F: x -> x - mean_F x on F, 0 elsewhere. Symmetric, hence its own VJP."""

    @staticmethod
    def forward(ctx, grad: torch.Tensor, fractional: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(fractional)
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        masked = torch.where(fractional, grad, 0.0).to(dtype)
        count = fractional.sum(-1, keepdim=True).clamp(min=1)
        mean = masked.sum(-1, keepdim=True, dtype=torch.float64) / count
        return torch.where(fractional, masked - mean.to(dtype), 0.0).to(grad.dtype)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        (fractional,) = ctx.saved_tensors
        return _Project.apply(grads[0], fractional), None


class _SparseK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, k: int) -> torch.Tensor:
        gates, fractional = torch.ops.sparsek.gates(rows, k)
        ctx.save_for_backward(fractional)
        return gates

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        (fractional,) = ctx.saved_tensors
        return _Project.apply(grads[0], fractional), None


def sparsek(scores: torch.Tensor, k: int, dim: int = -1) -> torch.Tensor:
    """Gates p = argmin ||p - scores||^2 over 0 <= p <= 1, sum p = k along `dim`.

    scores  any shape, float16, bfloat16, float32 or float64; finite. On CUDA one kernel computes them;
            float64, and rows beyond 2^24, go through torch, which sorts and synchronises.
    k       the mass, an int >= 1. Where k is at least the length, all gates are 1 and the gradient is 0.

    Returns gates of the shape and dtype of `scores`; the threshold is solved in float64. Differentiable any number of
    times. Where no gate is fractional the threshold is not unique; its midpoint (z_(k) + z_(k+1) - 1) / 2 is used.
    Raises ValueError for a wrong dtype, k or dim.
    """
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"scores must be a floating point tensor, got {kind}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an int >= 1, got {k!r}")
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension, got a scalar")
    if not -scores.dim() <= dim < scores.dim():
        raise ValueError(f"dim must be in [{-scores.dim()}, {scores.dim() - 1}], got {dim}")
    if scores.numel() == 0 or k >= scores.shape[dim]:
        return torch.ones_like(scores) + 0.0 * scores.nan_to_num(0.0, 0.0, 0.0)
    moved = scores.movedim(dim, -1)
    gates = _SparseK.apply(moved.reshape(-1, moved.shape[-1]), k)
    return gates.reshape(moved.shape).movedim(-1, dim)
