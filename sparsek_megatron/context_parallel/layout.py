# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a sequence a context-parallel rank holds.

A sequence is cut into chunks of equal length. "zigzag" is Megatron's layout: 2 * cp chunks, rank r holds chunks r and
2 * cp - 1 - r, in this order. "contiguous": cp chunks, rank r holds chunk r. The cost of a SparseK query does not grow
with its position, so both are balanced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Layout:
    """cp ranks share a sequence; `name` is one of LAYOUTS."""

    name: str
    cp: int

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout={self.name!r}: must be one of {', '.join(LAYOUTS)}")

    @property
    def chunks_per_rank(self) -> int:
        return 2 if self.name == "zigzag" else 1

    @property
    def chunks(self) -> int:
        """Chunks of the whole sequence."""
        return self.cp * self.chunks_per_rank

    def owned(self, rank: int) -> tuple[int, ...]:
        """Chunks of a rank, in the order in which it holds them."""
        return (rank, 2 * self.cp - 1 - rank) if self.name == "zigzag" else (rank,)

    def place(self, chunk: int) -> tuple[int, int]:
        """(rank, slot) that holds a chunk."""
        if self.name == "contiguous":
            return chunk, 0
        return (chunk, 0) if chunk < self.cp else (2 * self.cp - 1 - chunk, 1)

    def chunk_length(self, length: int) -> int:
        """Tokens per chunk of a sequence of `length` tokens. Raises ValueError where it does not divide."""
        if length % self.chunks:
            factor = "2 x " if self.name == "zigzag" else ""
            raise ValueError(
                f"sequence of {length} tokens: not divisible by {factor}context_parallel_size = {self.chunks} "
                f"({self.name} layout); pad it to {-(-length // self.chunks) * self.chunks}"
            )
        return length // self.chunks


def shard_positions(length: int, cp: int, rank: int, layout: str = "zigzag", device=None) -> Tensor:
    """Global positions [length / cp] int64 of the tokens that rank `rank` holds of a sequence of `length` tokens."""
    plan = Layout(layout, cp)
    chunk = plan.chunk_length(length)
    inside = torch.arange(chunk, device=device)
    return torch.cat([inside + c * chunk for c in plan.owned(rank)])


def shard_sequence(x: Tensor, cp: int, rank: int, *, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """The part of a whole-sequence tensor that rank `rank` holds along `dim`, in the order of `shard_positions`."""
    if cp == 1:
        return x
    return x.index_select(dim, shard_positions(x.shape[dim], cp, rank, layout, x.device))


@torch.no_grad()
def gather_sequence(x: Tensor, group: dist.ProcessGroup, *, layout: str = "zigzag") -> Tensor:
    """The whole sequence [b, s, ...] on every rank from the shards [b, s / cp, ...]: O(s) traffic, without gradient."""
    cp = group.size()
    if cp == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(cp)]
    dist.all_gather(parts, x.contiguous(), group=group)
    length = x.shape[1] * cp
    order = torch.cat([shard_positions(length, cp, rank, layout, x.device) for rank in range(cp)])
    return torch.cat(parts, dim=1)[:, order.argsort()]
