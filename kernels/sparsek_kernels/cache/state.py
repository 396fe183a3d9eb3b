# SPDX-License-Identifier: Apache-2.0
"""Exchange between a cache's buffers and `AttentionState`, which attention of a chunk takes and returns.

Selection and attention depend on a position by its place within a list tile, and by whether the pool and the window
were full before it. So prefill names a stand-in for the rows' length that stops growing (`stand_in_length`): the
launches prepared for one piece of a prompt then serve all later ones, and positions never pass the range of int32.
"""

from __future__ import annotations

import torch

from sparsek_kernels.attention.chunk import AttentionState
from sparsek_kernels.cache.layout import Buffers, CacheSettings
from sparsek_kernels.selection import SelectionState
from sparsek_kernels.selection.threshold import join, split
from sparsek_kernels.selection.types import list_tile


def stand_in_length(settings: CacheSettings, length: int) -> int:
    """The shortest length, past a full pool, from which tokens go on as from `length`."""
    period = list_tile(settings.stride)
    full = period * -(-(settings.pool + settings.ring) // period)
    return length if length < full else full + (length - full) % period


def _ring_parts(settings: CacheSettings, length: int) -> list[slice]:
    """Where the last ring - 1 of `length` tokens live among the rows, oldest first: one part, or two that wrap."""
    topk, ring = settings.topk, settings.ring
    oldest = (length + 1) % ring
    if oldest < 2:
        return [slice(topk + oldest, topk + oldest + ring - 1)]
    return [slice(topk + oldest, topk + ring), slice(topk, topk + oldest - 1)]


def read_state(buffers: Buffers, settings: CacheSettings, length: int) -> AttentionState:
    """`AttentionState` of rows that have all consumed `length` tokens, at least 1. Copies.

    Pool positions only tell members apart and order ties, and no member is as recent as a token that has not been
    offered yet. So a member's rank serves as its position.
    """
    parts, place = _ring_parts(settings, length), buffers.place.long()

    def rows(x: torch.Tensor) -> torch.Tensor:
        chosen = x.gather(2, place[..., None].expand(*place.shape, x.shape[-1]))
        return torch.cat([chosen, *(x[:, :, part] for part in parts)], dim=2).transpose(1, 2)

    rank = torch.arange(settings.pool, dtype=torch.int32, device=place.device)
    selection = SelectionState(
        length=stand_in_length(settings, length),
        pool_scores=buffers.pool.clone(),
        pool_index=rank.masked_fill(buffers.pool == float("-inf"), -1),
        recent_scores=torch.cat([buffers.score[:, :, part] for part in parts], dim=2),
        threshold=join(buffers.threshold[..., 0], buffers.threshold[..., 1]),
    )
    return AttentionState(selection, rows(buffers.key), rows(buffers.value))


def write_state(buffers: Buffers, settings: CacheSettings, state: AttentionState, length: int) -> None:
    """Replace what `buffers` hold by `state`, that of `length` tokens, in place."""
    topk, selection = settings.topk, state.selection
    for target, rows in (
        (buffers.key, state.key.transpose(1, 2)),
        (buffers.value, state.value.transpose(1, 2)),
        (buffers.score, torch.cat([selection.pool_scores[..., :topk], selection.recent_scores], dim=2)),
    ):
        first = 0
        for part in (slice(0, topk), *_ring_parts(settings, length)):
            count = part.stop - part.start
            target[:, :, part] = rows[:, :, first : first + count]
            first += count
    buffers.pool.copy_(selection.pool_scores)
    buffers.place.copy_(torch.arange(topk, device=buffers.place.device))
    buffers.threshold.copy_(torch.stack(split(selection.threshold), dim=-1))
    buffers.length.fill_(length)
