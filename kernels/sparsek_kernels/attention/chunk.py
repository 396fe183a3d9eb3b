# SPDX-License-Identifier: Apache-2.0
"""Attention of one chunk of a sequence on top of everything before it: prefill of any length in constant memory, and
the building block of context parallelism.

`AttentionState` is `SelectionState` with the key and value rows that later tokens can still attend to. Its size depends
on topk, window, stride and pool only. A sequence cut into chunks anywhere gets the outputs of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from sparsek_kernels.attention.api import check_tensors, resolve_backend
from sparsek_kernels.attention.autograd import attend_selected
from sparsek_kernels.attention.reference import attend_sequence, compute_dtype, gather_rows
from sparsek_kernels.selection import Selection, SelectionState, select
from sparsek_kernels.selection.geometry import Geometry
from sparsek_kernels.selection.torch_backend import extend_scores
from sparsek_kernels.settings import BACKENDS, GATES, pool_size, require_choice, scale_or_default


@dataclass(frozen=True)
class AttentionState:
    """What a prefix of a sequence leaves behind for the tokens after it.

    selection   scores and positions: `SelectionState`; its scores carry gradients where the inputs do
    key, value  [b, topk + window + stride - 1, hkv, d]: rows of the selected keys, best first, then of the last
                window + stride - 1 tokens, oldest first. Places without a key hold zeros.
    """

    selection: SelectionState
    key: torch.Tensor
    value: torch.Tensor


def sparsek_attention_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int = 64,
    pool: int | None = None,
    gate: str = "key_value",
    softmax_scale: float | None = None,
    state: AttentionState | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, AttentionState]:
    """`sparsek_attention` of the next tokens of a sequence.

    Arguments as in `sparsek_attention`, shapes of this chunk. `state` is what the call on the chunk
    before returned, None at the start of the sequence. Returns (out [b, s, hq, d], the state after this chunk).

    Differentiable, through the state too: a sequence cut into chunks gets the gradients of the whole.

    Raises ValueError for arguments that do not fit each other or the state.
    """
    check_tensors(query, key, value, scores)
    pool = pool_size(topk, window, stride, pool)
    require_choice("gate", gate, GATES)
    require_choice("backend", backend, BACKENDS)
    _check_state(state, key, topk, window, stride)
    scale = scale_or_default(softmax_scale, query.shape[-1])
    options = {"topk": topk, "window": window, "stride": stride, "pool": pool}
    before = None if state is None else detached(state.selection)
    with torch.no_grad():
        selection = select(scores.float(), **options, hard=pool == topk, state=before, return_state=True)
    rows = (None, None) if state is None else (state.key, state.value)
    keys, values = (
        extend_rows(x, carried, topk, pool) for x, carried in zip((key, value), rows, strict=True)
    )
    every = extend_scores(scores, None if state is None else state.selection)
    out = attend_extended(
        query, keys, values, every.masked_fill(every == float("-inf"), 0), before, selection, **options,
        gate=gate, softmax_scale=scale, backend=backend,
    )  # fmt: skip
    return out, _advance(selection, keys, values, every, state)


def attend_extended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    state: SelectionState | None,
    selection: Selection | None = None,
    *,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    gate: str,
    softmax_scale: float,
    backend: str,
) -> torch.Tensor:
    """Attention of s queries to the E keys they can see, carried ones first: differentiable in all four tensors.

    query [b, s, hq, d]; key, value [b, E, hkv, d]; scores [b, E, hkv], finite (0 in empty places of the state).
    The state (detached) decides the selection together with the last s scores; `selection` spares computing it again.
    """
    options = {"topk": topk, "window": window, "stride": stride, "pool": pool}
    if resolve_backend(backend, query) == "triton":
        if selection is None:
            with torch.no_grad():
                own = scores[:, -query.shape[1] :].float()
                selection = select(own, **options, hard=pool == topk, state=state)
        return attend_selected(query, key, value, scores, selection, gate=gate, softmax_scale=softmax_scale)
    inputs = (x.to(compute_dtype(query)) for x in (query, key, value, scores))
    return attend_sequence(*inputs, **options, gate=gate, softmax_scale=softmax_scale, state=state).to(
        query.dtype
    )


def detached(state: SelectionState) -> SelectionState:
    """The state as `select` takes it: fp32 scores without their graph."""
    scores = {name: getattr(state, name).detach().float() for name in ("pool_scores", "recent_scores")}
    return replace(state, **scores)


def _check_state(
    state: AttentionState | None, key: torch.Tensor, topk: int, window: int, stride: int
) -> None:
    if state is None:
        return
    if not isinstance(state, AttentionState):
        raise ValueError(f"state must be an AttentionState, got {type(state).__name__}")
    shape = (key.shape[0], topk + window + stride - 1, *key.shape[2:])
    for name, rows in (("key", state.key), ("value", state.value)):
        if tuple(rows.shape) != shape or rows.dtype != key.dtype or rows.device != key.device:
            raise ValueError(
                f"state.{name} is {rows.dtype} {tuple(rows.shape)} on {rows.device}; this call needs {key.dtype} "
                f"{shape} on {key.device}: continue with the settings and tensors that made the state"
            )


def extend_rows(x: torch.Tensor, rows: torch.Tensor | None, topk: int, pool: int) -> torch.Tensor:
    """Rows of all E keys: carried pool (only its selected rows are ever read), recent tokens, this chunk."""
    if rows is None:
        return x
    unread = x.new_zeros(x.shape[0], pool - topk, *x.shape[2:])
    return torch.cat([rows[:, :topk], unread, rows[:, topk:], x], dim=1)


def _pool_keys(selection: Selection, state: AttentionState | None, keys: int) -> torch.Tensor:
    """Key index (0 ... E - 1) of every member of the pool after the chunk, [b, hkv, pool] int64; 0 where empty."""
    after = selection.state
    assert after is not None
    past, tokens = selection.past, after.length - selection.past
    position = after.pool_index.long()
    index = position - past + keys - tokens
    if state is not None:
        geometry = Geometry(
            past=past,
            s=tokens,
            window=selection.window,
            stride=selection.stride,
            pool=selection.pool,
            stateful=True,
        )
        carried, order = state.selection.pool_index.long().sort(dim=-1)
        place = torch.searchsorted(carried, position).clamp(max=selection.pool - 1)
        index = torch.where(position < geometry.first_candidate, order.gather(-1, place), index)
    return torch.where(position < 0, 0, index)


def _advance(
    selection: Selection,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    state: AttentionState | None,
) -> AttentionState:
    """The state after a chunk, gathered from all its E keys, so that gradients flow back to them."""
    after = selection.state
    assert after is not None
    recent = selection.window + selection.stride - 1
    index = _pool_keys(selection, state, keys.shape[1])
    empty = after.pool_index < 0
    chosen = index[..., : selection.topk]
    unchosen = empty[..., : selection.topk].transpose(1, 2)[..., None]
    first = 0 if state is None else selection.pool  # of the tokens, recent ones included

    def rows(x: torch.Tensor) -> torch.Tensor:
        best = gather_rows(x.transpose(1, 2), chosen).transpose(1, 2).masked_fill(unchosen, 0)
        last = x[:, first:][:, -recent:]
        return torch.cat([best, pad(last, (0, 0, 0, 0, recent - last.shape[1], 0))], dim=1)

    columns = scores.transpose(1, 2)
    last = columns[..., first:][..., -recent:]
    carried = replace(
        after,
        pool_scores=columns.gather(-1, index).masked_fill(empty, float("-inf")),
        recent_scores=pad(last, (recent - last.shape[-1], 0), value=float("-inf")),
    )
    return AttentionState(carried, rows(keys), rows(values))
