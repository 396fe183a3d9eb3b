# SPDX-License-Identifier: Apache-2.0
"""Settings and buffers of a cache, and their exchange with `AttentionState`.

Legend (the symbols of `kernels/README.md`):

    b      sequences (batch rows)             c      refresh point of position p, stride * (p // stride)
    hkv    key/value heads of this rank       u      score
    ring   window + stride places; position p lives in place p % ring
    rows   topk + ring: the selected keys in any order, then the ring

At length n (positions 0 ... n - 1 consumed) the pool has been offered the positions up to c(n - 1) - window. The ring
holds the last `ring` positions: those that are still local, and those that the next refresh will offer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from sparsek_kernels.attention.api import GATES
from sparsek_kernels.attention.chunk import AttentionState
from sparsek_kernels.selection import SelectionState
from sparsek_kernels.selection.threshold import MAX_POOL, join, split

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


@dataclass(frozen=True)
class CacheSettings:
    """What fixes the meaning and the sizes of a cache; two caches with equal settings are interchangeable."""

    batch_size: int
    num_kv_heads: int
    head_dim: int
    topk: int
    window: int
    stride: int
    pool: int
    gate: str
    softmax_scale: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_kv_heads", "head_dim", "topk", "window", "stride", "pool"):
            _require_int(name, getattr(self, name))
        if not self.topk <= self.pool <= MAX_POOL:
            raise ValueError(f"pool must be between topk = {self.topk} and {MAX_POOL}, got {self.pool}")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if self.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"dtype must be one of {names}, got {self.dtype}")

    @property
    def ring(self) -> int:
        return self.window + self.stride

    @property
    def rows(self) -> int:
        return self.topk + self.ring

    @property
    def hard(self) -> bool:
        """Hard selection: all gates are 1."""
        return self.pool == self.topk

    @property
    def floor(self) -> float:
        """No selected gate is below this (kernels/README.md)."""
        return 1.0 / (self.pool - self.topk + 1)


@dataclass(frozen=True)
class Buffers:
    """The cache's memory. Every tensor starts with [b, hkv]; nothing else about a sequence is kept.

    key, value  [b, hkv, rows, d]
    score       [b, hkv, rows] fp32; -inf in a selected place without a key
    pool        [b, hkv, pool] fp32 scores, descending, -inf where empty; newcomers lose ties, so no positions are kept
    place       [b, hkv, topk] int32: the place of the selected key of each rank; a permutation of 0 ... topk - 1
    threshold   [b, hkv, 2] fp32: tau as the sum of two fp32 (`selection.threshold.split`); -inf, 0 before it exists
    length      [b, hkv] int32: tokens consumed, the same number in every head
    """

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor
    pool: torch.Tensor
    place: torch.Tensor
    threshold: torch.Tensor
    length: torch.Tensor

    @classmethod
    def allocate(cls, settings: CacheSettings, device: torch.device) -> Buffers:
        lead = (settings.batch_size, settings.num_kv_heads)

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*lead, *shape, dtype=dtype, device=device)

        buffers = cls(
            key=new(settings.rows, settings.head_dim, dtype=settings.dtype),
            value=new(settings.rows, settings.head_dim, dtype=settings.dtype),
            score=new(settings.rows, dtype=torch.float32),
            pool=new(settings.pool, dtype=torch.float32),
            place=new(settings.topk, dtype=torch.int32),
            threshold=new(2, dtype=torch.float32),
            length=new(dtype=torch.int32),
        )
        buffers.clear(settings.topk)
        return buffers

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, function) -> Buffers:
        return Buffers(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def clear(self, topk: int) -> None:
        """Forget everything, in place. Keys and values are zeroed: a masked row must not hold NaN."""
        self.key.zero_()
        self.value.zero_()
        self.score.fill_(float("-inf"))
        self.pool.fill_(float("-inf"))
        self.place.copy_(torch.arange(topk, device=self.place.device))
        self.threshold.zero_()
        self.threshold[..., 0] = float("-inf")
        self.length.zero_()


def read_state(buffers: Buffers, settings: CacheSettings, length: int) -> AttentionState:
    """`AttentionState` of rows that have all consumed `length` tokens, at least 1. Copies.

    The state's pool positions only tell members apart and order ties, and no member of the pool is as recent as a token
    that has not been offered yet. So a member's rank serves as its position.
    """
    recent = settings.ring - 1
    position = torch.arange(length - recent, length, device=buffers.length.device)
    ring = settings.topk + position % settings.ring
    place = buffers.place.long()

    def rows(x: torch.Tensor) -> torch.Tensor:
        chosen = x.gather(2, place[..., None].expand(*place.shape, x.shape[-1]))
        last = x[:, :, ring].masked_fill((position < 0)[:, None], 0)
        return torch.cat([chosen, last], dim=2).transpose(1, 2)

    rank = torch.arange(settings.pool, dtype=torch.int32, device=position.device)
    selection = SelectionState(
        length=length,
        pool_scores=buffers.pool.clone(),
        pool_index=torch.where(buffers.pool == float("-inf"), -1, rank),
        recent_scores=buffers.score[:, :, ring].masked_fill(position < 0, float("-inf")),
        threshold=join(buffers.threshold[..., 0], buffers.threshold[..., 1]),
    )
    return AttentionState(selection, rows(buffers.key), rows(buffers.value))


def write_state(buffers: Buffers, settings: CacheSettings, state: AttentionState) -> None:
    """Replace what `buffers` hold by `state`, in place."""
    topk, selection = settings.topk, state.selection
    position = torch.arange(
        selection.length - (settings.ring - 1), selection.length, device=buffers.length.device
    )
    ring = topk + position % settings.ring
    for target, rows in ((buffers.key, state.key), (buffers.value, state.value)):
        rows = rows.transpose(1, 2)
        target[:, :, :topk] = rows[:, :, :topk]
        target[:, :, ring] = rows[:, :, topk:]
    buffers.score[..., :topk] = selection.pool_scores[..., :topk]
    buffers.score[..., ring] = selection.recent_scores
    buffers.pool.copy_(selection.pool_scores)
    buffers.place.copy_(torch.arange(topk, device=buffers.place.device))
    buffers.threshold.copy_(torch.stack(split(selection.threshold), dim=-1))
    buffers.length.fill_(selection.length)
