# SPDX-License-Identifier: Apache-2.0
"""The settings that every entry point takes, checked in one way: sizes of a selection, gate, backend, scale."""

from __future__ import annotations

GATES = ("key_value", "value", "logit")
BACKENDS = ("auto", "triton", "torch")
MAX_POOL = 1 << 14
"""Largest pool for which thresholds are exact (`selection.threshold`): 2^14 numbers below 2^38 need 52 bits."""


def require_int(name: str, value: object) -> None:
    """ValueError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def pool_size(
    topk: int, window: int, stride: int, pool: int | None, *, hard: bool | None = None
) -> int:
    """The pool of a selection with these sizes, 4 * topk by default, after checking all of them.

    hard: None allows pool == topk, which is hard selection; True makes it so; False refuses it.
    Raises ValueError naming the size that does not fit.
    """
    for name, value in (("topk", topk), ("window", window), ("stride", stride)):
        require_int(name, value)
    if hard:
        if pool not in (None, topk):
            raise ValueError(f"pool must be None or topk ({topk}) with hard=True, got {pool!r}")
        pool = topk
    if pool is None:
        pool = 4 * topk
        if pool > MAX_POOL:
            raise ValueError(
                f"pool is 4 * topk = {pool} by default and must be at most {MAX_POOL}: pass a pool above topk = {topk}"
            )
    require_int("pool", pool)
    if pool < topk:
        raise ValueError(f"pool must be at least topk = {topk}, got {pool}")
    if pool == topk and hard is False:
        raise ValueError(
            f"pool must be greater than topk ({topk}), got {pool}; pass hard=True for gates of 1 and pool = topk"
        )
    if pool > MAX_POOL:
        raise ValueError(f"pool must be at most {MAX_POOL}, got {pool}")
    return pool


def scale_or_default(softmax_scale: float | None, head_dim: int) -> float:
    """The scale of the logits: d ** -0.5 unless given."""
    require_int("head dimension", head_dim)
    return head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
