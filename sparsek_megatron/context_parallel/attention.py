# SPDX-License-Identifier: Apache-2.0
"""SparseK attention of a sequence whose tokens are sharded over a context-parallel group."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from sparsek_kernels import SelectionState
from sparsek_kernels.attention.api import check_tensors
from sparsek_kernels.attention.chunk import attend_extended
from sparsek_kernels.selection.api import check_cu_seqlens
from sparsek_kernels.settings import BACKENDS, GATES, pool_size, require_choice
from torch import Tensor

from sparsek_megatron.context_parallel.exchange import Exchange, StartFromEarlierChunks
from sparsek_megatron.context_parallel.layout import Layout, shard_positions
from sparsek_megatron.context_parallel.start import Sizes, pool_scores, positions_of
from sparsek_megatron.context_parallel.ulysses import ulysses_attention

METHODS = ("p2p", "a2a")


def check_method(cp_comm_type: str | None) -> str:
    """The method for Megatron's `cp_comm_type`; None means "p2p".

    Raises NotImplementedError for another one, naming what to use.
    """
    method = cp_comm_type or "p2p"
    if method not in METHODS:
        raise NotImplementedError(
            f"--cp-comm-type {method}: use p2p (selected keys and a window halo cross ranks, the default) or a2a "
            "(heads against sequence)"
        )
    return method


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    group: dist.ProcessGroup,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    gate: str,
    softmax_scale: float,
    backend: str = "auto",
    layout: str = "zigzag",
    cp_comm_type: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`sparsek_kernels.sparsek_attention` of a whole sequence, from and to this rank's tokens of it; differentiable.

    query [b, s / cp, hq, d], key and value [b, s / cp, hkv, d], scores [b, s / cp, hkv] fp32: this rank's tokens in the
    order of `shard_positions`. Returns [b, s / cp, hq, d]. Every rank of `group` must call with the same shapes.

    layout        "zigzag" (Megatron's) or "contiguous" (`layout`)
    cp_comm_type  "p2p" or None: selected keys and a window halo cross ranks (`exchange`); "a2a": heads against
                  sequence (`ulysses`). Same results
    cu_seqlens    int32 [num_seqs + 1], boundaries of packed sequences of which each is sharded on its own, as Megatron
                  does: global, b = 1. They are read on the host, and with "p2p" every sequence is an exchange

    Raises, before anything is sent, ValueError for what `sparsek_attention` refuses, a sequence that does not divide
    into chunks, or KV heads that "a2a" cannot divide;
    NotImplementedError for another `cp_comm_type`.
    """
    method = check_method(cp_comm_type)
    plan = Layout(layout, group.size())
    check_tensors(query, key, value, scores)
    pool = pool_size(topk, window, stride, pool)
    require_choice("gate", gate, GATES)
    require_choice("backend", backend, BACKENDS)
    whole = query.shape[1] * plan.cp
    bounds = [0, whole]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, scores[:, :1].expand(-1, whole, -1), read=True)
        bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        plan.chunk_length(end - start)
    options: dict[str, Any] = {"topk": topk, "window": window, "stride": stride, "pool": pool, "gate": gate}
    options |= {"softmax_scale": softmax_scale, "backend": backend}
    if method == "a2a":
        return ulysses_attention(
            query, key, value, scores, group=group, order=_global_order(bounds, whole, plan, query.device),
            cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
    pieces = []
    for start, end in pairwise(bounds):
        if start < end:
            part = slice(start // plan.cp, end // plan.cp)
            tensors = (x[:, part] for x in (query, key, value, scores))
            pieces.append(_attend(*tensors, group=group, plan=plan, **options))
    if bounds[-1] < whole:
        pieces.append(_nothing(*(x[:, bounds[-1] // plan.cp :] for x in (query, key, value, scores))))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _nothing(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
    """Zeros like `query` for tokens of no sequence, connected to all inputs: a batch without sequences has gradients
    too."""
    every = torch.ones((), dtype=torch.bool, device=query.device)
    q, k, v, u = (x.masked_fill(every, 0) for x in (query, key, value, scores.to(query.dtype)))
    return q + (k + v + u[..., None]).repeat_interleave(q.shape[2] // k.shape[2], dim=2)


def _global_order(bounds: list[int], whole: int, plan: Layout, device: torch.device) -> Tensor:
    """Position in the packed whole of each token, ranks one after the other: [whole] int64."""
    parts = [*pairwise(bounds)] + [(bounds[-1], whole)] * (bounds[-1] < whole)
    by_rank = []
    for rank in range(plan.cp):
        for start, end in parts:
            tail = end == whole and start == bounds[-1]  # padding behind the last sequence, split evenly
            name = "contiguous" if tail else plan.name
            by_rank.append(start + shard_positions(end - start, plan.cp, rank, name, device))
    return torch.cat(by_rank)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, *, group: dist.ProcessGroup, plan: Layout, topk: int,
    window: int, stride: int, pool: int, **options: Any,
) -> Tensor:  # fmt: skip
    """One sequence: this rank's chunks, each from its start state."""
    length = query.shape[1] // plan.chunks_per_rank
    settings = {"topk": topk, "window": window, "stride": stride, "pool": pool}
    exchange = Exchange(group, plan, Sizes(chunks=plan.chunks, length=length, **settings))
    keys, recent, *extended = StartFromEarlierChunks.apply(key, value, scores, exchange)  # pyright: ignore
    outputs = []
    # split, since the gradient of slices would write whole tensors of zeros.
    for slot, (chunk, own) in enumerate(zip(exchange.owned, query.split(length, dim=1), strict=True)):
        state = SelectionState(
            length=chunk * length,
            pool_scores=pool_scores(keys[slot]),
            pool_index=positions_of(keys[slot]).int(),
            recent_scores=recent[slot],
            threshold=keys.new_full(keys.shape[1:3], float("-inf"), dtype=torch.float64),  # not read
        )
        seen_keys, seen_values, seen_scores = extended[3 * slot : 3 * slot + 3]
        outputs.append(
            attend_extended(own, seen_keys, seen_values, seen_scores, state, **settings, **options)
        )
    return torch.cat(outputs, dim=1)
