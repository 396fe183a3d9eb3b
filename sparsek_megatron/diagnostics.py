# SPDX-License-Identifier: Apache-2.0
"""How often the bounded pool cuts off what the unbounded SparseK operator would have kept."""

from __future__ import annotations

import torch
from sparsek_kernels import sparsek
from torch import Tensor


@torch.no_grad()
def pool_overflow(
    scores: Tensor, *, topk: int, window: int, stride: int, pool: int, samples: int = 8
) -> tuple[int, int]:
    """(refresh points where the pool overflows, refresh points looked at), over all rows of scores [b, s, n].

    Looks at up to `samples` evenly spaced refresh points of each row, the last among them. The pool
    overflows at a refresh point where the (pool + 1)-th best candidate lies above the threshold of the best
    `pool`, which is where it keeps a positive gate among the best pool + 1. Costs a sort of each sample and
    one device synchronisation.
    """
    length = scores.shape[1]
    refresh = torch.arange(0, length, stride)
    refresh = refresh[refresh - window + 1 > pool]
    if refresh.numel() == 0:
        return 0, 0
    picked = torch.linspace(0, refresh.numel() - 1, min(samples, refresh.numel())).round().long().unique()
    columns = scores.transpose(1, 2).float()
    overflowing = torch.zeros((), dtype=torch.int64, device=scores.device)
    for point in refresh[picked].tolist():
        best = columns[..., : point - window + 1].topk(pool + 1, dim=-1).values
        overflowing += (sparsek(best, topk)[..., -1] > 0).sum()
    looked_at = scores.shape[0] * scores.shape[2] * picked.numel()
    return int(overflowing), looked_at
