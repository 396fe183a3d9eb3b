# SPDX-License-Identifier: Apache-2.0
"""Generation in torch: the definition of what the Triton kernels compute, on any device.

Rows of the batch may have different lengths and refresh at different steps. It synchronises where rows are refreshed.
"""

from __future__ import annotations

import torch

from sparsek_kernels.attention.chunk import sparsek_attention_chunk
from sparsek_kernels.attention.reference import product
from sparsek_kernels.cache.layout import Buffers, CacheSettings
from sparsek_kernels.cache.state import read_state, write_state
from sparsek_kernels.selection.threshold import exact_threshold, split


def prefill_torch(
    buffers: Buffers,
    settings: CacheSettings,
    past: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Append s tokens to rows that all hold `past`, and return their attention: query [b, s, hq, d] -> the same shape.

    key, value [b, s, hkv, d], scores [b, s, hkv] fp32.
    """
    out, state = sparsek_attention_chunk(
        query, key, value, scores,
        topk=settings.topk, window=settings.window, stride=settings.stride, pool=settings.pool, gate=settings.gate,
        softmax_scale=settings.softmax_scale, state=read_state(buffers, settings, past) if past else None,
        backend="torch",
    )  # fmt: skip
    write_state(buffers, settings, state, past + scores.shape[1])
    return out


def append_torch(
    buffers: Buffers, settings: CacheSettings, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
) -> None:
    """Store one token per row and refresh the rows that it brings to a refresh point.

    key, value [b, hkv, d], scores [b, hkv] fp32.
    """
    position = buffers.length.long()
    row = settings.topk + position % settings.ring
    for target, new in ((buffers.key, key), (buffers.value, value)):
        target.scatter_(2, row[..., None, None].expand(*row.shape, 1, new.shape[-1]), new[:, :, None])
    buffers.score.scatter_(2, row[..., None], scores[..., None])
    buffers.length.add_(1)
    due = (position[:, 0] % settings.stride == 0) & (position[:, 0] >= settings.window)
    if bool(due.any()):
        index = due.nonzero().squeeze(1)
        part = buffers.map(lambda x: x[index])
        _refresh(part, settings, position[index])
        for name, tensor in part.tensors().items():
            getattr(buffers, name)[index] = tensor


def _refresh(buffers: Buffers, settings: CacheSettings, position: torch.Tensor) -> None:
    """Offer the tokens that left the window to the pool. position [rows, hkv]: the refresh point, the newest token."""
    topk, pool = settings.topk, settings.pool
    first = position - settings.stride - settings.window + 1
    offered = first[..., None] + torch.arange(settings.stride, device=position.device)
    source = topk + offered % settings.ring
    newcomers = buffers.score.gather(2, source).masked_fill(offered < 0, float("-inf"))
    # Stable: the pool's keys come first and newcomers in order of position, so ties go to the lower position.
    merged, order = torch.cat([buffers.pool, newcomers], dim=2).sort(dim=2, descending=True, stable=True)
    rank, kept = order[..., :topk], order[..., :topk] < topk
    entered = (
        order[..., :topk] >= pool
    )  # ranks of the pool beyond topk never return, so the rest are newcomers
    # The e-th newcomer takes the place of the e-th of the keys that leave; these are the last ranks.
    leaving = topk - entered.sum(-1, keepdim=True) + entered.cumsum(-1) - 1
    place = buffers.place.long().gather(2, torch.where(kept, rank, leaving))
    origin = source.gather(2, (rank - pool).clamp(min=0))
    origin = torch.where(entered & (merged[..., :topk] > float("-inf")), origin, place)  # else onto itself
    for x in (buffers.key, buffers.value):
        moved = x.gather(2, origin[..., None].expand(*origin.shape, x.shape[-1]))
        x.scatter_(2, place[..., None].expand(*place.shape, x.shape[-1]), moved)
    buffers.score.scatter_(2, place, merged[..., :topk])
    buffers.place.copy_(place)
    buffers.pool.copy_(merged[..., :pool])
    tau = exact_threshold(buffers.pool, topk)
    buffers.threshold.copy_(torch.stack(split(tau), dim=-1))


def attend_torch(buffers: Buffers, settings: CacheSettings, query: torch.Tensor) -> torch.Tensor:
    """Attention of each row's newest token, in fp32: query [b, hq, d] -> [b, hq, d]."""
    heads, topk = settings.num_kv_heads, settings.topk
    position = buffers.length.long()[..., None] - 1
    refresh = position // settings.stride * settings.stride
    place = torch.arange(settings.ring, device=query.device)
    recent = position - (position - place) % settings.ring  # the position that lives in each place
    local = (recent >= 0) & (recent > refresh - settings.window)
    selected = buffers.score[..., :topk]
    present = selected > float("-inf")
    mask = torch.cat([present, local], dim=-1)[:, :, None]
    gates = ((selected - buffers.threshold[..., :1]) - buffers.threshold[..., 1:]).clamp(settings.floor, 1.0)
    gates = torch.cat([gates.masked_fill(~present, 1.0), torch.ones_like(local, dtype=gates.dtype)], dim=-1)
    gates = gates[:, :, None]
    q = query.float().unflatten(1, (heads, -1))  # [b, hkv, group, d]
    logits = product(q, buffers.key.float().transpose(-1, -2)) * settings.softmax_scale
    if settings.gate == "key_value":
        logits = logits * gates
    elif settings.gate == "logit":
        logits = logits + gates.log()
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)
    if settings.gate != "logit":
        weights = weights * gates
    return product(weights, buffers.value.float()).flatten(1, 2).to(query.dtype)
