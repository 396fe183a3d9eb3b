# SPDX-License-Identifier: Apache-2.0
"""Rows of the benchmark: results.csv and its plot."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_benchmark.flags import Case

from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write

# Flags that every row repeats; mlp_tile_tokens is empty without tiles.
FLAGS = (
    "layers", "recompute", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "head_dim", "topk", "window",
    "stride", "cp_comm_type", "mlp_tile_tokens",
)  # fmt: skip
COLUMNS: tuple[str, ...] = (
    "side", "tp", "cp", "tokens", *FLAGS, "step_ms", "tokens_per_s", "tokens_per_s_per_gpu",
    "exposed_communication_ms", "transfer_ms", "scoring_ms", "peak_gib", "received_mib", "by_collective",
)  # fmt: skip


def described(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The columns that say what a row measures."""
    flags = {name: getattr(args, name) for name in FLAGS}
    return {"side": case.side, "tp": case.tp, "cp": case.cp, "tokens": case.tokens, **flags}


def append_row(row: Mapping[str, Any], path: Path) -> None:
    """A row at the end of results.csv, after the header where the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path, flag: str) -> list[dict[str, str]]:
    """Rows of a results.csv.

    Raises UserError naming `flag` where the file cannot be read or has other columns than this version writes.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), tuple(reader.fieldnames or ())
    except OSError as err:
        raise UserError(f"{flag}: cannot read {path} ({err.strerror})") from None
    except (ValueError, csv.Error) as err:
        raise UserError(f"{flag}: {path} is no results.csv of this benchmark ({err})") from None
    if columns != COLUMNS:
        raise UserError(f"{flag}: {path} has other columns than this benchmark writes; name another one")
    return rows


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Layers times tokens/s per GPU against the length of the sequence, a line per mesh and set of flags.

    Times layers, so that stacks of different depth compare. The legend names the flags in which rows differ.
    Raises UserError where a row's number is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["step_ms"] != "out of memory"]
    named = [name for name in FLAGS if len({row[name] for row in measured}) > 1]
    lines: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for row in measured:
        series = tuple(row[name] for name in ("side", "tp", "cp", *named))
        try:
            point = int(row["tokens"]), int(row["layers"]) * float(row["tokens_per_s_per_gpu"]) / 1e3
        except (TypeError, ValueError):
            raise UserError(
                f"cannot draw {path}: tokens, layers or tokens_per_s_per_gpu is no number"
            ) from None
        lines.setdefault(series, []).append(point)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    meshes = sorted({series[1:3] for series in lines})
    for series, points in sorted(lines.items()):
        side, tp, cp, *flags = series
        differing = [
            f"{name} {value}" for name, value in zip(named, flags, strict=True) if value not in ("", "False")
        ]
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=f"C{meshes.index((tp, cp))}",
            linestyle="--" if side == "dense" else "-",
            marker="s" if side == "dense" else "o",
            fillstyle="none" if "recompute True" in differing else "full",
            label=", ".join([f"{side} TP={tp} CP={cp}", *differing]).replace(" True", ""),
        )
    lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens in the sequence", ylabel="layers x tokens / s / GPU, in thousands")
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", fontsize=7)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)
