# SPDX-License-Identifier: Apache-2.0
"""Score gradient of a selection, in time linear in the number of keys.

Each slot r applies the operator's VJP `du_j = G_rj - mean over F_r of G_r` for j in F_r. A key is in F_r for one
interval of slots, so the means it receives are a difference of prefix sums:

    mu_r = sum of G_r over F_r / |F_r|        S_r = mu_0 + ... + mu_(r-1)
    du_j = sum over r of G_rj - (S[fraction_end_j] - S[fraction_start_j])

Keys of F outside the top-k are never attended (G = 0) and still receive -mu. S is kept in float64: float32 prefix sums
lose 5e-4 at a million slots.
"""

from __future__ import annotations

import torch

from .gradient_kernels import score_gradient_triton
from .types import Selection


def slot_offsets(cu_seqlens: torch.Tensor, tile: int) -> torch.Tensor:
    """[num_seqs + 1] int32: slots of `tile` tokens before each sequence, and in total."""
    slots = (cu_seqlens.diff() + (tile - 1)) // tile
    return torch.nn.functional.pad(slots.cumsum(0, dtype=torch.int32), (1, 0))


def _slot_sums(selection: Selection, query_sum: torch.Tensor) -> torch.Tensor:
    """query_sum summed over the queries of each slot: [b, hkv, R] float64."""
    s, slots, stride = query_sum.shape[-1], selection.threshold.shape[-1], selection.stride
    slot = torch.arange(slots, device=query_sum.device)
    if selection.cu_seqlens is None:
        first = slot * stride - selection.past % stride
        last = first + stride
        values = query_sum.double()
    else:
        cu = selection.cu_seqlens.long()
        values = torch.where(torch.arange(s, device=cu.device) < cu[-1], query_sum, 0.0).double()
        offsets = slot_offsets(selection.cu_seqlens, stride).long()
        sequence = torch.searchsorted(offsets, slot, right=True).sub(1).clamp(max=cu.numel() - 2)
        first = cu[sequence] + (slot - offsets[sequence]) * stride
        last = torch.minimum(first + stride, cu[sequence + 1])
    prefix = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    first, last = first.clamp(0, s), last.clamp(0, s)
    return prefix[..., last] - prefix[..., torch.minimum(first, last)]


def score_gradient(
    selection: Selection, key_sum: torch.Tensor, query_sum: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Gradient of the loss with respect to the scores of the E keys.

    With dL/dm_ij the gradient of the gate with which query i attends to key j, counted only where j is in F at the slot
    of i, and summed over the query heads of the group:

    key_sum    [b, hkv, E] float32: per key, the sum over queries
    query_sum  [b, hkv, s] float32: per query, the sum over keys

    backend    "triton", "torch" or "auto", as in `select`

    Returns [b, E, hkv] float32. It sums to zero over the keys of a sequence up to rounding, and is zero where nothing
    is fractional. Rows past cu_seqlens[-1] get 0 whatever the inputs hold there.
    """
    if backend == "triton" or (backend == "auto" and key_sum.is_cuda):
        table = None if selection.cu_seqlens is None else slot_offsets(selection.cu_seqlens, selection.stride)
        return score_gradient_triton(selection, key_sum, query_sum, table)
    sums = _slot_sums(selection, query_sum)
    size = selection.fraction_size
    mean = torch.where(size > 0, sums / size.clamp(min=1), 0.0)
    prefix = torch.nn.functional.pad(mean.cumsum(-1), (1, 0))
    start, end = selection.fraction_start.long(), selection.fraction_end.long()
    received = prefix.gather(-1, end) - prefix.gather(-1, start)
    gradient = torch.where(end > start, key_sum.double() - received, 0.0)
    return gradient.float().transpose(1, 2)
