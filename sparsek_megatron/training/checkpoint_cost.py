# SPDX-License-Identifier: Apache-2.0
"""What background checkpoints cost a run: steps that carry one against their neighbours that carry none.

A checkpoint begun after step S is carried by the `steps` steps S+1 to S+steps. Its neighbours are as many before, to S,
and after, from S+steps+1: those that carry no other checkpoint and are not among a process's first ones, which compile.
A side counts with at least steps / 2 of them. `base`, a step without a checkpoint, is the mean of all neighbours where
both sides are whole; where one is shorter, the two sides' means interpolated to the middle of the steps between. So a
drift that is linear in time cancels; not with one side only.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from sparsek_megatron.training.report import HEALTH

WARM_UP = 5  # first steps of a process

# 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One checkpoint, begun after `step`. Times in seconds.

    waited: for `save()`. carrying: of each step that carries it. base: of a step without one. before, after: how many
    neighbours the base is from.
    """

    step: int
    waited: float
    carrying: tuple[float, ...]
    base: float
    before: int
    after: int

    @property
    def seconds(self) -> float:
        """Training time that it cost."""
        return self.waited + math.fsum(self.carrying) - len(self.carrying) * self.base

    @property
    def share(self) -> float:
        """Cost of such a checkpoint every `len(carrying)` steps, as a share of the time without."""
        return self.seconds / (len(self.carrying) * self.base)


@dataclass(frozen=True)
class SlowStep:
    """A step that carries the checkpoint of step `save`: seconds `over` its base, and `since` it began to this step's
    beginning, validations between left out.
    """

    step: int
    over: float
    since: float
    save: int


def begun(records: Iterable[dict[str, Any]]) -> list[list[int]]:
    """For each process of the run, the steps after which it began checkpoints and took a further step."""
    return [list(_checkpoints(life)) for life in _lives(records)]


def checkpoint_costs(records: Iterable[dict[str, Any]], steps: int) -> list[Cost]:
    """The cost of each checkpoint that has its own `steps` steps and a base; records: `read_metrics` with `health`.

    Only steps of one process are compared: a run that was resumed may be on another machine.
    """
    return [cost for life in _lives(records) for cost in _costs_of(life, steps)]


def slowest_steps(costs: Iterable[Cost], count: int) -> list[SlowStep]:
    """The steps furthest over their base, the slowest first."""
    slow = []
    for cost in costs:
        since = cost.waited
        for step, seconds in enumerate(cost.carrying, cost.step + 1):
            slow.append(SlowStep(step, seconds - cost.base, since, cost.step))
            since += seconds
    return sorted(slow, key=lambda each: -each.over)[:count]


def mean_and_margin(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half the width of its 95 % interval (Student's t), None for a single value."""
    freedom = len(values) - 1
    if not freedom:
        return values[0], None
    if freedom <= len(_STUDENT):
        quantile = _STUDENT[freedom - 1]
    else:  # its expansion about the normal distribution's (Cornish and Fisher): within 0.0002 from here on
        z = NormalDist().inv_cdf(0.975)
        quantile = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def _lives(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The training steps of each process of the run, as `{"step", "seconds", ...}`; older records have no seconds."""
    lives: list[list[dict[str, Any]]] = []
    for record in records:
        health = record.get(HEALTH, {})
        if "seconds" in health:
            if not lives or "started" in health:
                lives.append([])
            lives[-1].append(health | {"step": record["step"]})
    return lives


def _checkpoints(life: list[dict[str, Any]]) -> dict[int, float]:
    """Step that a checkpoint was begun after -> seconds waited."""
    return {each["step"] - 1: each["checkpoint_waited"] for each in life if "checkpoint_waited" in each}


def _costs_of(life: list[dict[str, Any]], steps: int) -> Iterable[Cost]:
    seconds = {each["step"]: each["seconds"] for each in life}
    warm, last = life[0]["step"] + WARM_UP, life[-1]["step"]
    waited = _checkpoints(life)
    saves = list(waited)
    for i, save in enumerate(saves):
        carried = save + steps
        free = max(warm, saves[i - 1] + steps + 1) if i else warm  # the first step that does not carry the one before
        end = saves[i + 1] if i + 1 < len(saves) else last
        if save + 1 < free or carried > end:
            continue
        before = range(max(free, save - steps + 1), save + 1)
        after = range(carried + 1, min(carried + steps, end) + 1)
        before, after = (side if 2 * len(side) >= steps else range(0) for side in (before, after))
        if not before and not after:
            continue
        means = [(fmean(side), fmean(seconds[step] for step in side)) for side in (before, after) if side]
        (early, base), (late, base_late) = means[0], means[-1]
        if late > early:
            base += (base_late - base) * (save + (steps + 1) / 2 - early) / (late - early)
        carrying = tuple(seconds[step] for step in range(save + 1, carried + 1))
        yield Cost(save, waited[save], carrying, base, len(before), len(after))
