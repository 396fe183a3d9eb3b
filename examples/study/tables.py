# SPDX-License-Identifier: Apache-2.0
"""What is compared: every table of the study by name."""

from __future__ import annotations

import dataclasses

from arms import Arm, Model, Table, equal_budget, fixed, learned, longer


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
