# SPDX-License-Identifier: Apache-2.0
"""What is compared: arms (one attention each) and tables (arms trained on the same tokens for the same steps).

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


def ablations(slope: float) -> tuple[Arm, ...]:
    """SparseK with one setting varied at a time, at 256 keys a query; the first arm is what the others vary."""

    def arm(name: str, topk: int = 128, window: int = 128, **settings: object) -> Arm:
        base = {"stride": 64, "scorer_lr_mult": 10.0, "initial_slope": slope}
        return learned(name, topk, window, **{**base, **settings})  # pyright: ignore

    return (
        arm(BASE),
        *(arm(f"topk {k} + window {256 - k}", k, 256 - k) for k in (32, 64, 192, 224)),
        *(arm(f"stride {stride}", stride=stride) for stride in (1, 16, 128)),
        *(arm(f"pool {pool}", pool=pool) for pool in (160, 256, 1024)),
        *(arm(f"score spread {spread:g}", score_spread=spread) for spread in (0.1, 0.3, 3.0)),
        *(arm(f"scorer rate x {rate:g}", scorer_lr_mult=rate) for rate in (1.0, 3.0, 30.0)),
        arm("scorer mlp", scorer="mlp"),
        arm("scores from keys", scores="keys"),
        arm("scorer detached from the model", detach_hidden=True),
        arm("scorer with its own norm", scorer_norm=True),
        arm("no position slope", position_slope=False, initial_slope=0.0),
        arm("position slope fixed at 16", initial_slope=16.0, fixed_slope=True),
        arm("one selection for all KV heads", shared=True),
        arm("first layer dense", full_layers=(0,)),
        arm("last layer dense", full_layers=(3,)),
        arm("every second layer dense", full_layers=(1, 3)),
    )


def sloped(slope: float, topk: int, window: int, gate: str = "key_value") -> Arm:
    """SparseK whose position slope starts at `slope`: a key's score falls by 1 in L_ref / slope tokens of age."""
    name = f"SparseK {gate} {topk} + {window}, slope {slope:g}"
    return learned(name, topk, window, 64, gate=gate, scorer_lr_mult=10.0, initial_slope=slope)


def from_dense_or_from_scratch() -> tuple[Arm, ...]:
    """Dense attention trained on short sequences and swapped for each attention, and each of them from scratch."""
    arms = (
        fixed("dense", "dense", 128, 128, 64),
        fixed("window 256", "recent", 128, 128, 64),
        sloped(32.0, 128, 128),  # the default at 4,096 tokens
    )
    return (*longer(arms), *(dataclasses.replace(arm, name=f"{arm.name}, from scratch") for arm in arms))


def from_scratch() -> tuple[Arm, ...]:
    """SparseK at 256 keys without a dense start, its scorer varied, beside a window and dense attention."""

    def arm(name: str, **settings: object) -> Arm:
        base = {"scorer_lr_mult": 1.0, "initial_slope": 32.0}
        return learned(f"SparseK, {name}", 128, 128, 64, **{**base, **settings})

    return (
        fixed("dense", "dense", 128, 128, 64),
        fixed("window 256", "recent", 128, 128, 64),
        *(arm(f"scorer rate x {rate:g}", scorer_lr_mult=rate) for rate in (0.1, 1.0, 10.0)),
        arm("detached scorer", detach_hidden=True),
        arm("value gate", gate="value"),
        arm("slope 0", initial_slope=0.0),
        arm("slope 64", initial_slope=64.0),
        arm("score spread 0.1", score_spread=0.1),
    )


BASE = "topk 128 + window 128, stride 64, pool 512"
FASTER = (("key_value", 10.0), ("value", 10.0))
PRETRAINED = Model(init_method_std=0.04)
SMALL = Model(2, 128, 256, 2, 2, init_method_std=0.08)


def recall_table(title: str, data: str, length: int) -> Table:
    """A recall task: two layers, 64 keys a query; also with slopes: scores fall by 1 in topk, 4 and 16 topk tokens."""
    topk, window, stride = 32, 32, 8
    slopes = [length / (times * topk) for times in (1, 4, 16)]
    return Table(
        title,
        (
            *equal_budget(topk, window, stride),
            *(learned(f"SparseK key_value, slope {s:g}", topk, window, stride, initial_slope=s) for s in slopes),
        ),
        data=data,
        length=length,
        steps=2000,
        learning_rate=8e-3,
        model=SMALL,
        evaluation_tokens=524_288,
        far=128,
    )


