# SPDX-License-Identifier: Apache-2.0
"""Rows of the benchmark: the table as it grows, a CSV file, a plot."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_benchmark.parts import PARTS
from training_benchmark.trace import Split

from sparsek_megatron.files import atomic_write


@dataclass
class Row:
    """One case. Times in milliseconds, memory in GiB on one rank; None is "not measured"."""

    shape: str
    layers: int
    tokens: int
    arm: str
    trainer: str
    gpus: int
    tp: int
    cp: int
    options: str
    step_ms: float | None = None
    tokens_per_second: float | None = None
    model_tflops: float | None = None  # per GPU
    mfu: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    split: Split | None = None
    dense_tokens_per_second: float | None = None
    dense_without_attention_ms: float | None = None  # the dense arm's step without its attention, in this run
    error: str = ""

    @property
    def without_attention_ms(self) -> float | None:
        """The step without attention, scoring and selection: what no attention could make faster."""
        if self.split is None or self.step_ms is None or not self.split.busy_ms:
            return None
        return self.step_ms - self.split.attention_ms

    @property
    def share_of_bound(self) -> float | None:
        """Amdahl: the step at zero cost of attention (the dense arm's, else this arm's) over this step."""
        bound = (
            self.dense_without_attention_ms
            if self.dense_without_attention_ms is not None
            else self.without_attention_ms
        )
        return None if bound is None or self.step_ms is None else bound / self.step_ms

    @property
    def speedup(self) -> float | None:
        """Tokens per second over the dense arm's of the same case."""
        if self.dense_tokens_per_second is None or self.tokens_per_second is None:
            return None
        return self.tokens_per_second / self.dense_tokens_per_second


def compare_with_dense(row: Row, rows: list[Row]) -> None:
    """Fill what a row says of the dense arm from the dense row of the same case, where there is one, in its layout."""
    case = ("shape", "layers", "tokens", "trainer", "gpus", "options")
    for other in rows:
        if (
            other.arm == "dense"
            and not other.error
            and all(getattr(other, n) == getattr(row, n) for n in case)
        ):
            row.dense_tokens_per_second, row.dense_without_attention_ms = (
                other.tokens_per_second,
                other.without_attention_ms,
            )


def line(row: Row) -> str:
    """One case in two lines: the step, and where it goes."""
    layout = f"TP{row.tp}" + (f" CP{row.cp}" if row.cp > 1 else "")
    head = (
        f"{row.shape} x{row.layers:<3} {row.tokens:>8} {row.arm:<8} {row.trainer:<9} {layout} of {row.gpus}"
    )
    head += f" {row.options}" if row.options else ""
    if row.error:
        return f"{head}: {row.error}"
    text = f"{head}: {row.step_ms:.1f} ms, {row.tokens_per_second:,.0f} tokens/s, loss {row.loss:.3f}"
    text += f", {row.model_tflops:.0f} TFLOP/s/GPU" + (
        "" if row.mfu is None else f" (MFU {100 * row.mfu:.1f} %)"
    )
    if row.peak_gib is not None:
        text += f", peak {row.peak_gib:.1f} GiB"
    if row.speedup is not None:
        text += f", {row.speedup:.2f}x dense"
    if row.split is None or not row.split.busy_ms:
        return text
    split = row.split
    shown = ", ".join(f"{name} {ms:.1f}" for name, ms in split.parts.items() if ms)
    waits = ", ".join(f"{count} in {place}" for place, count in split.waits.items()) or "none"
    assert row.share_of_bound is not None and row.step_ms is not None
    choosing = 100 * (split.parts["scoring"] + split.parts["selection"]) / row.step_ms
    return (
        f"{text}\n    ms: {shown}; no kernel running {max(0.0, row.step_ms - split.busy_ms):.1f}; "
        f"{100 * row.share_of_bound:.1f} % of the bound, scoring and selection {choosing:.1f} % of the step; "
        f"{split.kernels} kernels, host waits: {waits}, "
        f"{split.allocations} allocations"
    )


def record(row: Row) -> dict[str, Any]:
    """A row of the CSV file."""
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "split"}
    values |= {
        "without_attention_ms": row.without_attention_ms,
        "share_of_bound": row.share_of_bound,
        "speedup": row.speedup,
    }
    if row.split is not None:
        values |= {f"{part}_ms": row.split.parts[part] for part in PARTS}
        values |= {"busy_ms": row.split.busy_ms, "host_waits": row.split.waits.total()}
        values |= {"allocations": row.split.allocations, "kernels": row.split.kernels}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows, one column per field that any of them has."""
    records = [record(row) for row in rows]
    fields = list(dict.fromkeys(name for each in records for name in each))
    with atomic_write(path) as stream:
        writer = csv.DictWriter(stream, fields)
        writer.writeheader()
        writer.writerows(records)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Tokens per second against context, and the step's parts, for each arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    measured = [row for row in rows if not row.error]
    for series in dict.fromkeys((row.shape, row.arm, row.trainer, row.options) for row in measured):
        points = [
            (row.tokens, row.tokens_per_second)
            for row in measured
            if (row.shape, row.arm, row.trainer, row.options) == series
        ]
        left.plot(*zip(*points, strict=True), "o-", markersize=3, label=" ".join(filter(None, series)))
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="tokens/s")
    left.grid(alpha=0.3)
    left.legend(fontsize=7)
    split = [row for row in measured if row.split is not None and row.split.busy_ms]
    heights = [0.0] * len(split)
    for part in PARTS:
        shares = [100 * row.split.parts[part] / (row.step_ms or 1.0) for row in split if row.split]
        right.bar(range(len(split)), shares, bottom=heights, label=part)
        heights = [a + b for a, b in zip(heights, shares, strict=True)]
    right.set_xticks(range(len(split)), [f"{r.arm}\n{r.tokens // 1024}k" for r in split], fontsize=6)
    right.set(ylabel="% of the step")
    if split:
        right.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)
