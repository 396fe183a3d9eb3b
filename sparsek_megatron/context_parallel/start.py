# SPDX-License-Identifier: Apache-2.0
"""Start states of all chunks of a sequence from short summaries of each: which keys a chunk finds in its pool.

A chunk's summary is the sorted list of its best `pool` keys and the scores of its last window + stride - 1 tokens. The
lists cover exactly the tokens that have been offered to the pool when the next chunk starts; tokens offered later
(those near the end of a chunk) are taken from the scores. "Merge and keep the best `pool`" is associative and a key
(score, position) is unique, so every rank computes the same start states, bitwise those of the whole sequence.

Legend: C chunks of L tokens; P_m = m * L position of chunk m's first token; b batch, h KV heads of this rank,
T = min(L, recent), recent = window + stride - 1. Keys are those of `sparsek_kernels.selection`, with positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sparsek_kernels.selection.torch_backend import EMPTY, key_scores, make_keys
from torch import Tensor
from torch.nn.functional import pad

_LOW = (1 << 31) - 1


@dataclass(frozen=True)
class Sizes:
    """A sequence in `chunks` chunks of `length` tokens, and the settings of selection."""

    chunks: int
    length: int
    topk: int
    window: int
    stride: int
    pool: int

    @property
    def recent(self) -> int:
        """Tokens before a chunk whose keys its queries may still attend to locally."""
        return self.window + self.stride - 1

    @property
    def tail(self) -> int:
        """Tokens at the end of a chunk whose scores are part of its summary."""
        return min(self.length, self.recent)

    def offered(self, position: int) -> int:
        """Tokens that have been offered to the pool when token `position` comes: the first ones of the sequence."""
        if position == 0:
            return 0
        return max(0, self.stride * ((position - 1) // self.stride) - self.window + 1)


def positions_of(keys: Tensor) -> Tensor:
    """Positions of keys (int64), -1 where empty."""
    return torch.where(keys == EMPTY, -1, _LOW - (keys & 0xFFFFFFFF))


def best(keys: Tensor, pool: int) -> Tensor:
    """The `pool` best of keys [..., any], descending, EMPTY past their end."""
    if keys.shape[-1] < pool:
        keys = pad(keys, (0, pool - keys.shape[-1]), value=EMPTY)
    return keys.topk(pool, dim=-1).values


def summarise(scores: Tensor, chunks: Sequence[int], sizes: Sizes) -> Tensor:
    """Summaries of chunks: scores [chunks, b, L, h] fp32 -> [chunks, b, h, 2 * pool + T] int32, 8 * pool + 4 * T bytes
    per chunk and head."""
    rows = scores.transpose(2, 3).contiguous()
    keys = make_keys(rows)
    for own, chunk in zip(keys, chunks, strict=True):
        first = chunk * sizes.length
        own -= first
        own[..., max(sizes.offered(first + sizes.length) - first, 0) :] = EMPTY
    tail = rows[..., sizes.length - sizes.tail :].contiguous()
    return torch.cat([best(keys, sizes.pool).view(torch.int32), tail.view(torch.int32)], dim=-1)


def start_states(summaries: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(pool keys [C, b, h, pool] int64, recent scores [C, b, h, recent] fp32) at the start of every chunk.

    summaries [C, b, h, 2 * pool + T] in sequence order. Recent scores are -inf before the sequence's start.
    Work: C log C merges of two lists of `pool` keys per head.
    """
    device = summaries.device
    lists = summaries[..., : 2 * sizes.pool].contiguous().view(torch.int64)
    tails = summaries[..., 2 * sizes.pool :].contiguous().view(torch.float32)
    first = torch.arange(sizes.chunks, device=device)[:, None] * sizes.length
    position = first - sizes.recent + torch.arange(sizes.recent, device=device)  # [C, recent]
    before = position.clamp(min=0)
    index = before // sizes.length * sizes.tail + before % sizes.length - (sizes.length - sizes.tail)
    index = index.clamp(min=0)
    flat = tails.permute(1, 2, 0, 3).flatten(2)  # [b, h, C * T]
    recent = flat[..., index.flatten()].unflatten(-1, index.shape).movedim(2, 0)
    recent = recent.masked_fill((position < 0)[:, None, None], float("-inf"))

    starts = torch.arange(sizes.chunks + 1, device=device) * sizes.length
    offered = (sizes.stride * ((starts - 1) // sizes.stride) - sizes.window + 1).clamp(min=0)
    late = (position >= offered[:-1, None]) & (position < offered[1:, None]) & (position >= 0)
    keys = make_keys(recent) + (torch.arange(sizes.recent, device=device) - position)[:, None, None]
    keys = keys.masked_fill(~late[:, None, None], EMPTY)
    entering = best(torch.cat([lists, keys], dim=-1), sizes.pool)  # offered while chunk m is current

    start = torch.cat([torch.full_like(entering[:1], EMPTY), entering[:-1]])
    step = 1
    while step < sizes.chunks:
        merged = best(torch.cat([start[step:], start[:-step]], dim=-1), sizes.pool)
        start = torch.cat([start[:step], merged])
        step *= 2
    return start, recent


def pool_scores(keys: Tensor) -> Tensor:
    """Scores of pool keys, fp32, -inf where empty."""
    return key_scores(keys)
