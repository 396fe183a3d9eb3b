# SPDX-License-Identifier: Apache-2.0
"""The sides of the attention benchmark: ours and its alternatives, each on fresh random inputs of its own layout.

A maker takes a `Case` and returns a `Side`. Dense sides repeat key and value heads outside the timed region where they
cannot group them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sparsek_kernels import select, sparsek_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    """One measured shape: batch 1, `heads` query heads on `kv_heads`, head dimension `dim`.

    score_rise  tokens in which scores rise by 1, as a position slope makes them; None for no slope
    """

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    topk: int
    window: int
    stride: int
    dtype: torch.dtype
    score_rise: float | None = None

    def inputs(self, kv_heads: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Leaves q [1, tokens, heads, dim], k and v [1, tokens, kv_heads, dim]."""
        kv_heads = self.kv_heads if kv_heads is None else kv_heads
        q, k, v = (
            torch.randn(1, self.tokens, h, self.dim, device="cuda", dtype=self.dtype).requires_grad_()
            for h in (self.heads, kv_heads, kv_heads)
        )
        return q, k, v

    def scores(self) -> torch.Tensor:
        """Standard normal, on the slope: [1, tokens, kv_heads] fp32."""
        scores = torch.randn(1, self.tokens, self.kv_heads, device="cuda")
        if self.score_rise is not None:
            scores += torch.arange(self.tokens, device="cuda")[:, None] / self.score_rise
        return scores.requires_grad_()

    @property
    def budget(self) -> int:
        """Keys per query."""
        return self.topk + self.window

    @property
    def dense_pairs(self) -> float:
        return self.tokens * (self.tokens + 1) / 2

    @property
    def budget_pairs(self) -> float:
        """Attended (query, key) pairs where each query has `budget` keys, or all before it."""
        width = min(self.budget, self.tokens)
        return width * (width + 1) / 2 + (self.tokens - width) * width

    def forward_flops(self, pairs: float) -> float:
        return 4.0 * self.dim * self.heads * pairs


@dataclass(frozen=True)
class Side:
    """forward: the call to time; leaves: what it is differentiated by; pairs: (query, key) pairs it attends to."""

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    pairs: float


def sparsek(case: Case) -> Side:
    leaves = (*case.inputs(), case.scores())
    options = {"topk": case.topk, "window": case.window, "stride": case.stride}
    return Side(lambda: sparsek_attention(*leaves, **options), leaves, case.budget_pairs)


def _heads_first(leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Views [1, heads, tokens, dim], made inside the timed call: autograd runs the backward of a view on the stream it
    was made on, and one made outside a CUDA graph's capture breaks it."""
    return [x.transpose(1, 2) for x in leaves]


def sdpa(backend: SDPBackend) -> Callable[[Case], Side]:
    def make(case: Case) -> Side:
        leaves = case.inputs(case.heads)

        def forward() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*_heads_first(leaves), is_causal=True)

        return Side(forward, leaves, case.dense_pairs)

    return make


def _flex(case: Case, block_mask: Any, leaves: tuple[torch.Tensor, ...]) -> Side:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # else the ninth length is past its limit of recompilations, and runs unfused
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads > case.kv_heads
    return Side(
        lambda: compiled(*_heads_first(leaves), block_mask=block_mask, enable_gqa=grouped),
        leaves,
        case.budget_pairs,
    )


def flex_window(case: Case) -> Side:
    """flex_attention on a sliding window of the same budget, topk + window contiguous keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    width = case.budget

    def mask(b, h, i, j):
        return (j <= i) & (i - j < width)

    blocks = create_block_mask(mask, None, None, case.tokens, case.tokens, device="cuda", _compile=True)
    return _flex(case, blocks, case.inputs())


def flex_same(case: Case) -> Side:
    """flex_attention on the very keys of SparseK (without its gates): `j <= i < evict[j]` as a block mask."""
    options = {"topk": case.topk, "window": case.window, "stride": case.stride}
    evict = select(case.scores().detach(), **options).evict[0]
    return _flex(case, eviction_mask(evict, case.heads), case.inputs())


def eviction_mask(evict: torch.Tensor, heads: int) -> Any:
    """The `BlockMask` of `j <= i < evict[j]`, evict [kv_heads, n], for `heads` query heads.

    Which blocks hold a pair follows from the largest eviction of a block of keys, which hold nothing else from the
    smallest; `create_block_mask` would look at all n^2 pairs of every head.
    """
    from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE, BlockMask

    kv_heads, n = evict.shape
    group, size = heads // kv_heads, _DEFAULT_SPARSE_BLOCK_SIZE
    blocks = -(-n // size)
    parts = torch.nn.functional.pad(evict, (0, blocks * size - n)).view(kv_heads, 1, blocks, size)
    row = torch.arange(blocks, device=evict.device)[:, None]
    before = torch.arange(blocks, device=evict.device) < row
    full = before & (parts.amin(-1) >= size * (row + 1))
    some = (before & (parts.amax(-1) > size * row) | (row == row.T)) & ~full

    def listed(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = (~needed).int().argsort(dim=-1, stable=True).int()
        count = needed.sum(-1, dtype=torch.int32)
        return tuple(x.repeat_interleave(group, 0)[None].contiguous() for x in (count, order))  # pyright: ignore

    def mask(b, h, i, j):
        return (j <= i) & (i < evict[h // group, j])

    return BlockMask.from_kv_blocks(*listed(some), *listed(full), BLOCK_SIZE=size, mask_mod=mask, seq_lengths=(n, n))


def nsa(case: Case) -> Side:
    """NSA's selected branch with our budget: budget / 64 blocks of 64. It needs 16 query heads per group."""
    from fla.ops.nsa import parallel_nsa

    q, k, v = case.inputs(max(1, case.heads // 16))
    gates = torch.rand(1, case.tokens, case.heads, device="cuda", dtype=case.dtype).requires_grad_()
    options = {"block_counts": case.budget // 64, "block_size": 64, "window_size": 0}
    return Side(
        lambda: parallel_nsa(q, k, v, g_cmp=gates, g_slc=gates, **options),
        (q, k, v, gates),
        case.budget_pairs,
    )


def restrict_nsa_tuning() -> list[str]:
    """Keeps, of the configurations that NSA's kernels try at first use, those with 2 or 4 warps and two stages (or the
    default). All of them take longer to compile than the benchmark to run. Returns what was kept of each kernel."""
    from fla.ops.nsa import compression, parallel
    from triton.runtime.autotuner import Autotuner

    kept = []
    for module in (parallel, compression):
        for name, kernel in vars(module).items():
            while kernel is not None and not isinstance(kernel, Autotuner):
                kernel = getattr(kernel, "fn", None)
            if isinstance(kernel, Autotuner):
                few = [c for c in kernel.configs if c.num_warps in (2, 4) and c.num_stages in (2, 3)]
                two = [c for c in few if c.num_stages == 2] or few
                kept.append(f"{name} {len(two)} of {len(kernel.configs)}")
                kernel.configs = two
    return kept


SIDES: dict[str, Callable[[Case], Side]] = {
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sparsek": sparsek,
    "flash2": sdpa(SDPBackend.FLASH_ATTENTION),
    "flex window": flex_window,
    "flex same mask": flex_same,
    "nsa": nsa,
}
