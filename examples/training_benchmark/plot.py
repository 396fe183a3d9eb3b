# SPDX-License-Identifier: Apache-2.0
"""The benchmark's picture, drawn from its CSV file alone: tokens per second against context, and the step's parts."""

from __future__ import annotations

from pathlib import Path

from training_benchmark.parts import PARTS
from training_benchmark.table import read_csv

from sparsek_megatron.files import atomic_write

_LINES = {"dense": "s--", "window": "^:", "sparsek": "o-"}
_TINY = 6
_SMALL = 8


def plot(table: Path, path: Path, flag: str = "--plot") -> None:
    """Draw a CSV file's rows that were measured and not replaced by later ones.

    Raises:
        UserError: naming `flag`, where the file cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in read_csv(table, flag) if row["step_ms"] and not row["replaced"]]
    split = sorted((row for row in measured if _whole(row) and row["other_ms"]), key=_place)
    height = max(5.0, 1.5 + 0.2 * len(split))
    figure = Figure(figsize=(15, height), layout="constrained")
    FigureCanvasAgg(figure)
    ((left, right),) = figure.subfigures(1, 2, squeeze=False)
    _throughput(left, measured)
    _parts(right.subplots(), split)
    figure.suptitle(_title(measured), fontsize=9)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)


def _title(rows: list[dict[str, str]]) -> str:
    """What the rows have in common, as far as they say it."""
    names = {"device": "", "topk": "topk ", "window": "window ", "stride": "stride ", "date": ""}
    found = []
    for column, word in names.items():
        values = sorted({row[column] for row in rows} - {""})
        found += [f"{word}{' / '.join(values)}"] if values else []
    return ", ".join(found)


def _layout(row: dict[str, str]) -> str:
    """Parallel sizes, and what changes how a step runs; what saves memory differs along a line."""
    context = f" CP{row['cp']}" if row["cp"] != "1" else ""
    ways = "".join(f", {way}" for way in ("async TP", "CUDA graph") if way in row["options"])
    return f"TP{row['tp']}{context} of {row['gpus']}{ways}"


def _model(row: dict[str, str]) -> str:
    return f"{row['shape']} x{row['layers']}"


def _place(row: dict[str, str]) -> tuple[str, int, int, str, int]:
    return (row["shape"], int(row["layers"]), int(row["tokens"]), row["arm"], int(row["gpus"]))


def _throughput(figure, rows: list[dict[str, str]]) -> None:
    """Tokens per second and GPU, a panel for each model, over one axis of contexts. A layout has a colour, an arm a
    marker and a line; DeepSpeed's markers are hollow.
    """
    models = list(dict.fromkeys(map(_model, sorted(rows, key=_place))))
    panels = figure.subplots(max(1, len(models)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, model in zip(panels, models, strict=False):
        series: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if _model(row) == model:
                speed = float(row["tokens_per_second"]) / int(row["gpus"])
                series.setdefault((row["arm"], row["trainer"], _layout(row)), []).append((int(row["tokens"]), speed))
        layouts = list(dict.fromkeys(layout for _, _, layout in series))
        for (arm, trainer, layout), points in series.items():
            axes.plot(
                *zip(*sorted(points), strict=True), _LINES[arm], markersize=4, label=f"{arm} {trainer} {layout}",
                color=f"C{layouts.index(layout) % 10}", fillstyle="none" if trainer == "deepspeed" else "full",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log")
        axes.set_title(model, fontsize=_SMALL, loc="left")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=_TINY, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1].set_xlabel("tokens of a sequence")
    figure.supylabel("tokens/s of one GPU", fontsize=_SMALL)


def _whole(row: dict[str, str]) -> float:
    """Milliseconds that the parts of a row are parts of; 0 where none were measured.

    Rows from before the profiled step was recorded have the time in which kernels ran.
    """
    return float(row["profiled_step_ms"] or row["busy_ms"] or 0)


def _parts(axes, rows: list[dict[str, str]]) -> None:
    """Each part's share of the profiled step. Copies and communication lie beside others: the sum may pass 100 %."""
    reached = [0.0] * len(rows)
    for index, part in enumerate(PARTS):
        shares = [100 * float(row[f"{part}_ms"] or 0) / _whole(row) for row in rows]
        axes.barh(
            range(len(rows)), shares, left=reached, label=part, color=f"C{index}" if index < 10 else "black"
        )
        reached = [a + b for a, b in zip(reached, shares, strict=True)]
    labels = [
        f"{_model(row)} {int(row['tokens']) // 1024}k {row['arm']} {row['trainer']} {_layout(row)}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=_TINY)
    axes.set_xlabel(
        "% of the profiled step (where it was not recorded, of the time in which kernels ran)", fontsize=_SMALL
    )
    axes.set_ylim(len(rows) - 0.3, -0.7)
    if rows:
        axes.legend(fontsize=_SMALL, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
