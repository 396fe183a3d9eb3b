# SPDX-License-Identifier: Apache-2.0
"""Settings and buffers of a cache.

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

from sparsek_kernels.settings import GATES, pool_size, require_choice, require_int

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        for name in ("batch_size", "num_kv_heads", "head_dim"):
            require_int(name, getattr(self, name))
        pool_size(self.topk, self.window, self.stride, self.pool)
        require_choice("gate", self.gate, GATES)
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

    def check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: torch.Tensor,
        device: torch.device,
    ) -> None:
        """Raises ValueError where the tensors of a call do not fit a cache on `device`, naming one."""
        if query.dim() != 4 or query.shape[0] != self.batch_size or query.shape[3] != self.head_dim:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; this cache takes [{self.batch_size}, s, hq, {self.head_dim}]"
            )
        tokens, heads = query.shape[1:3]
        if tokens == 0:
            raise ValueError("query has no tokens (s = 0)")
        if heads == 0 or heads % self.num_kv_heads:
            raise ValueError(f"query has {heads} heads, not a multiple of the cache's {self.num_kv_heads}")
        wanted = (self.batch_size, tokens, self.num_kv_heads, self.head_dim)
        for name, x, shape, dtype in (
            ("query", query, tuple(query.shape), self.dtype),
            ("key", key, wanted, self.dtype),
            ("value", value, wanted, self.dtype),
            ("scores", scores, wanted[:3], torch.float32),
        ):
            if tuple(x.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; this cache takes {shape}")
            if x.dtype != dtype:
                raise ValueError(f"{name} has dtype {x.dtype}; this cache takes {dtype}")
            if x.device != device:
                raise ValueError(f"{name} is on {x.device}; this cache is on {device}")


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
        buffers.clear()
        return buffers

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, function) -> Buffers:
        return Buffers(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def clear(self) -> None:
        """Forget everything, in place. Keys and values are zeroed: a masked row must not hold NaN."""
        self.key.zero_()
        self.value.zero_()
        self.score.fill_(float("-inf"))
        self.pool.fill_(float("-inf"))
        self.place.copy_(torch.arange(self.place.shape[-1], device=self.place.device))
        self.threshold.zero_()
        self.threshold[..., 0] = float("-inf")
        self.length.zero_()
