# SPDX-License-Identifier: Apache-2.0
"""Heads against sequence: all-to-all before and after attention (`cp_comm_type="a2a"`, DeepSpeed-Ulysses, 2309.14509).

Each rank trades its part of the sequence for all tokens of 1 / cp of its KV heads and attends to them as if there were
no context parallelism. Bytes grow with the sequence: 2 * (1 - 1 / cp) of this rank's q, k, v, out in all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sparsek_kernels import sparsek_attention
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """x [cp, ...] -> [cp, ...]: part i goes to rank i, part j of the result came from rank j. Its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradients[0], ctx.group), None  # pyright: ignore[reportReturnType]


def tokens_for_heads(x: Tensor, group: dist.ProcessGroup, order: Tensor) -> Tensor:
    """[b, s / cp, h, ...] of this rank's tokens -> [b, s, h / cp, ...] of this rank's heads, in sequence order.

    order [s]: sequence position of each token, ranks one after the other.
    """
    parts = torch.stack(x.chunk(group.size(), dim=2))  # by target: heads are contiguous
    got = _AllToAll.apply(parts, group)
    assert isinstance(got, Tensor)
    return got.movedim(0, 1).flatten(1, 2).index_select(1, order.argsort())


def heads_for_tokens(x: Tensor, group: dist.ProcessGroup, order: Tensor) -> Tensor:
    """The way back: [b, s, h / cp, ...] -> [b, s / cp, h, ...]."""
    parts = x.index_select(1, order).unflatten(1, (group.size(), -1)).movedim(1, 0)
    got = _AllToAll.apply(parts, group)
    assert isinstance(got, Tensor)
    return got.movedim(0, 2).flatten(2, 3)


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    group: dist.ProcessGroup,
    order: Tensor,
    **options,
) -> Tensor:
    """`sparsek_attention` of a sequence sharded over `group`: arguments and result hold this rank's tokens.

    Raises ValueError where the KV heads do not divide by the group's size.
    """
    cp, heads = group.size(), key.shape[2]
    if heads % cp:
        raise ValueError(
            f'cp_comm_type="a2a": {heads} KV heads on this tensor-parallel rank do not divide by '
            f'context_parallel_size = {cp}; use cp_comm_type="p2p", or cp a divisor of {heads}'
        )
    whole = [tokens_for_heads(x, group, order) for x in (query, key, value, scores)]
    return heads_for_tokens(sparsek_attention(*whole, **options), group, order)
