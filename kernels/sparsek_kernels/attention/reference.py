# SPDX-License-Identifier: Apache-2.0
"""The torch backend of `sparsek_attention`: the definition, one group of refresh points at a time.

Every query attends to two gathered sets of keys, in one softmax: the `topk` best of the pool at its refresh
point, weighted by SparseK gates, and the local keys with gate 1. Nothing here knows about evictions or
intervals, which makes it an independent check of the Triton kernels; autograd differentiates it, gates
included.

Time O(n (topk + window + stride)); memory the same for one chunk of queries: later chunks are recomputed in backward.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint

from sparsek_kernels.operator import sparsek
from sparsek_kernels.selection import SelectionState, pool_indices

QUERIES_PER_CHUNK = 1024


def compute_dtype(query: torch.Tensor) -> torch.dtype:
    """What the torch backend computes in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in their own dtype, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [b, h, n, d] at index [b, h, ...]: [b, h, ..., d]."""
    flat = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*index.shape, x.shape[-1])


def pool_gates(scores: torch.Tensor, pool: torch.Tensor, topk: int) -> torch.Tensor:
    """Gates of the selected keys, differentiable through every score of the pool.

    scores [b, h, n]; pool [b, h, R, P] key indices, best first, -1 where empty -> gates [b, h, R, topk].
    A pool that holds at most `topk` keys gates them all with 1.
    """
    values = scores.gather(2, pool.clamp(min=0).flatten(2)).view(pool.shape)
    if pool.shape[-1] <= topk:
        return values * 0 + 1
    empty = pool < 0
    # An empty place must get gate 0: two below the topk-th score is outside the operator's support.
    values = torch.where(empty, values[..., topk - 1 : topk].detach() - 2, values)
    full = (~empty).sum(-1, keepdim=True) > topk
    return torch.where(full, sparsek(values, topk)[..., :topk], 1.0)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    pool: torch.Tensor,
    first_slot: int,
    shift: int,
    topk: int,
    window: int,
    stride: int,
    gate: str,
    softmax_scale: float,
) -> torch.Tensor:
    """Attention of the queries of some consecutive refresh points.

    query [b, h, g, r, stride, d], key/value [b, h, E, d], scores [b, h, E], pool [b, h, r, P] -> like query.
    first_slot: the first refresh point divided by stride; shift: key index of a token minus its position.
    """
    slots = pool.shape[2]
    device = query.device
    refresh = (first_slot + torch.arange(slots, device=device))[:, None] * stride  # [r, 1]
    local = refresh - window + 1 + torch.arange(window + stride - 1, device=device)  # [r, w + stride - 1]
    position = refresh + torch.arange(stride, device=device)  # [r, stride]
    local_mask = (local[:, None, :] >= 0) & (local[:, None, :] <= position[:, :, None])  # [r, stride, L]

    selected = pool[..., :topk]
    width = selected.shape[-1]
    index = torch.cat(
        [selected.clamp(min=0), (local + shift).clamp(0, key.shape[2] - 1).expand(*pool.shape[:2], -1, -1)],
        dim=-1,
    )
    mask = torch.cat(
        [
            (selected >= 0)[:, :, :, None, :].expand(-1, -1, -1, stride, -1),
            local_mask.expand(*pool.shape[:2], -1, -1, -1),
        ],
        dim=-1,
    )[:, :, None]  # [b, h, 1, r, stride, topk + L]
    gates = pool_gates(scores, pool, topk)
    gates = torch.cat([gates[..., :width], gates.new_ones(*gates.shape[:3], local.shape[-1])], dim=-1)
    gates = gates[:, :, None, :, None, :]  # [b, h, 1, r, 1, topk + L]

    keys = gather_rows(key, index)[:, :, None]  # [b, h, 1, r, topk + L, d]
    values = gather_rows(value, index)[:, :, None]
    logits = product(query, keys.transpose(-1, -2)) * softmax_scale
    if gate == "key_value":
        logits = logits * gates
    elif gate == "logit":
        logits = logits + gates.clamp(min=1.0 / (max(pool.shape[-1] - topk, 0) + 1)).log()
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)
    if gate != "logit":
        weights = weights * gates
    return product(weights, values)


def attend_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    gate: str,
    softmax_scale: float,
    state: SelectionState | None = None,
) -> torch.Tensor:
    """One sequence per row: query [b, s, hq, d], key/value [b, E, hkv, d], scores [b, E, hkv] -> [b, s, hq, d].

    E = s, or with a state all keys this call can see (`selection.types`); rows that no query attends to are not read.
    The state's own scores decide the selection; gradients go to `scores`.
    """
    batch, length, heads, dim = query.shape
    groups = key.shape[2]
    index = pool_indices(
        scores[:, -query.shape[1] :].detach().float(),
        topk=topk,
        window=window,
        stride=stride,
        pool=pool,
        hard=pool == topk,
        state=state,
    )
    past = 0 if state is None else state.length
    slots, front = index.shape[2], past % stride  # the first refresh point may lie before this call
    padded = torch.nn.functional.pad(query, (0, 0, 0, 0, front, slots * stride - length - front))
    q = padded.view(batch, slots, stride, groups, heads // groups, dim).permute(0, 3, 4, 1, 2, 5)
    k, v, u = (x.transpose(1, 2) for x in (key, value, scores))
    shift = key.shape[1] - length - past

    step = max(1, QUERIES_PER_CHUNK // stride)
    outputs = []
    for start in range(0, slots, step):
        args = (q[:, :, :, start : start + step], k, v, u, index[:, :, start : start + step])
        args = (*args, past // stride + start, shift, topk, window, stride, gate, softmax_scale)
        if slots > step and torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, *args, use_reentrant=False))
        else:
            outputs.append(_attend(*args))
    out = torch.cat(outputs, dim=3).permute(0, 3, 4, 1, 2, 5)
    return out.reshape(batch, slots * stride, heads, dim)[:, front : front + length]


def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    gate: str,
    softmax_scale: float,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sparsek_attention` on any device, arguments already validated; computes in fp32 (fp64 for fp64 inputs)."""
    dtype = compute_dtype(query)
    tensors = [x.to(dtype) for x in (query, key, value, scores)]
    options = {
        "topk": topk,
        "window": window,
        "stride": stride,
        "pool": pool,
        "gate": gate,
        "softmax_scale": softmax_scale,
    }
    if cu_seqlens is None:
        return attend_sequence(*tensors, **options).to(query.dtype)
    bounds = cu_seqlens.tolist()
    pieces = [
        attend_sequence(*(x[:, start:end] for x in tensors), **options)
        for start, end in pairwise(bounds)
        if end > start
    ]
    # Rows past the last sequence are 0, and connected to all inputs: a batch of empty sequences has gradients too.
    every = torch.ones((), dtype=torch.bool, device=query.device)
    q, k, v, u = (x[:, bounds[-1] :].masked_fill(every, 0) for x in tensors)
    pieces.append(q + (k + v + u[..., None]).repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    return torch.cat(pieces, dim=1).to(query.dtype)
