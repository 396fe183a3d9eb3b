# SPDX-License-Identifier: Apache-2.0
"""What the attention benchmark compares with computes what it says."""

from pathlib import Path

import pytest
import torch
from sparsek_kernels import select
from torch.nn.attention.flex_attention import create_block_mask

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.mark.parametrize("n", [2048, 1990])
def test_the_eviction_mask_is_the_one_flex_attention_would_make(n, monkeypatch):
    """Blocks of partly and of wholly attended pairs, found without looking at the pairs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers import eviction_mask

    evict = select(torch.randn(1, n, 2), topk=24, window=600, stride=16).evict[0]
    got = eviction_mask(evict, heads=4)
    want = create_block_mask(lambda b, h, i, j: (j <= i) & (i < evict[h // 2, j]), None, 4, n, n, device="cpu")
    for kind in ("kv", "full_kv"):
        counts, indices = (getattr(got, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(want, f"{kind}_num_blocks")) and counts.any()
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        both = (indices, getattr(want, f"{kind}_indices"))
        assert torch.equal(*(x.where(used, -1).sort(-1).values for x in both))
    assert torch.equal(got.to_dense(), want.to_dense()) and got.seq_lengths == (n, n)
