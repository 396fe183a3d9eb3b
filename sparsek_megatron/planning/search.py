# SPDX-License-Identifier: Apache-2.0
"""The fastest layout that fits, and the calibration of the cost model on measured steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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


def layer_seconds(model: Model, tokens: int, tp: int, cp: int, machine: Machine, *, recompute: bool) -> float:
    """Seconds of forward and backward of all layers on one sequence, without the reduction of their gradients: what
    `examples/benchmark_scaling.py` measures."""
    layout = Layout(tp, cp, 1, 1, recompute=recompute)
    cost = estimate(dataclasses.replace(model, vocabulary=0), Run(tokens, tokens), layout, machine)
    return cost.seconds - cost.data


def _with_constants(machine: Machine, constants: Sequence[float]) -> Machine:
    """The machine with (1 / matmul, 1 / fast, exchange): seconds of a step are linear in these."""
    matmul, fast = (float("inf") if x == 0 else 1 / x for x in constants[:2])
    return dataclasses.replace(machine, matmul=matmul, fast=fast, exchange=constants[2])


MEASURED = ("side", "tp", "cp", "tokens", "layers", "recompute", "step_ms")


def calibrate(
    rows: Sequence[Mapping[str, str]], model: Model, machine: Machine
) -> tuple[Machine, list[tuple[str, float, float]]]:
    """The machine with `matmul`, `fast` and `exchange` fitted to benchmark_scaling's results.csv by least squares of
    relative errors, and for every row (name, measured seconds, predicted seconds). A constant that no row depends on
    (`exchange` without context parallelism) keeps its value. model: any number of layers, each row has its own.

    Raises ValueError where a column is missing, or there is no row of one GPU.
    """
    missing = next((name for row in rows for name in MEASURED if row.get(name) is None), None)
    if missing is not None:
        raise ValueError(f"a row without {missing}: not results.csv of examples/benchmark_scaling.py")
    measured = [row for row in rows if row["side"] == "sparsek" and row["step_ms"] != "out of memory"]
    if not any(row["tp"] == row["cp"] == "1" for row in measured):
        raise ValueError("no sparsek row of one GPU (tp = cp = 1): measure --meshes 1x1 too")

    def predicted(row: Mapping[str, str], on: Machine) -> float:
        tokens, tp, cp = (int(row[name]) for name in ("tokens", "tp", "cp"))
        shape = dataclasses.replace(model, layers=int(row["layers"]))
        return layer_seconds(shape, tokens, tp, cp, on, recompute=row["recompute"] == "True")

    seconds = np.array([float(row["step_ms"]) / 1e3 for row in measured])
    constants = np.array([1 / machine.matmul, 1 / machine.fast, machine.exchange])
    rest = np.array([predicted(row, _with_constants(machine, (0, 0, 0))) for row in measured])
    columns = [
        [predicted(row, _with_constants(machine, unit.tolist())) for row in measured] - rest
        for unit in np.eye(3)
    ]
    used = [i for i, column in enumerate(columns) if column.any()]
    products = np.stack([columns[i] for i in used], axis=1)
    constants[used] = np.linalg.lstsq(products / seconds[:, None], (seconds - rest) / seconds, rcond=None)[0]
    fitted = _with_constants(machine, [float(x) for x in constants])
    return fitted, [
        (f"TP={row['tp']} CP={row['cp']}, {int(row['tokens']):,} tokens", float(time), predicted(row, fitted))
        for row, time in zip(measured, seconds, strict=True)
    ]


__all__ = ["Plan", "best_layout", "calibrate", "layer_seconds", "layouts"]
