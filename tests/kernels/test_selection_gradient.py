# SPDX-License-Identifier: Apache-2.0
"""The linear-time score gradient against autograd through the operator on every pool, in float64."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from sparsek_kernels import select, sparsek
from sparsek_kernels.selection import pool_indices, score_gradient


def slots_of_queries(selection, s: int) -> list[int | None]:
    """Refresh slot of every query, None for rows past the last packed sequence."""
    stride = selection.stride
    if selection.cu_seqlens is None:
        return [(selection.past % stride + i) // stride for i in range(s)]
    bounds, out, base = selection.cu_seqlens.tolist(), [None] * s, 0
    for first, last in pairwise(bounds):
        for i in range(first, last):
            out[i] = base + (i - first) // stride
        base += -(-(last - first) // stride)
    return out


def by_autograd(selection, pools, extended, weights):
    """Loss sum_ij W_ij m_ij over selected keys: (key_sum, query_sum, d loss / d scores), in float64."""
    b, s, heads, _ = weights.shape
    u = extended.double().requires_grad_()
    key_sum = torch.zeros(b, heads, u.shape[1], dtype=torch.float64)
    query_sum = torch.zeros(b, heads, s, dtype=torch.float64)
    loss = u.sum() * 0.0
    slots = slots_of_queries(selection, s)
    for row in range(b):
        for head in range(heads):
            for i in range(s):
                if slots[i] is None:
                    continue
                r = slots[i]
                members = pools[row, head, r]
                members = members[members >= 0]
                gates = sparsek(u[row, members, head], selection.topk)[: selection.topk]
                chosen = members[: selection.topk]
                weight = weights[row, i, head, : len(chosen)]
                loss = loss + (gates * weight).sum()
                start, end = (
                    selection.fraction_start[row, head, chosen],
                    selection.fraction_end[row, head, chosen],
                )
                inside = (start <= r) & (r < end)
                key_sum[row, head].index_add_(0, chosen, weight * inside)
                query_sum[row, head, i] = (weight * inside).sum()
    return key_sum, query_sum, torch.autograd.grad(loss, u)[0]


def gradient_of(selection, key_sum, query_sum, backend):
    """`score_gradient` on the device that runs the backend, back on the CPU."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    fields = {f.name: getattr(selection, f.name) for f in dataclasses.fields(selection)}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in fields.items()}
    key_sum, query_sum = key_sum.float().to(device), query_sum.float().to(device)
    return score_gradient(dataclasses.replace(selection, **moved), key_sum, query_sum, backend=backend).cpu()


CASES = {
    "plain": (80, {"topk": 4, "window": 8, "stride": 8, "pool": 12}, 1.0),
    "per token": (50, {"topk": 3, "window": 5, "stride": 1, "pool": 7}, 0.3),
    "narrow": (70, {"topk": 4, "window": 4, "stride": 4, "pool": 9}, 0.05),
    "saturated": (70, {"topk": 4, "window": 4, "stride": 4, "pool": 9}, 50.0),
    "dense": (10, {"topk": 4, "window": 8, "stride": 4, "pool": 9}, 1.0),
    "all equal": (60, {"topk": 4, "window": 4, "stride": 5, "pool": 9}, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_autograd(name):
    n, kw, scale = CASES[name]
    torch.manual_seed(0)
    scores = torch.randn(2, n, 2) * scale
    selection = select(scores, backend="torch", **kw)
    weights = torch.randn(2, n, 2, kw["topk"], dtype=torch.float64)
    key_sum, query_sum, expected = by_autograd(selection, pool_indices(scores, **kw), scores, weights)
    for backend in ("torch", "triton"):
        gradient = gradient_of(selection, key_sum, query_sum, backend)
        assert gradient.shape == scores.shape and gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected, atol=5e-6, rtol=1e-5)
        assert gradient.double().sum(1).abs().max() < 2e-5
        if name == "dense":
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_and_carried(backend):
    kw = {"topk": 3, "window": 5, "stride": 7, "pool": 9}
    torch.manual_seed(1)
    scores = torch.randn(1, 60, 2)
    cu_seqlens = torch.tensor([0, 20, 20, 21, 55], dtype=torch.int32)
    selection = select(scores, cu_seqlens=cu_seqlens, backend="torch", **kw)
    pools = pool_indices(scores, cu_seqlens=cu_seqlens, **kw)
    weights = torch.randn(1, 60, 2, 3, dtype=torch.float64)
    key_sum, query_sum, expected = by_autograd(selection, pools, scores, weights)
    query_sum[..., 55:] = float("nan")
    key_sum[..., 55:] = float("nan")
    gradient = gradient_of(selection, key_sum, query_sum, backend)
    torch.testing.assert_close(gradient.double(), expected, atol=5e-6, rtol=1e-5)
    assert torch.equal(gradient[:, 55:], torch.zeros(1, 5, 2))

    state = select(scores[:, :33], return_state=True, backend="torch", **kw).state
    selection = select(scores[:, 33:], state=state, backend="torch", **kw)
    extended = torch.cat([state.pool_scores.mT, state.recent_scores.mT, scores[:, 33:]], 1)
    pools = pool_indices(scores[:, 33:], state=state, **kw)
    key_sum, query_sum, expected = by_autograd(
        selection, pools, extended.nan_to_num(neginf=-1e9), weights[:, 33:]
    )
    gradient = gradient_of(selection, key_sum, query_sum, backend)
    torch.testing.assert_close(gradient.double(), expected, atol=5e-6, rtol=1e-5)