TABLES: dict[str, Table] = {
    "scratch_4k": Table(
        "Equal budget of 256 keys at 4,096 tokens, from scratch",
        equal_budget(128, 128, 64),
        eval_lengths=(4096, 16_384, 65_536),
        reference="window 256",
    ),
    "budget_4k": Table(
        "Dense at 1,024 tokens, then equal budgets of 256 keys at 4,096 (and twice the keys)",
        longer(
            (
                *equal_budget(128, 128, 64, FASTER),
                fixed("window 512", "recent", 256, 256, 64),
                learned("SparseK key_value 256 + 256, scorer rate x 10", 256, 256, 64, scorer_lr_mult=10.0),
            )
        ),
        model=PRETRAINED,
        eval_lengths=(4096, 65_536),
        reference="window 256",
    ),
    "budget_16k": Table(
        "Dense at 1,024 tokens, then equal budgets of 512 keys at 16,384",
        longer(equal_budget(256, 256, 64, FASTER)),
        length=16_384,
        model=PRETRAINED,
        far=2048,
        reference="window 512",
    ),
    "ablations": Table(
        "One setting varied: dense at 1,024 tokens, then 256 keys at 4,096",
        longer(ablations(slope=0.0)),
        model=PRETRAINED,
        reference=BASE,
    ),
    "ablations_slope": Table(
        "One setting varied, with a position slope of 16: dense at 1,024 tokens, then 256 keys at 4,096",
        longer(ablations(slope=16.0)),
        model=PRETRAINED,
        reference=BASE,
    ),
    "slope_4k": Table(
        "Position slope and split: dense at 1,024 tokens, then 256 keys (or 512) at 4,096",
        longer(
            (
                fixed("dense", "dense", 128, 128, 64),
                fixed("window 256", "recent", 128, 128, 64),
                fixed("window 128 + random 128", "random", 128, 128, 64),
                *(sloped(slope, 128, 128) for slope in (0.0, 4.0, 16.0, 64.0, 256.0)),
                sloped(0.0, 64, 192),
                *(sloped(16.0, topk, 256 - topk) for topk in (64, 32)),
                sloped(16.0, 128, 128, gate="value"),
                learned("SparseK hard 128 + 128, slope 16", 128, 128, 64, hard_selection=True, initial_slope=16.0),
                fixed("window 512", "recent", 256, 256, 64),
                *(sloped(16.0, topk, 512 - topk) for topk in (256, 128)),
            )
        ),
        model=PRETRAINED,
        eval_lengths=(4096, 65_536),
        reference="window 256",
    ),
    "slope_16k": Table(
        "Position slope and split: dense at 1,024 tokens, then 512 keys at 16,384",
        longer(
            (
                fixed("dense", "dense", 256, 256, 64),
                fixed("window 512", "recent", 256, 256, 64),
                fixed("window 256 + random 256", "random", 256, 256, 64),
                *(sloped(slope, 256, 256) for slope in (16.0, 64.0, 256.0, 1024.0)),
                *(sloped(64.0, topk, 512 - topk) for topk in (128, 64)),
            )
        ),
        length=16_384,
        model=PRETRAINED,
        far=2048,
        reference="window 512",
    ),
    "from_dense": Table(
        "From dense at 1,024 tokens to 256 keys at 4,096, and from scratch at 4,096",
        from_dense_or_from_scratch(),
        model=PRETRAINED,
        reference="dense",
    ),
    "from_scratch": Table(
        "From scratch at 4,096 tokens: 256 keys, the scorer varied",
        from_scratch(),
        model=PRETRAINED,
        reference="window 256",
    ),
    "passkey": recall_table("Passkey, shown as one token among 1,024", "passkey", 1024),
    "recall": recall_table("Associative recall: 24 pairs among 512 tokens", "recall", 512),
    "lookup": recall_table(
        "Associative recall, a pair shown as one token: 24 pairs among 512 tokens", "lookup", 512
    ),
    "lookup_many": recall_table(
        "Associative recall: 96 pairs, more than topk can hold, among 1,024 tokens", "lookup_many", 1024
    ),
    "genome": Table(
        "Genome-like sequences of 3,000 bases", equal_budget(128, 128, 32), data="genome", length=3000
    ),
    "series": Table(
        "Mackey-Glass series of 3,000 values", equal_budget(128, 128, 32), data="series", length=3000
    ),
}
