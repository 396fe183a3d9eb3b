# SPDX-License-Identifier: Apache-2.0
"""The public functions of selection: checks of the arguments, then the backend."""

from __future__ import annotations

import os
from itertools import pairwise

import torch

from sparsek_kernels.settings import BACKENDS, pool_size, require_choice

from . import torch_backend
from .geometry import Geometry
from .triton_backend import select_triton
from .types import Selection, SelectionState

MAX_KEYS = (1 << 31) - 1
MAX_ROWS = 65_535  # rows are the second dimension of the kernels' grids


def _check_scores(scores: object) -> torch.Tensor:
    if not isinstance(scores, torch.Tensor) or scores.dtype != torch.float32:
        kind = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"scores must be a float32 tensor, got {kind}; compute scores in float32")
    if scores.dim() != 3:
        raise ValueError(f"scores must be [b, s, num_query_groups], got shape {tuple(scores.shape)}")
    if scores.numel() == 0:
        raise ValueError(f"scores must hold at least one token and head, got shape {tuple(scores.shape)}")
    return scores.detach()


def check_cu_seqlens(cu_seqlens: object, scores: torch.Tensor, *, read: bool = False) -> None:
    """ValueError unless `cu_seqlens` can pack sequences along scores [1, s, ...]. Its values are read on the CPU, or
    anywhere where `read` asks for it (which waits for the device)."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens must be an int32 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            "cu_seqlens must be int32 of shape [num_seqs + 1], "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if scores.shape[0] != 1:
        raise ValueError(f"scores must have batch 1 with cu_seqlens, got batch {scores.shape[0]}")
    if cu_seqlens.device != scores.device:
        raise ValueError(f"cu_seqlens must be on {scores.device} like scores, got {cu_seqlens.device}")
    if read or not cu_seqlens.is_cuda:
        values = cu_seqlens.tolist()
        if values[0] != 0 or any(x > y for x, y in pairwise(values)) or values[-1] > scores.shape[1]:
            raise ValueError(
                f"cu_seqlens must start at 0, never decrease and end at or before s = {scores.shape[1]}, got {values}"
            )


def _check_state(
    state: object, scores: torch.Tensor, topk: int, pool: int, window: int, stride: int
) -> None:
    if not isinstance(state, SelectionState):
        raise ValueError(f"state must be a SelectionState, got {type(state).__name__}")
    for name, value in (("topk", topk), ("window", window), ("stride", stride)):
        made_with = getattr(state, name)
        if made_with is not None and made_with != value:
            raise ValueError(f"{name} must be {made_with} as in the call that made the state, got {value}")
    rows = (scores.shape[0], scores.shape[2])
    expected = {
        "pool_scores": (*rows, pool),
        "pool_index": (*rows, pool),
        "recent_scores": (*rows, window + stride - 1),
        "threshold": rows,
    }
    for name, shape in expected.items():
        tensor = getattr(state, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"state.{name} must have shape {shape}, got {tuple(tensor.shape)}; "
                "continue with the topk, window, stride and pool that made the state"
            )
        if tensor.device != scores.device:
            raise ValueError(f"state.{name} must be on {scores.device} like scores, got {tensor.device}")


def _check_values(scores: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    used = scores if cu_seqlens is None else scores[:, : int(cu_seqlens[-1])]
    bad = ~torch.isfinite(used)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"scores must be finite, got {used[where].item()} at {where}")


def _use_triton(backend: str, scores: torch.Tensor) -> bool:
    if backend == "triton" and not (scores.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f'backend "triton" needs scores on a CUDA device, got {scores.device}; use backend="torch"'
        )
    return scores.is_cuda if backend == "auto" else backend == "triton"


def select(
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int = 64,
    pool: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state: SelectionState | None = None,
    return_state: bool = False,
    hard: bool = False,
    backend: str = "auto",
    check: bool = False,
) -> Selection:
    """Which keys every query attends to, and the threshold of their gates, in time linear in s.

    scores      [b, s, hkv] float32, any strides: one score per key and KV head (all query heads of a group share it).
                The result is not differentiable; its score gradient is `score_gradient`.
    topk        selected keys per query, >= 1.
    window      tokens before the refresh point that every query attends to, >= 1.
    stride      queries per refresh point, >= 1.
    pool        keys the threshold is solved over; default 4 * topk; topk < pool <= 16,384.
    cu_seqlens  [num_seqs + 1] int32 on the scores' device: sequences packed along s (b = 1), each selected alone.
                Scores past cu_seqlens[-1] are never read. Empty sequences are allowed.
    state       continue after the tokens of an earlier call: the result is bitwise that of one call over both.
    return_state  also compute `Selection.state`.
    hard        pool = topk: all gates 1, no score gradient.
    backend     "triton" (CUDA), "torch" (any device, synchronises), "auto": by the scores' device.
    check       also refuse non-finite scores and malformed cu_seqlens. Reads device data, hence synchronises; on
                the CPU cu_seqlens are always checked. Without it non-finite scores select unspecified keys.

    Raises ValueError for bad arguments and NotImplementedError for `cu_seqlens` together with a state.
    """
    scores = _check_scores(scores)
    size = pool_size(topk, window, stride, pool, hard=hard)
    require_choice("backend", backend, BACKENDS)
    if scores.shape[1] + size + window + stride > MAX_KEYS:
        raise ValueError(f"s + pool + window + stride must be at most {MAX_KEYS}, got s = {scores.shape[1]}")
    if cu_seqlens is not None:
        if state is not None or return_state:
            raise NotImplementedError(
                "cu_seqlens cannot be combined with state: carry one state per sequence"
            )
        check_cu_seqlens(cu_seqlens, scores, read=check)
    if state is not None:
        _check_state(state, scores, topk, size, window, stride)
    if check:
        _check_values(scores, cu_seqlens)
    geometry = _geometry(scores, size, window, stride, state)
    if _use_triton(backend, scores):
        if scores.shape[0] * scores.shape[2] > MAX_ROWS:
            raise NotImplementedError(
                f"scores have {scores.shape[0] * scores.shape[2]} rows (batch x heads); "
                f"the triton backend takes up to {MAX_ROWS}"
            )
        return select_triton(
            scores,
            cu_seqlens,
            topk=topk,
            geometry=geometry,
            hard=hard,
            state=state,
            return_state=return_state,
        )
    if cu_seqlens is not None:
        return torch_backend.select_packed(
            scores, cu_seqlens, topk=topk, window=window, stride=stride, pool=size, hard=hard
        )
    return torch_backend.select_rows(
        scores, topk=topk, geometry=geometry, hard=hard, state=state, return_state=return_state
    )


def _geometry(
    scores: torch.Tensor, pool: int, window: int, stride: int, state: SelectionState | None
) -> Geometry:
    past = 0 if state is None else state.length
    return Geometry(
        past=past, s=scores.shape[1], window=window, stride=stride, pool=pool, stateful=state is not None
    )


def pool_indices(
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int = 64,
    pool: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state: SelectionState | None = None,
    hard: bool = False,
) -> torch.Tensor:
    """Key indices of the pool at every refresh slot: [b, hkv, R, pool] int64, score descending, -1 past its end.

    Arguments as in `select`. Indices count as in `Selection` (0 ... E - 1). The first `topk` entries are the selected
    keys, and `sparsek(scores of the pool, topk)` their gates. Reference for differentiable attention: torch only, and
    memory of R * pool.
    """
    scores = _check_scores(scores)
    size = pool_size(topk, window, stride, pool, hard=hard)
    if cu_seqlens is not None:
        if state is not None:
            raise NotImplementedError(
                "cu_seqlens cannot be combined with state: carry one state per sequence"
            )
        check_cu_seqlens(cu_seqlens, scores, read=True)
        return torch_backend.pool_packed(scores, cu_seqlens, window=window, stride=stride, pool=size)
    if state is not None:
        _check_state(state, scores, topk, size, window, stride)
    return torch_backend.pool_rows(
        scores, geometry=_geometry(scores, size, window, stride, state), state=state
    )
