# SPDX-License-Identifier: Apache-2.0
"""The benchmark's CSV file: its columns, and what a row of it says of where and how it was measured."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import subprocess
from pathlib import Path
from typing import Any

from training_benchmark.parts import PARTS
from training_benchmark.row import Row

from sparsek_megatron import SparseKConfig
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write

COLUMNS = (
    "shape", "layers", "tokens", "arm", "trainer", "gpus", "tp", "cp", "options",
    "topk", "window", "stride", "slope", "max_connections", "device", "date", "commit", "replaced",
    "step_ms", "tokens_per_second", "model_tflops", "mfu", "peak_gib", "loss", "dense_tokens_per_second",
    "dense_without_attention_ms", "error", "without_attention_ms", "share_of_bound", "speedup", "profiled_step_ms",
    *(f"{part}_ms" for part in PARTS), "busy_ms", "host_waits", "allocations", "kernels",
)  # fmt: skip
_REPOSITORY = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit of this project's repository, "-dirty" behind it where files differ; empty without a repository."""
    if not (_REPOSITORY / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=_REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a repository that it refuses to read
        return ""


def origin(device: str) -> dict[str, Any]:
    """Columns of where and when: read once CUDA has started, since that fixes the variable for this process."""
    return {
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "max_connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset"),
    }


def attention_settings(arm: str, sparsek: SparseKConfig) -> dict[str, Any]:
    """Columns of what an arm attends to; empty ones where the arm has no such setting."""
    if arm == "dense":
        return {}
    sizes: dict[str, Any] = {"topk": sparsek.topk, "window": sparsek.window}
    if arm == "window":
        return sizes
    slope = "topk" if sparsek.initial_slope is None else f"{sparsek.initial_slope:g}"
    return sizes | {"stride": sparsek.stride, "slope": slope}


def record(row: Row) -> dict[str, Any]:
    """A row of the CSV file."""
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "split"}
    values |= {
        "without_attention_ms": row.without_attention_ms,
        "share_of_bound": row.share_of_bound,
        "speedup": row.speedup,
        "profiled_step_ms": row.profiled_step_ms,
    }
    if row.split is not None:
        values |= {f"{part}_ms": ms for part, ms in row.split.parts.items()}
        values |= {"busy_ms": row.split.busy_ms, "host_waits": row.split.waits.total()}
        values |= {"allocations": row.split.allocations, "kernels": row.split.kernels}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows; what was not measured is empty."""
    with atomic_write(path) as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(record(row) for row in rows)


def read_csv(path: Path, flag: str) -> list[dict[str, str]]:
    """The rows of such a file, as text.

    Raises:
        UserError: naming `flag`, where it cannot be read or is another table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise UserError(
            f"{flag} {path}: cannot be read ({err}); give a training.csv of this program"
        ) from None
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing or not rows:
        what = f"has no column {missing[0]}" if missing else "has no rows"
        raise UserError(f"{flag} {path}: {what}; give a training.csv of this program")
    return rows
