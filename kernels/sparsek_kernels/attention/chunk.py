# SPDX-License-Identifier: Apache-2.0
"""Attention of one chunk of a sequence on top of everything before it: prefill of any length in constant memory.

`AttentionState` is `SelectionState` with the key and value rows that later tokens can still attend to. Its size depends
on topk, window, stride and pool only. A sequence cut into chunks anywhere gets the outputs of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsek_kernels.attention.api import check_arguments, resolve_backend
from sparsek_kernels.attention.autograd import triton_chunk
from sparsek_kernels.attention.reference import attend_sequence, compute_dtype, gather_rows
from sparsek_kernels.selection import SelectionState, select


@dataclass(frozen=True)
class AttentionState:
    """What a prefix of a sequence leaves behind for the tokens after it.

    selection   scores and positions: `SelectionState`
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
    """`sparsek_attention` of the next tokens of a sequence, without gradients.

    Arguments as in `sparsek_attention`, shapes of this chunk. `state` is what the call on the chunk
    before returned, None at the start of the sequence. Returns (out [b, s, hq, d], the state after this chunk).

    Raises ValueError for arguments that do not fit each other or the state, NotImplementedError where a gradient is
    asked for.
    """
    pool = 4 * topk if pool is None else pool
    check_arguments(query, key, value, scores, topk, window, stride, pool, gate, None, backend)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, scores)):
        raise NotImplementedError("sparsek_attention_chunk has no gradient: call it under torch.no_grad()")
    _check_state(state, key, topk, window, stride)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    options = {"topk": topk, "window": window, "stride": stride, "pool": pool}
    with torch.no_grad():
        before = None if state is None else state.selection
        selection = select(scores.float(), **options, hard=pool == topk, state=before, return_state=True)
        assert selection.state is not None
        carried = (None, None) if state is None else (state.key, state.value)
        keys, values = (_extend(x, rows, topk, pool) for x, rows in zip((key, value), carried, strict=True))
        if resolve_backend(backend, query) == "triton":
            out = triton_chunk(query, keys, values, scores, selection, before, gate=gate, softmax_scale=scale)
        else:
            inputs = (x.to(compute_dtype(query)) for x in (query, keys, values, scores))
            out = attend_sequence(*inputs, **options, gate=gate, softmax_scale=scale, state=before).to(
                query.dtype
            )
        return out, _advance(
            selection.state, keys, values, state, topk, window + stride - 1, key.shape[1], pool
        )


def _check_state(
    state: AttentionState | None, key: torch.Tensor, topk: int, window: int, stride: int
) -> None:
    if state is None:
        return
    shape = (key.shape[0], topk + window + stride - 1, *key.shape[2:])
    for name, rows in (("key", state.key), ("value", state.value)):
        if tuple(rows.shape) != shape or rows.dtype != key.dtype or rows.device != key.device:
            raise ValueError(
                f"state.{name} is {rows.dtype} {tuple(rows.shape)} on {rows.device}; this call needs {key.dtype} "
                f"{shape} on {key.device}: continue with the settings and tensors that made the state"
            )


def _extend(x: torch.Tensor, rows: torch.Tensor | None, topk: int, pool: int) -> torch.Tensor:
    """Rows of all E keys: carried pool (only its selected rows are ever read), recent tokens, this chunk."""
    if rows is None:
        return x
    unread = x.new_zeros(x.shape[0], pool - topk, *x.shape[2:])
    return torch.cat([rows[:, :topk], unread, rows[:, topk:], x], dim=1)


def _advance(after, keys, values, state, topk, recent, tokens, pool) -> AttentionState:
    """The state after a chunk: find the key index of every selected position, and gather the rows."""
    extra = keys.shape[1] - tokens  # keys before this chunk's tokens
    past = after.length - tokens
    selected = after.pool_index[..., :topk].long()  # positions, -1 where empty
    index = selected - past + extra
    if state is not None:
        old = selected < past
        # A position from before this chunk is in the carried selection, or among the recent tokens.
        match = state.selection.pool_index[..., None, :topk] == selected[..., None]
        index = torch.where(old & match.any(-1), match.int().argmax(-1), index)
    index = torch.where(selected < 0, 0, index)
    empty = (selected < 0).transpose(1, 2)[..., None]

    def rows(x: torch.Tensor) -> torch.Tensor:
        chosen = gather_rows(x.transpose(1, 2), index).transpose(1, 2).masked_fill(empty, 0)
        last = x[:, max(extra - recent, 0) :][:, -recent:]
        return torch.cat(
            [chosen, torch.nn.functional.pad(last, (0, 0, 0, 0, recent - last.shape[1], 0))], dim=1
        )

    return AttentionState(after, rows(keys), rows(values))
