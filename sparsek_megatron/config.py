# SPDX-License-Identifier: Apache-2.0
"""`SparseKConfig`: every number of SparseK attention in one validated, immutable object."""

from __future__ import annotations

from dataclasses import dataclass

# As in `sparsek_kernels.settings`, written again since that package imports torch and this file must not.
GATES = ("key_value", "value", "logit")
BACKENDS = ("auto", "triton", "torch")
MAX_POOL = 16_384
SCORERS = ("linear", "mlp")

DEFAULT_REFERENCE_LENGTH = 131_072


def _require_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer >= {least}")


def _require_number(name: str, value: object, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: must be a finite number >= 0")
    if positive and value == 0:
        raise ValueError(f"{name}={value!r}: must be greater than 0")


@dataclass(frozen=True)
class SparseKConfig:
    """Settings of SparseK attention, the same for every layer of a model.

    Attention (the definitions are those of `sparsek_kernels.sparsek_attention`):

    topk              keys selected per query and KV head outside the window
    window            most recent keys (before the query's refresh point) attended with gate 1; at least 1
    stride            queries per refresh of the selection; 1 is the rule of a fresh selection for each token
    pool              candidates among which the threshold is solved; None means 4 * topk. At most 16,384, the largest
                      for which thresholds are exact
    gate              where the gate multiplies: "key_value", "value" or "logit"
    hard_selection    asks by name for pool == topk: all gates 1, and the scorer receives no gradient
    backend           "auto" (Triton on CUDA, torch on CPU), "triton" or "torch"

    Scoring:

    scorer            "linear", or "mlp" (one hidden layer with SiLU). A token's linear score is bitwise the same in any
                      shard or batch; the hidden layer of "mlp" is a library matmul, which does not promise that
    scorer_hidden_size  width of the "mlp" scorer; None means hidden_size // 4
    score_spread      standard deviation of the scores at initialisation, for a normalised input. It acts as a
                      temperature: gates are 1 wide in units of score
    scorer_norm       True gives the scorer a norm of its own, False none; None adds one exactly where the
                      layer's input norm is fused into the QKV projection and the scorer would see the raw
                      residual (TE)
    position_slope    adds the learnable term slope * position / reference_length to the score
    initial_slope     the slope's value at initialisation. A key's score falls by 1 against newer keys in
                      reference_length / slope tokens; None lets that be topk tokens. At 0 a key that once scored high
                      stays until better ones come. Training moves it little: the start is what counts
    reference_length  L_ref in tokens, a constant of the model saved in its checkpoint; None means the model
                      config's max_position_embeddings, or 131,072 where it has none
    detach_hidden     scores send no gradient into the hidden states, only into the scorer
    scorer_lr_mult    learning-rate multiplier of the scorer's parameters (`sparsek_megatron.optimizer`)
    overflow_warning  warn when the pool cut off the support of the unbounded operator at more than this
                      fraction of refresh points; None never checks. Checked every `overflow_interval`
                      training forwards; a replayed CUDA graph runs no Python and is not checked

    Layers:

    dense_layers      global layer indices that keep the stock dense attention; negative ones count from the
                      end
    dense_every       also keeps every Nth layer dense: indices N - 1, 2N - 1, ...; None for no such layers

    Raises ValueError naming the field, its value and the fix.
    """

    topk: int = 512
    window: int = 512
    stride: int = 64
    pool: int | None = None
    gate: str = "key_value"
    hard_selection: bool = False
    backend: str = "auto"
    scorer: str = "linear"
    scorer_hidden_size: int | None = None
    score_spread: float = 1.0
    scorer_norm: bool | None = None
    position_slope: bool = True
    initial_slope: float | None = None
    reference_length: int | None = None
    detach_hidden: bool = False
    scorer_lr_mult: float = 1.0
    overflow_warning: float | None = 0.1
    overflow_interval: int = 500
    dense_layers: tuple[int, ...] = ()
    dense_every: int | None = None

    def __post_init__(self) -> None:
        _require_int("topk", self.topk, 1)
        _require_int("window", self.window, 1)
        _require_int("stride", self.stride, 1)
        asked = self.pool
        if asked is None:
            object.__setattr__(self, "pool", self.topk if self.hard_selection else 4 * self.topk)
        _require_int("pool", self.pool, 1)
        self._check_pool(by_default=asked is None)
        for name, allowed in (("gate", GATES), ("backend", BACKENDS), ("scorer", SCORERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("hard_selection", "position_slope", "detach_hidden"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.scorer_norm not in (None, True, False):
            raise ValueError(f"scorer_norm={self.scorer_norm!r}: must be True, False or None (automatic)")
        for name in ("scorer_hidden_size", "reference_length", "dense_every"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        _require_number("score_spread", self.score_spread, positive=True)
        _require_number("scorer_lr_mult", self.scorer_lr_mult, positive=False)
        if self.initial_slope is not None:
            _require_number("initial_slope", self.initial_slope, positive=False)
        if self.initial_slope and not self.position_slope:
            raise ValueError(
                f"initial_slope={self.initial_slope!r} needs position_slope=True; leave one of them out"
            )
        if self.overflow_warning is not None:
            _require_number("overflow_warning", self.overflow_warning, positive=False)
        _require_int("overflow_interval", self.overflow_interval, 1)
        if isinstance(self.dense_layers, (str, int)) or not all(
            isinstance(i, int) and not isinstance(i, bool) for i in self.dense_layers
        ):
            raise ValueError(f"dense_layers={self.dense_layers!r}: must be layer indices, like (0, -1)")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))

    def _check_pool(self, *, by_default: bool) -> None:
        assert self.pool is not None
        if self.pool > MAX_POOL:
            fix = (
                f"set pool to at most {MAX_POOL}, above topk"
                if self.topk < MAX_POOL
                else "use a smaller topk"
            )
            default = f", the default for topk={self.topk}" if by_default else ""
            raise ValueError(f"pool={self.pool}{default}: thresholds are exact up to {MAX_POOL}; {fix}")
        if self.hard_selection and self.pool != self.topk:
            raise ValueError(
                f"hard_selection=True needs pool == topk, got pool={self.pool}, topk={self.topk}: leave "
                "pool out"
            )
        if self.pool < self.topk:
            raise ValueError(
                f"pool={self.pool} is below topk={self.topk}: use pool > topk (default 4 * topk)"
            )
        if self.pool == self.topk and not self.hard_selection:
            raise ValueError(
                f"pool={self.pool} equals topk: every gate would be 1 and the scorer would not train; use "
                "pool > topk, or hard_selection=True if that is wanted"
            )
