# SPDX-License-Identifier: Apache-2.0
"""The fastest layout that fits."""

from __future__ import annotations

from dataclasses import dataclass

from sparsek_megatron.planning.cost import Cost, estimate
from sparsek_megatron.planning.shapes import Layout, Machine, Model, Run


@dataclass(frozen=True)
class Plan:
    """A layout and what the model expects of it."""

    layout: Layout
    cost: Cost

    def tokens_per_second(self, run: Run) -> float:
        """Of the whole cluster."""
        return run.sequences * run.tokens / self.cost.seconds


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]


def layouts(model: Model, run: Run, gpus: int, machine: Machine) -> list[Layout]:
    """Every layout of `gpus` GPUs that divides: tensor parallelism inside a node, the rest in powers of two."""
    found = []
    for tp in _powers(min(machine.node, model.kv_heads, gpus)):
        for pp in (p for p in range(1, min(gpus, model.layers, 32) + 1) if model.layers % p == 0):
            if gpus % (tp * pp):
                continue
            for cp in _powers(gpus // (tp * pp)):
                rest = gpus // (tp * pp)
                if rest % cp or run.sequences % (rest // cp) or (cp > 1 and run.tokens % (2 * cp)):
                    continue
                stages = (1, 3) if pp == 1 else (1,)
                found += [
                    Layout(tp, cp, pp, rest // cp, zero, recompute)
                    for zero in stages
                    for recompute in (False, True)
                ]
    return found


def best_layout(model: Model, run: Run, gpus: int, machine: Machine) -> Plan | None:
    """The fastest layout that fits into memory; of two equal ones the simpler. None where nothing fits."""
    plans = [
        Plan(layout, estimate(model, run, layout, machine)) for layout in layouts(model, run, gpus, machine)
    ]
    fitting = [plan for plan in plans if plan.cost.memory <= machine.memory]

    def rank(plan: Plan) -> tuple[float, int, int, int]:
        layout = plan.layout
        return plan.cost.seconds, layout.zero, layout.pp, layout.tp * layout.cp

    return min(fitting, key=rank, default=None)


__all__ = ["Plan", "best_layout", "layouts"]
