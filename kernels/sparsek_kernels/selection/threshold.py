# SPDX-License-Identifier: Apache-2.0
"""Threshold of the SparseK operator on sorted scores, in torch.

    tau solves  sum_j clamp(z_j - tau, 0, 1) = k        F = {j : 0 < z_j - tau < 1}    A = #{j : z_j - tau >= 1}

With z sorted, F and A are two ends of a range, so one evaluation is two binary searches and a difference of prefix
sums. The root lies in [z_(k) - 1, z_(k)]; inside that bracket the active-set step `tau = (sum_F z + A - k) / |F|` is
Newton's method on a piecewise linear function, and bisection takes over where it would leave the bracket or cycle.

**Exact thresholds.** Selection rounds scores to the grid of 2^-38 (3.6e-12; scores of magnitude 2^-14 and above lie
on it already), writes them relative to z_(k), and rounds tau down to the grid. The sum of 2^14 such numbers is exact in
float64, so tau does not depend on the order of summation: every backend, block size and chunking gives the same bits,
and tau_r is non-decreasing in r because it is a monotone rounding of a non-decreasing real number.
"""

from __future__ import annotations

import torch

GRID_BITS = 38
"""Fractional bits kept when selection solves for tau."""

_GRID = float(1 << GRID_BITS)
_ROUND = 1.5 * 2.0 ** (52 - GRID_BITS)  # adding and subtracting it rounds to the grid
_COARSE = 2.0 ** (51 - GRID_BITS)  # float32 numbers of this magnitude lie on the grid


def round_to_grid(scores: torch.Tensor) -> torch.Tensor:
    """Scores in float64, rounded to the nearest multiple of 2^-GRID_BITS."""
    z = scores.double()
    return torch.where(z.abs() < _COARSE, (z + _ROUND) - _ROUND, z)


def solve_sorted(z: torch.Tensor, mass: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Root of the threshold equation as a numerator and a denominator.

    z     [..., n] float64, descending along the last dimension and containing a zero at rank `mass`; -inf where empty.
    mass  k, with 1 <= k < (number of finite entries) and the gap z_(k) - z_(k+1) below one, so that F is not empty.

    Returns `(numerator, size)`, both [...] float64: tau = numerator / size and |F| = size. Rows that break the
    conditions on `mass` return numbers without meaning.
    """
    z = z.clamp(-2.0, 2.0)
    ascending = -z
    prefix = torch.nn.functional.pad(z.cumsum(-1), (1, 0))  # [..., n + 1]
    lo = torch.full_like(z[..., :1], -1.0)
    hi = torch.zeros_like(lo)
    tau = torch.full_like(lo, -0.5)
    done = (z > -1.0).sum(-1, keepdim=True) <= mass  # F is empty: such a row never becomes stable
    numerator, size = torch.zeros_like(lo), torch.ones_like(lo)
    last_high = torch.full_like(lo, -1, dtype=torch.long)
    last_low = last_high.clone()
    for iteration in range(200):
        low = torch.searchsorted(ascending, -tau)  # #{z > tau}
        high = torch.searchsorted(ascending, -(tau + 1.0), right=True)  # #{z - 1 >= tau}
        stable = (low == last_low) & (high == last_high)
        done = done | stable
        if bool(done.all()):
            break
        total = prefix.gather(-1, low) - prefix.gather(-1, high)
        count = (low - high).double()
        new = total + high - mass
        numerator = torch.where(done, numerator, new)
        size = torch.where(done, size, count)
        above = new > tau * count  # the gates still sum to more than k: the root is higher
        lo = torch.where(above, torch.maximum(lo, tau), lo)
        hi = torch.where(above, hi, torch.minimum(hi, tau))
        step = new / count
        inside = (count > 0) & (step >= lo) & (step <= hi)
        if iteration >= 8 and iteration % 2:
            inside = torch.zeros_like(inside)
        tau = torch.where(done, tau, torch.where(inside, step, 0.5 * (lo + hi)))
        # An unchanged active set proves the root only after an active-set step.
        last_low = torch.where(inside, low, -1)
        last_high = torch.where(inside, high, -1)
    return numerator.squeeze(-1), size.squeeze(-1)


def exact_threshold(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Threshold of sorted pools, exactly as every backend of `select` stores it.

    scores [..., pool] float32, descending, -inf where empty. Returns [...] float64 that equals the sum of two float32
    numbers (see `split`); -inf where the pool holds at most `topk` scores.
    """
    if scores.shape[-1] <= topk:
        return scores.new_full(scores.shape[:-1], float("-inf"), dtype=torch.float64)
    full = torch.isfinite(scores[..., topk])
    kth = torch.where(full.unsqueeze(-1), round_to_grid(scores[..., topk - 1 : topk]), 0.0)
    z = round_to_grid(scores) - kth
    next_best = torch.where(full, z[..., topk], -1.0)
    numerator, size = solve_sorted(torch.where(full.unsqueeze(-1), z, 0.0), topk)
    relative = torch.floor(numerator * _GRID / size) / _GRID
    gap = torch.floor((next_best - 1.0) * (0.5 * _GRID)) / _GRID
    tau = kth.squeeze(-1) + torch.where(next_best <= -1.0, gap, relative)
    high, low = split(torch.where(full, tau, float("-inf")))
    return join(high, low)


def split(tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 -> two float32 whose sum is the stored threshold; monotone in tau."""
    high = tau.float()
    low = torch.where(torch.isfinite(tau), tau - high.double(), 0.0).float()
    return high, low


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Inverse of `split`, exact in float64."""
    return high.double() + low.double()
