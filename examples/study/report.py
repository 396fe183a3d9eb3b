# SPDX-License-Identifier: Apache-2.0
"""Logs of a table into results.csv, table.md, plots and hashes.txt."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from arms import Table
from train import log_path

from sparsek_megatron.files import atomic_write

COLUMNS = (
    "arm", "seed", "length", "steps", "loss", "loss_far", "accuracy", "accuracy_far", "seconds", "parameters",
    "log", "sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One evaluation of one run."""

    arm: str
    seed: int
    parameters: int
    log: Path
    values: dict[str, Any]

    def row(self) -> dict[str, Any]:
        own = {"arm": self.arm, "seed": self.seed, "parameters": self.parameters, "log": self.log.name}
        own["sha256"] = hashlib.sha256(self.log.read_bytes()).hexdigest()
        return {name: own.get(name, self.values.get(name)) for name in COLUMNS}


def read(table: Table, folder: Path, seeds: list[int]) -> list[Result]:
    """Evaluations of all runs that finished, in the table's order."""
    found = []
    for arm in table.arms:
        for seed in seeds:
            log = log_path(folder, arm.name, seed)
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
            done = [line for line in lines if line["kind"] == "evaluation"]
            found += [Result(arm.name, seed, lines[0]["parameters"], log, values) for values in done]
    return found


def _by_arm(results: list[Result], length: int) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.values["length"] == length:
            groups.setdefault(result.arm, []).append(result)
    return groups


def _cell(values: list[float], digits: int, sign: str = "") -> str:
    """Mean over seeds and, in brackets, each seed."""
    if not values:
        return ""
    each = ", ".join(f"{v:{sign}.{digits}f}" for v in values)
    return f"{mean(values):{sign}.{digits}f} ({each})"


def _values(group: list[Result], key: str) -> list[float]:
    return [r.values[key] for r in group if r.values.get(key) is not None]


def _against(group: list[Result], reference: list[Result], key: str) -> list[float]:
    """What each seed's value is above that of the reference with the same seed, which saw the same batches."""
    base = {r.seed: r.values.get(key) for r in reference}
    return [r.values[key] - base[r.seed] for r in group if r.values.get(key) is not None and base.get(r.seed)]


def markdown(table: Table, results: list[Result]) -> str:
    """The table at every evaluated length: means over seeds, each seed in brackets."""
    parts = []
    for length in sorted({r.values["length"] for r in results}):
        groups = _by_arm(results, length)
        recall = any("accuracy" in r.values for r in results)
        columns = (
            {"loss": "loss", "accuracy": "accuracy", "accuracy_far": f"accuracy from {table.far} tokens on"}
            if recall
            else {"loss": "loss", "loss_far": f"loss from position {table.far}"}
        )
        reference = [] if recall else groups.get(table.reference, [])
        heads = ["arm", "seeds", "steps", *columns.values()]
        heads += [f"{columns[key]}, against {table.reference}" for key in columns if reference]
        lines = [f"**{table.title}**, evaluated at {length} tokens\n", "| " + " | ".join(heads) + " |"]
        lines.append("|---" * len(heads) + "|")
        for arm, group in groups.items():
            steps = sorted({r.values["steps"] for r in group})
            cells = [arm, str(len(group)), ", ".join(map(str, steps))]
            cells += [_cell(_values(group, key), 3 if "accuracy" in key else 4) for key in columns]
            cells += [_cell(_against(group, reference, key), 4, "+") for key in columns if reference]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _curves(results: list[Result], length: int, key: str) -> dict[str, tuple[list[float], list[float]]]:
    """(places, mean over seeds) of each arm."""
    curves = {}
    for arm, group in _by_arm(results, length).items():
        series = [r.values[key] for r in group if key in r.values]
        if series:
            places = [point[0] for point in series[0]]
            curves[arm] = (places, [mean(s[i][1] for s in series) for i in range(len(places))])
    return curves


def _plot(path: Path, curves: dict[str, tuple[list[float], list[float]]], title: str, x: str, y: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5))
    colours = pyplot.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for number, (arm, (places, values)) in enumerate(curves.items()):
        style = "-" if "SparseK" in arm else "--"
        axes.plot(places, values, label=arm, linewidth=1.2, linestyle=style, color=colours[number % 20])
    axes.set(xlabel=x, ylabel=y, xscale="log" if y == "accuracy" else "linear")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)


def write(table: Table, folder: Path, seeds: list[int]) -> str:
    """All files of a table in `folder`; returns the Markdown."""
    results = read(table, folder, seeds)
    if not results:
        raise ValueError(f"{folder}: no finished run of this table")
    rows = [result.row() for result in results]
    with atomic_write(folder / "results.csv") as stream:
        writer: csv.DictWriter[str] = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    hashes = {row["log"]: row["sha256"] for row in rows}
    with atomic_write(folder / "hashes.txt") as stream:
        stream.writelines(f"{digest}  {log}\n" for log, digest in sorted(hashes.items()))
    text = markdown(table, results)
    with atomic_write(folder / "table.md") as stream:
        stream.write(text)
    for length in sorted({r.values["length"] for r in results}):
        accuracy = _curves(results, length, "accuracy_by_distance")
        if accuracy:
            path = folder / f"accuracy_by_distance_{length}.png"
            _plot(path, accuracy, table.title, "tokens between answer and question", "accuracy")
            continue
        losses = _curves(results, length, "loss_by_position")
        _plot(folder / f"loss_by_position_{length}.png", losses, table.title, "position", "nats per token")
        if table.reference in losses and len(losses) > 1:
            _, base = losses[table.reference]
            gaps = {
                arm: (places, [x - y for x, y in zip(values, base, strict=True)])
                for arm, (places, values) in losses.items()
                if arm != table.reference
            }
            title = f"{table.title}: against {table.reference}"
            _plot(folder / f"loss_against_reference_{length}.png", gaps, title, "position", "nats per token")
    return text
