# SPDX-License-Identifier: Apache-2.0
"""What a rank's chunks need from earlier chunks, and the gradients' way back: three collectives each way, all of sizes
that do not depend on the length of the sequence, without waiting for the device on the host.

Forward:
    all-gather      summaries of all chunks: sorted scores of the best `pool` keys and of the last tokens (`start`)
    all-to-all      halo: the K/V rows of the window + stride - 1 tokens before each chunk
    reduce-scatter  the `topk` selected K/V rows at each chunk's start. Every rank computes which rows these are; the
                    owner of a row writes it into a zeroed buffer of [chunks, topk] rows. One contributor is not zero,
                    so the sum is exact in any order.
Backward, the transpose:
    all-gather      gradients of the selected rows, and of the scores of each chunk's pool and last tokens
    all-to-all      gradients of the halo
Owners add in the order of the chunks: bitwise reproducible.

Legend: C chunks of L tokens in the whole sequence, b batch, h KV heads of this rank, d head dimension,
E = pool + recent + L keys that a chunk sees (`sparsek_kernels.selection.types`), recent = window + stride - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sparsek_kernels.selection.torch_backend import EMPTY
from torch import Tensor

from sparsek_megatron.context_parallel.layout import Layout
from sparsek_megatron.context_parallel.start import Sizes, pool_scores, positions_of, start_states, summarise


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of the halo of chunk `chunk`, which another chunk holds.

    source, target  ranks          source_slot, start, stop  where the owner holds them: its chunk, tokens of it
    target_slot, place  the needing rank's chunk, and the first row among its recent tokens
    """

    source: int
    target: int
    source_slot: int
    start: int
    stop: int
    target_slot: int
    place: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def halo_segments(layout: Layout, sizes: Sizes) -> list[Segment]:
    """Every piece of every chunk's halo, ordered by chunk, then by position."""
    segments = []
    for chunk in range(sizes.chunks):
        target, target_slot = layout.place(chunk)
        begin = chunk * sizes.length
        oldest = begin - sizes.recent
        for owner in range(max(oldest, 0) // sizes.length, chunk):
            source, source_slot = layout.place(owner)
            start = max(oldest - owner * sizes.length, 0)
            place = owner * sizes.length + start - oldest
            segments.append(Segment(source, target, source_slot, start, sizes.length, target_slot, place))
    return segments


class Exchange:
    """Geometry and collectives of one sequence length over one context-parallel group."""

    def __init__(self, group: dist.ProcessGroup, layout: Layout, sizes: Sizes) -> None:
        self.group, self.layout, self.sizes = group, layout, sizes
        self.rank = group.rank()
        self.owned = layout.owned(self.rank)
        segments = halo_segments(layout, sizes)
        cp = range(layout.cp)
        self.sent = [[x for x in segments if x.source == self.rank and x.target == rank] for rank in cp]
        self.kept = [[x for x in segments if x.target == self.rank and x.source == rank] for rank in cp]

    def rank_by_rank(self, every: Tensor) -> Tensor:
        """[C, ...] in sequence order -> in the order of a collective over ranks."""
        if self.layout.name == "contiguous":
            return every
        first, second = every.chunk(2)
        return torch.stack([first, second.flip(0)], dim=1).flatten(0, 1)

    def in_sequence(self, every: Tensor) -> Tensor:
        """The inverse of `rank_by_rank`."""
        if self.layout.name == "contiguous":
            return every
        first, second = every.unflatten(0, (self.layout.cp, 2)).unbind(1)
        return torch.cat([first, second.flip(0)])

    def own(self, every: Tensor) -> Tensor:
        """[C, ...] -> [own chunks, ...]."""
        return torch.stack([every[chunk] for chunk in self.owned])

    # Collectives.

    def all_gather(self, mine: Tensor) -> Tensor:
        """[own chunks, ...] on every rank -> [C, ...] in sequence order."""
        out = mine.new_empty((self.sizes.chunks, *mine.shape[1:]))
        dist.all_gather_into_tensor(out, mine.contiguous(), group=self.group)
        return self.in_sequence(out)

    def reduce_scatter(self, every: Tensor) -> Tensor:
        """[C, ...] ordered `rank_by_rank` -> [own chunks, ...], summed over ranks."""
        out = every.new_empty((len(self.owned), *every.shape[1:]))
        dist.reduce_scatter_tensor(out, every, group=self.group)
        return out

    def all_to_all(
        self, sent: Tensor, to: list[list[Segment]], of: list[list[Segment]]
    ) -> tuple[Tensor, Any]:
        """Rows [sum of `to`, ...] by target rank -> (rows [sum of `of`, ...] by source rank, the work to wait for)."""
        given, taken = ([sum(x.rows for x in part) for part in parts] for parts in (to, of))
        out = sent.new_empty((sum(taken), *sent.shape[1:]))
        work = dist.all_to_all_single(out, sent, taken, given, group=self.group, async_op=True)
        return out, work

    # Where rows are.

    def local_rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(row among this rank's tokens, whether it is here) for global positions (-1: none)."""
        chunk = torch.div(positions, self.sizes.length, rounding_mode="floor")
        row = torch.full_like(positions, -1)
        for slot, owned in enumerate(self.owned):
            row = torch.where(chunk == owned, slot * self.sizes.length + positions % self.sizes.length, row)
        return row.clamp(min=0), row >= 0

    def tokens_of(self, segment: Segment) -> slice:
        """Where the owner of a piece of halo holds it."""
        base = segment.source_slot * self.sizes.length
        return slice(base + segment.start, base + segment.stop)


class StartFromEarlierChunks(torch.autograd.Function):
    """Keys of this rank's chunks -> for each chunk all E keys that it sees, differentiable.

    key, value [b, own * L, h, d], scores [b, own * L, h]. Returns (pool keys [own, b, h, pool] int64, recent scores
    [own, b, h, recent] fp32, then for each own chunk key and value [b, E, h, d] and scores [b, E, h]; 0 where empty).
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, scores: Tensor, exchange: Exchange
    ) -> tuple[Tensor, ...]:
        sizes, own = exchange.sizes, len(exchange.owned)
        b, _, h, d = key.shape
        chunks = scores.float().unflatten(1, (own, sizes.length)).movedim(1, 0)
        sent = [key.new_empty((0, b, 2, h, d))]
        for tokens in (exchange.tokens_of(segment) for part in exchange.sent for segment in part):
            sent.append(torch.stack([key[:, tokens], value[:, tokens]], dim=1).movedim(2, 0))
        halo, work = exchange.all_to_all(torch.cat(sent), exchange.sent, exchange.kept)
        gathered = exchange.all_gather(summarise(chunks, exchange.owned, sizes))
        pool, recent = start_states(gathered, sizes)

        chosen = positions_of(exchange.rank_by_rank(pool[..., : sizes.topk]))
        row, held = exchange.local_rows(chosen.permute(1, 0, 3, 2))  # [b, C, topk, h]
        index = row.flatten(1, 2)[..., None].expand(-1, -1, -1, d)
        mine = torch.stack([x.gather(1, index).unflatten(1, row.shape[1:3]) for x in (key, value)])
        mine = mine.masked_fill(~held[..., None], 0).permute(2, 1, 3, 0, 4, 5)  # [C, b, topk, 2, h, d]
        selected = exchange.reduce_scatter(mine.contiguous())

        first = sizes.pool + sizes.recent
        rows = key.new_empty((own, 2, b, first + sizes.length, h, d))  # E rows of keys, and of values
        for i, x in enumerate((key, value)):
            rows[:, i, :, first:] = x.unflatten(1, (own, sizes.length)).movedim(1, 0)
        rows[:, :, :, : sizes.topk] = selected.movedim(3, 1)
        rows[:, :, :, sizes.topk : first] = 0  # pool keys that are not selected are not read
        work.wait()
        place = 0
        for segment in (s for part in exchange.kept for s in part):
            start = sizes.pool + segment.place
            part = halo[place : place + segment.rows]  # [rows, b, 2, h, d]
            rows[segment.target_slot, :, :, start : start + segment.rows] = part.movedim(0, 2).transpose(0, 1)
            place += segment.rows

        own_pool, own_recent = exchange.own(pool), exchange.own(recent)
        carried = torch.cat([pool_scores(own_pool), own_recent], dim=-1)
        carried = carried.masked_fill(carried == float("-inf"), 0).to(scores.dtype).transpose(2, 3)
        outputs = [own_pool, own_recent]
        for both, of_pool, of_chunk in zip(rows, carried, scores.split(sizes.length, dim=1), strict=True):
            outputs += [*both, torch.cat([of_pool, of_chunk], dim=1)]
        ctx.exchange = exchange
        ctx.save_for_backward(pool)
        ctx.mark_non_differentiable(own_pool, own_recent)
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange, (pool,) = ctx.exchange, ctx.saved_tensors
        sizes, own = exchange.sizes, len(exchange.owned)
        first = sizes.pool + sizes.recent
        by_slot = [gradients[2 + 3 * slot : 5 + 3 * slot] for slot in range(own)]
        rows = torch.stack([torch.stack([x[:, :first] for x in g[:2]], dim=1) for g in by_slot])
        b, _, _, h, d = rows.shape[1:]  # rows [own, b, 2, pool + recent, h, d]
        sent = [rows.new_empty((0, b, 2, h, d))]
        for segment in (s for part in exchange.kept for s in part):
            place = sizes.pool + segment.place
            sent.append(rows[segment.target_slot, :, :, place : place + segment.rows].movedim(2, 0))
        halo, work = exchange.all_to_all(torch.cat(sent), exchange.kept, exchange.sent)
        scores = torch.stack([g[2][:, :first] for g in by_slot])  # [own, b, pool + recent, h]
        scores = exchange.all_gather(scores.transpose(2, 3))
        selected = rows[:, :, :, : sizes.topk].permute(0, 1, 4, 3, 2, 5)  # [own, b, h, topk, 2, d]
        selected = exchange.all_gather(selected)

        # One more row than tokens: it takes what belongs to other ranks.
        spare = rows.new_zeros((b, 1, h, d))
        d_key, d_value = (torch.cat([*(g[i][:, first:] for g in by_slot), spare], dim=1) for i in range(2))
        d_scores = torch.cat([g[2][:, first:] for g in by_slot], dim=1)
        _add_score_gradients(d_scores, scores, pool, exchange)
        totals, last = _sum_over_chunks(selected, pool[..., : sizes.topk])
        for i, x in enumerate((d_key, d_value)):
            _add_rows(x, totals[..., i, :], positions_of(last), exchange)
        work.wait()
        place = 0
        for segment in (s for part in exchange.sent for s in part):
            tokens = exchange.tokens_of(segment)
            for i, x in enumerate((d_key, d_value)):
                x[:, tokens] += halo[place : place + segment.rows, :, i].transpose(0, 1)
            place += segment.rows
        return d_key[:, :-1], d_value[:, :-1], d_scores, None


def _sum_over_chunks(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each key's rows over the chunks that start with it selected, in fp32 and in the order of the chunks.

    rows [C, b, h, topk, 2, d], keys [C, b, h, topk] descending. A key is selected at the starts of consecutive chunks
    (one that leaves never returns), so each start adds its total to the start before. Returns (totals like rows, keys
    with EMPTY wherever the key's total is elsewhere): every key that is left is unique.
    """
    totals = rows.to(torch.promote_types(rows.dtype, torch.float32)).clone()
    last, earlier, later = keys.clone(), keys[:-1].flip(-1).contiguous(), keys[1:].contiguous()
    place = torch.searchsorted(earlier, later).clamp(max=keys.shape[-1] - 1)  # ascending there
    same = (earlier.gather(-1, place) == later) & (later != EMPTY)
    last[1:].masked_fill_(same, EMPTY)
    place = keys.shape[-1] - 1 - place
    for chunk in range(keys.shape[0] - 1, 0, -1):
        moved = totals[chunk] * same[chunk - 1, ..., None, None]
        totals[chunk - 1].scatter_add_(2, place[chunk - 1, ..., None, None].expand_as(moved), moved)
    return totals, last


def _add_rows(x: Tensor, totals: Tensor, positions: Tensor, exchange: Exchange) -> None:
    """x [b, own * L + 1, h, d] += totals [C, b, h, topk, d] of the positions [C, b, h, topk] this rank holds, in place.

    Each position occurs once, so that every row has one writer; rows of other ranks go to the spare last row.
    """
    row, held = exchange.local_rows(positions)
    row = torch.where(held, row, x.shape[1] - 1).permute(1, 0, 3, 2).flatten(1, 2)  # [b, C * topk, h]
    index = row[..., None].expand(-1, -1, -1, x.shape[-1])
    old = x.gather(1, index).to(totals.dtype)
    x.scatter_(1, index, (old + totals.permute(1, 0, 3, 2, 4).flatten(1, 2)).to(x.dtype))


def _add_score_gradients(x: Tensor, gradients: Tensor, pool: Tensor, exchange: Exchange) -> None:
    """x [b, own * L, h] += gradients [C, b, h, pool + recent] of this rank's tokens, chunk by chunk, in place."""
    sizes = exchange.sizes
    b, tokens, h = x.shape
    total = x.new_zeros(b, h, tokens + 1)
    begin = torch.arange(sizes.chunks, device=x.device)[:, None] * sizes.length
    recent = (begin - sizes.recent + torch.arange(sizes.recent, device=x.device)).clamp(min=-1)
    positions = torch.cat([positions_of(pool), recent[:, None, None].expand(-1, b, h, -1)], dim=-1)
    row, held = exchange.local_rows(positions)
    row = torch.where(held, row, tokens)
    for chunk in range(1, sizes.chunks):
        total.scatter_add_(2, row[chunk], gradients[chunk].to(x.dtype))
    x += total[..., :tokens].transpose(1, 2)
