# SPDX-License-Identifier: Apache-2.0
"""The fastest layout that fits, and the calibration of the cost model on measured steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsek_megatron.planning.cost import Cost, estimate, layer_flops, tensor_bytes
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


def layer_seconds(
    model: Model, tokens: int, tp: int, cp: int, machine: Machine, *, recompute: bool
) -> tuple[float, float]:
    """(seconds in matrix products at peak efficiency 1, all other seconds) of forward and backward of all layers of
    one sequence: what `examples/benchmark_scaling.py` measures.
    """
    layout = Layout(tp, cp, 1, 1, recompute=recompute)
    alone = dataclasses.replace(model, vocabulary=0)
    cost = estimate(alone, Run(tokens, tokens), layout, dataclasses.replace(machine, matmul=1.0))
    products = (
        layer_flops(model, tokens)[0] / (tp * cp) * (4 if recompute else 3) * model.layers / machine.peak
    )
    return products, cost.compute - products + cost.tensor + cost.context


def calibrate(
    rows: Sequence[Mapping[str, str]], model: Model, machine: Machine, *, recompute: bool
) -> tuple[Machine, list[tuple[str, float, float]]]:
    """The machine with `matmul` fitted to one-GPU rows of benchmark_scaling's results.csv, and for every row
    (name, measured seconds, predicted seconds); rows of more GPUs were not used for the fit.

    Raises ValueError where there is no row of one GPU.
    """
    measured = [row for row in rows if row["side"] == "sparsek" and row["step_ms"] != "out of memory"]
    inverse = []
    for row in measured:
        if row["tp"] == row["cp"] == "1":
            products, rest = layer_seconds(model, int(row["tokens"]), 1, 1, machine, recompute=recompute)
            inverse.append((float(row["step_ms"]) / 1e3 - rest) / products)
    if not inverse:
        raise ValueError("results.csv has no sparsek row of one GPU (tp = cp = 1): measure --meshes 1x1 too")
    fitted = dataclasses.replace(machine, matmul=len(inverse) / sum(inverse))
    answer = []
    for row in measured:
        tp, cp, tokens = (int(row[name]) for name in ("tp", "cp", "tokens"))
        products, rest = layer_seconds(model, tokens, tp, cp, machine, recompute=recompute)
        name = f"TP={tp} CP={cp}, {tokens:,} tokens"
        answer.append((name, float(row["step_ms"]) / 1e3, products / fitted.matmul + rest))
    return fitted, answer


__all__ = ["Plan", "best_layout", "calibrate", "layer_seconds", "layouts", "tensor_bytes"]
