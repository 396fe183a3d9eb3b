# SPDX-License-Identifier: Apache-2.0
"""The cost model's constants fitted to measured steps: the rows of `examples/benchmark_scaling.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsek_megatron.planning.cost import estimate
from sparsek_megatron.planning.shapes import Layout, Machine, Model, Run

POSITIVE = (
    "tp", "cp", "tokens", "layers", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "head_dim", "topk",
    "window", "stride",
)  # fmt: skip
MEASURED = ("side", "step_ms", "recompute", "cp_comm_type", *POSITIVE)

# Beyond these a number is a mistake, and floating point would overflow in the fit.
LARGEST = 1 << 40
MILLISECONDS = (1e-3, 1e9)


@dataclass(frozen=True)
class Measurement:
    """A measured step of forward and backward of a stack of layers on one sequence."""

    model: Model
    tokens: int
    tp: int
    cp: int
    recompute: bool
    seconds: float

    def predicted(self, machine: Machine) -> float:
        """Seconds that the cost model expects."""
        return layer_seconds(self.model, self.tokens, self.tp, self.cp, machine, recompute=self.recompute)

    def __str__(self) -> str:
        return f"TP={self.tp} CP={self.cp}, {self.tokens:,} tokens"


def layer_seconds(model: Model, tokens: int, tp: int, cp: int, machine: Machine, *, recompute: bool) -> float:
    """Seconds of forward and backward of all layers on one sequence, without the reduction of their gradients: what
    `examples/benchmark_scaling.py` measures."""
    layout = Layout(tp, cp, 1, 1, recompute=recompute)
    cost = estimate(dataclasses.replace(model, vocabulary=0), Run(tokens, tokens), layout, machine)
    return cost.seconds - cost.data


def measurements(rows: Sequence[Mapping[str, str]]) -> list[Measurement]:
    """The SparseK rows of a results.csv; rows that ran out of memory are left out.

    Raises ValueError naming the row, the column and its value where one is missing, no number in range, or
    all-to-all, which the cost model has not.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        missing = next((name for name in MEASURED if row.get(name) is None), None)
        if missing is not None:
            raise ValueError(
                f"row {number} has no column {missing}: not results.csv of this version's "
                "examples/benchmark_scaling.py"
            )
        if row["side"] == "sparsek" and row["step_ms"] != "out of memory":
            try:
                found.append(_measurement(row))
            except ValueError as err:
                raise ValueError(f"row {number}: {err}") from None
    return found


def _measurement(row: Mapping[str, str]) -> Measurement:
    sizes = {name: _whole(name, row[name]) for name in POSITIVE}
    tp, cp, tokens = (sizes.pop(name) for name in ("tp", "cp", "tokens"))
    if row["recompute"] not in ("True", "False"):
        raise ValueError(f"recompute {row['recompute']!r}: must be True or False")
    if cp > 1 and row["cp_comm_type"] != "p2p":
        raise ValueError(f"cp_comm_type {row['cp_comm_type']!r}: the cost model has p2p alone; measure that")
    least, most = MILLISECONDS
    try:
        milliseconds = float(row["step_ms"])
    except ValueError:
        milliseconds = 0.0
    if not least <= milliseconds <= most:
        raise ValueError(f"step_ms {row['step_ms']!r}: must be milliseconds between {least:g} and {most:g}")
    shape = {"hidden": sizes.pop("hidden_size"), "ffn": sizes.pop("ffn_hidden_size")}
    model = Model(**shape, **sizes, pool=4 * sizes["topk"])
    return Measurement(model, tokens, tp, cp, row["recompute"] == "True", milliseconds / 1e3)


def _whole(name: str, text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 16 else 0
    if not 0 < number <= LARGEST:
        raise ValueError(f"{name} {text!r}: must be a whole number between 1 and {LARGEST}")
    return number


def _with_constants(machine: Machine, constants: Sequence[float]) -> Machine:
    """The machine with (1 / matmul, 1 / fast, exchange): seconds of a step are linear in these."""
    matmul, fast = (float("inf") if x == 0 else 1 / x for x in constants[:2])
    return dataclasses.replace(machine, matmul=matmul, fast=fast, exchange=constants[2])


def calibrate(
    rows: Sequence[Mapping[str, str]], machine: Machine
) -> tuple[Machine, list[tuple[str, float, float]]]:
    """The machine with `matmul`, `fast` and `exchange` fitted to benchmark_scaling's results.csv by least squares of
    relative errors, and for every row (name, measured seconds, predicted seconds). A constant that no row depends on
    (`exchange` without context parallelism) keeps its value. Every row is taken in its own shape.

    Raises ValueError for a row that `measurements` refuses, where there is no row of one GPU, and where the rows do not
    tell the constants apart or want one that no machine has.
    """
    measured = measurements(rows)
    if not any(row.tp == row.cp == 1 for row in measured):
        raise ValueError("no sparsek row of one GPU (tp = cp = 1): measure --meshes 1x1 too")
    seconds = np.array([row.seconds for row in measured])
    constants = np.array([1 / machine.matmul, 1 / machine.fast, machine.exchange])
    rest = np.array([row.predicted(_with_constants(machine, (0, 0, 0))) for row in measured])
    columns = [
        np.array([row.predicted(_with_constants(machine, unit.tolist())) for row in measured]) - rest
        for unit in np.eye(3)
    ]
    used = [i for i, column in enumerate(columns) if column.any()]
    products = np.stack([columns[i] for i in used], axis=1) / seconds[:, None]
    scale = np.linalg.norm(products, axis=0)
    if np.linalg.matrix_rank(products / scale, tol=1e-6) < len(used):
        raise ValueError(
            "its rows do not tell the link's rate from the time of an exchange: measure --meshes 1x1 1x2 2x1"
        )
    constants[used] = np.linalg.lstsq(products / scale, (seconds - rest) / seconds, rcond=None)[0] / scale
    _check_constants(constants, machine)
    fitted = _with_constants(machine, [float(x) for x in constants])
    return fitted, [(str(row), row.seconds, row.predicted(fitted)) for row in measured]


def _check_constants(constants: np.ndarray, machine: Machine) -> None:
    """Raises ValueError where a rate is not positive or a time is negative."""
    product, byte, exchange = constants.tolist()
    wrong = (
        (product <= 0, f"{product / machine.peak * 1e12:.3g} s for 1e12 FLOPs of matrix products"),
        (byte <= 0, f"{byte * 1e9:.3g} s for a GB within a node"),
        (exchange < 0, f"{exchange * 1e3:.3g} ms for a collective of an exchange"),
    )
    found = [value for is_wrong, value in wrong if is_wrong]
    if found:
        raise ValueError(
            f"its steps want {' and '.join(found)}, which no machine has: check step_ms, or measure more meshes and "
            "lengths"
        )


__all__ = ["MEASURED", "calibrate", "layer_seconds", "measurements"]
