# SPDX-License-Identifier: Apache-2.0
"""What a comparison is made of: arms (one attention each), and a table of arms trained on the same tokens and steps.

Every sparse arm runs through the SparseK kernels, so that arms differ in what they keep and in nothing else. With
hard selection (all gates 1) and fixed scores the kernels compute other known patterns exactly:

    scores = position      the topk best are the most recent: a sliding window of topk + window keys
    scores = -position     the topk best are the first ones: attention sinks and a window
    scores random          the topk best of iid numbers: a window and a uniform random sample of all older keys

A model has the same parameters in every arm (a scorer that an arm does not use stays at its initial value).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sparsek_megatron import SparseKConfig
from sparsek_megatron.config import GATES

SCORES = ("learned", "recent", "first", "random", "keys", "dense")


@dataclass(frozen=True)
class Arm:
    """One attention under study.

    sparsek       selection and scorer settings
    scores        "learned" by the scorer from hidden states; fixed: "recent", "first", "random" (see above); "keys": a
                  learned vector per KV head times the normalised keys, after RoPE; "dense": full causal attention
    full_layers  indices of layers with full attention in an otherwise sparse arm
    shared        one selection for all KV heads of a layer (the mean of their scores)
    fixed_slope   the position slope stays at its initial value instead of being learned
    start         name of an arm of the same table whose trained weights this arm starts from
    part_of_steps  fraction of the table's steps that this arm trains for
    rate          multiplier of the table's learning rate
    length        tokens of this arm's sequences; None means the table's
    """

    name: str
    sparsek: SparseKConfig
    scores: str = "learned"
    full_layers: tuple[int, ...] = ()
    shared: bool = False
    fixed_slope: bool = False
    start: str | None = None
    part_of_steps: float = 1.0
    rate: float = 1.0
    length: int | None = None

    def __post_init__(self) -> None:
        if self.scores not in SCORES:
            raise ValueError(f"scores={self.scores!r}: must be one of {', '.join(SCORES)}")


@dataclass(frozen=True)
class Model:
    """Size of the model; RMSNorm, SwiGLU, RoPE, tied embeddings."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 704
    num_attention_heads: int = 4
    num_query_groups: int = 2
    init_method_std: float = 0.02


@dataclass(frozen=True)
class Table:
    """Arms that train on the same batches.

    data            "text", "passkey", "recall", "lookup", "lookup_many", "genome" or "series" (`data.py`)
    eval_lengths    lengths that the trained model is evaluated at; none means the training length
    evaluation_tokens  held-out tokens of each evaluation
    far             positions from here on count as "beyond the window"; for recall tasks distances
    reference       name of the arm that losses are also given against
    """

    title: str
    arms: tuple[Arm, ...]
    data: str = "text"
    length: int = 4096
    tokens_per_step: int = 32_768
    steps: int = 600
    learning_rate: float = 2e-3
    model: Model = dataclasses.field(default_factory=Model)
    eval_lengths: tuple[int, ...] = ()
    evaluation_tokens: int = 1_048_576
    far: int = 1024
    reference: str = "dense"


def fixed(name: str, scores: str, topk: int, window: int, stride: int) -> Arm:
    """An arm without learned selection: hard gates over fixed scores."""
    hard = SparseKConfig(
        topk=topk, window=window, stride=stride, hard_selection=True, initial_slope=0.0, overflow_warning=None
    )
    return Arm(name, hard, scores=scores)


def learned(name: str, topk: int, window: int, stride: int, **settings: object) -> Arm:
    """A SparseK arm; its position slope starts at 0 unless `initial_slope` says otherwise."""
    settings = {"initial_slope": 0.0, **settings}
    sparsek = {name: value for name, value in settings.items() if name in SparseKConfig.__dataclass_fields__}
    rest = {name: value for name, value in settings.items() if name not in sparsek}
    base = SparseKConfig(topk=topk, window=window, stride=stride, overflow_warning=None, **sparsek)  # pyright: ignore
    return Arm(name, base, **rest)  # pyright: ignore


def baselines(topk: int, window: int, stride: int) -> tuple[Arm, ...]:
    """Dense attention, and every fixed pattern of topk + window keys (and the window alone)."""
    both = topk + window
    return (
        fixed("dense", "dense", topk, window, stride),
        fixed(f"window {both}", "recent", topk, window, stride),
        fixed(f"window {window}", "recent", 1, window - 1, stride),
        fixed(f"window {window} + random {topk}", "random", topk, window, stride),
        fixed(f"window {both - 4} + 4 sinks", "first", 4, both - 4, stride),
    )


def equal_budget(
    topk: int, window: int, stride: int, rates: tuple[tuple[str, float], ...] = (("key_value", 0.1),)
) -> tuple[Arm, ...]:
    """The baselines, SparseK with each gate, and SparseK with hard selection (whose scorer gets no gradient).

    rates: gates that also come with another learning-rate multiplier of the scorer than 1, and that multiplier.
    """
    gates = tuple(learned(f"SparseK {gate}", topk, window, stride, gate=gate) for gate in GATES)
    other_rates = tuple(
        learned(
            f"SparseK {gate}, scorer rate x {rate:g}", topk, window, stride, gate=gate, scorer_lr_mult=rate
        )
        for gate, rate in rates
    )
    hard = learned("SparseK hard", topk, window, stride, hard_selection=True)
    return (*baselines(topk, window, stride), *gates, *other_rates, hard)


def longer(arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """Dense attention trained on short sequences, and the arms, each going on from it at the table's length.

    As long contexts are trained in practice; each arm then differs from the others only in what it makes of the
    tokens that lie far back.
    """
    first = dataclasses.replace(fixed("pretrained", "dense", 1, 1, 1), length=1024)
    return (first, *(dataclasses.replace(arm, start="pretrained", rate=0.3) for arm in arms))
