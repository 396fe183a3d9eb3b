# SPDX-License-Identifier: Apache-2.0
"""What examples/benchmark_scaling.md states of the cost model is what the cost model gives."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from sparsek_megatron.planning import H200, MODELS, Layout, Machine, Model, Run, best_layout, estimate
from sparsek_megatron.planning.calibration import Measurement, calibrate, measurements

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "benchmark_scaling.md").read_text()
CONSTANTS = ("matmul", "fast", "exchange")

# The page's rows of two GPUs, which results/scaling.csv has not: tp, cp, tokens, recompute, tokens/s/GPU.
UNSEEN = [
    (1, 1, 131_072, True, 137_376),
    (1, 2, 262_144, True, 131_544),
    (2, 1, 262_144, True, 122_680),
    (1, 1, 32_768, False, 190_176),
    (2, 1, 32_768, False, 168_458),
    (1, 2, 32_768, False, 167_048),
]
# Whole training steps of benchmark_training.md: shape, layers, tp, cp, tokens, recompute, milliseconds.
STEPS = [
    ("8B", 4, 4, 1, 524_288, False, 1_889.499),
    ("8B", 8, 2, 1, 131_072, False, 1_552.4),
    ("8B", 8, 1, 2, 524_288, True, 7_259.8),
    ("8B", 32, 4, 1, 524_288, True, 17_385.6),
    ("8B", 32, 4, 1, 1_048_576, True, 34_935.5),
    ("8B", 32, 1, 4, 131_072, True, 3_752.6),
    ("8B", 2, 1, 1, 131_072, False, 853.4),
    ("8B", 2, 1, 1, 32_768, False, 224.9),
    ("1.3B", 24, 1, 1, 1_572_864, True, 32_552.2),
    ("1.3B", 24, 1, 1, 1_048_576, True, 21_544.0),
    ("1.3B", 24, 1, 1, 32_768, False, 559.5),
]
SHAPES = {
    "8B": dataclasses.replace(MODELS["7B"], vocabulary=32_768),
    "1.3B": Model(24, 2048, 5504, 16, 8, vocabulary=32_768),
}


def committed() -> list[dict[str, str]]:
    """The rows of results/scaling.csv."""
    with (EXAMPLES / "results" / "scaling.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def unseen() -> list[Measurement]:
    """The rows of two GPUs."""
    model = dataclasses.replace(MODELS["7B"], layers=2)
    return [
        Measurement(model, tokens, tp, cp, recompute, tokens / (tp * cp) / rate)
        for tp, cp, tokens, recompute, rate in UNSEEN
    ]


def errors(rows: list[Measurement], machine: Machine) -> list[float]:
    """Relative error of each row."""
    return [row.predicted(machine) / row.seconds - 1 for row in rows]


def percent(error: float, digits: int = 1) -> str:
    """As the page writes it."""
    return f"{error * 100:+.{digits}f} %"


def line(row: Measurement, error: float) -> str:
    """The page's line of a row."""
    kept = "full" if row.recompute else "none"
    mesh = f"TP={row.tp} CP={row.cp} | {row.tokens:,} | {row.model.layers} | {kept}"
    return f"| {mesh} | {row.seconds * 1e3:,.1f} | {percent(error)} |\n"


def test_the_defaults_are_what_the_committed_rows_give() -> None:
    unlike = dataclasses.replace(H200, matmul=0.3, fast=100e9, exchange=1e-4)
    fitted, _ = calibrate(committed(), unlike)
    for name in CONSTANTS:
        assert f"{getattr(fitted, name):.4g}" == f"{getattr(H200, name):.4g}", name
    stated = f"{H200.fast / 1e9:.1f} GB/s within a node, {H200.exchange * 1e3:.3f} ms for a collective"
    assert f"matrix products at {H200.matmul * 100:.1f} %\n" in PAGE and stated in PAGE


def test_the_page_states_the_error_of_every_committed_row() -> None:
    rows = measurements(committed())
    found = errors(rows, H200)
    assert len(rows) == 12
    assert f"the largest is {percent(max(found, key=abs))}:" in PAGE
    assert "".join(map(line, rows, found)) in PAGE


def test_the_page_states_the_errors_on_rows_that_the_fit_has_not_seen() -> None:
    rows = unseen()
    for row, (*_, rate) in zip(rows, UNSEEN, strict=True):
        assert f"{row.seconds * 1e3:,.0f} | {rate:,} |" in PAGE  # the row as measured
    found = errors(rows, H200)
    assert f"On them the errors are {min(found) * 100:+.1f} to {percent(max(found))}:" in PAGE
    assert "".join(map(line, rows, found)) in PAGE


def test_the_page_states_the_errors_on_whole_training_steps() -> None:
    stated = PAGE.partition("| training step |")[2].splitlines()[2 : 2 + len(STEPS)]
    for text, (shape, layers, tp, cp, tokens, recompute, milliseconds) in zip(stated, STEPS, strict=True):
        layout = Layout(tp, cp, 1, 1, recompute=recompute)
        cost = estimate(dataclasses.replace(SHAPES[shape], layers=layers), Run(tokens, tokens), layout, H200)
        error = percent(cost.seconds * 1e3 / milliseconds - 1, 0)
        assert text.startswith(f"| {shape} shape, ") and f" {tokens:,} tokens" in text
        assert text.endswith(f" | {milliseconds:,.0f} | {error} |")


@pytest.mark.parametrize(("milliseconds", "changed", "longer"), [(0.68, 3, 8), (3.55, 7, 13)])
def test_the_page_states_what_hangs_on_the_time_of_an_exchange(
    milliseconds: float, changed: int, longer: int
) -> None:
    other = dataclasses.replace(H200, exchange=milliseconds * 1e-3)
    losses = []
    for model in MODELS.values():
        for gpus in (8, 64, 512, 4096):
            for tokens in (1 << 17, 1 << 20, 1 << 24):
                run = Run(tokens, 1 << 24)
                default, best = (best_layout(model, run, gpus, machine) for machine in (H200, other))
                if default is not None and best is not None and default.layout != best.layout:
                    seconds = estimate(model, run, default.layout, other).seconds
                    losses.append(seconds / best.cost.seconds - 1)
    assert (len(losses), round(max(losses) * 100)) == (changed, longer)


def test_the_page_shows_what_the_example_recommends() -> None:
    command = [sys.executable, str(EXAMPLES / "plan_parallelism.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    fitting = [row for row in done.stdout.splitlines() if "does not fit" not in row]
    assert len(fitting) == 2 + 24
    assert "\n".join(fitting) + "\n" == PAGE[PAGE.index(fitting[0]) :]
