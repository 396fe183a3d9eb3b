# SPDX-License-Identifier: Apache-2.0
"""The overflow count against the unbounded operator's support."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import sparsek

from sparsek_megatron.diagnostics import pool_overflow


@pytest.mark.parametrize("spread", [0.02, 0.2, 0.6, 3.0])
def test_the_pool_overflows_where_the_unbounded_support_is_larger(spread: float) -> None:
    topk, window, stride, pool, length = 4, 6, 5, 12, 97
    scores = spread * torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1))
    refresh = [c for c in range(0, length, stride) if c - window + 1 > pool]
    overflowing = 0
    for point in refresh:
        gates = sparsek(scores[:, : point - window + 1].transpose(1, 2).double(), topk)
        overflowing += int(((gates > 0).sum(-1) > pool).sum())
    got = pool_overflow(scores, topk=topk, window=window, stride=stride, pool=pool, samples=len(refresh))
    assert got == (overflowing, len(refresh) * 6)
    assert (overflowing > 0) == (spread < 1), "the parameters reach both outcomes"


def test_short_sequences_have_nothing_to_overflow() -> None:
    assert pool_overflow(torch.zeros(1, 16, 2), topk=4, window=4, stride=4, pool=16) == (0, 0)
