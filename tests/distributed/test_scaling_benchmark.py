# SPDX-License-Identifier: Apache-2.0
"""The scaling benchmark on two CPU processes: a row for every mesh, and traffic that tells CP from TP."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from sparsek_megatron.planning.calibration import measurements

PROGRAM = Path(__file__).parents[2] / "examples" / "benchmark_scaling.py"


def received(row: dict[str, str]) -> int:
    """Bytes of all collectives of a row."""
    return sum(int(part.split("=")[1]) for part in row["by_collective"].split())


def test_rows_for_every_mesh_and_bytes_by_collective(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    flags = (
        f"--tokens 256 512 --meshes 1x1 2x1 1x2 --sides sparsek dense --layers 1 --hidden-size 64 --ffn-hidden-size 96 "
        f"--heads 4 --kv-heads 2 --head-dim 16 --topk 8 --window 8 --stride 8 --steps 1 --out {tmp_path}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(PROGRAM), *flags.split()], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(r["side"], r["tp"], r["cp"], r["tokens"]): r for r in csv.DictReader(file)}
    assert len(measurements(list(rows.values()))) == 6  # what the planner's calibration reads
    assert len(rows) == 10  # dense has no context parallelism
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert rows["sparsek", "1", "1", "512"]["by_collective"] == ""
    short, long = (rows["sparsek", "1", "2", n]["by_collective"] for n in ("256", "512"))
    assert short == long and "CONTEXT_PARALLEL_GROUP" in short
    assert "TENSOR_MODEL_PARALLEL_GROUP" in rows["dense", "2", "1", "512"]["by_collective"]
    sparse, dense = (received(rows[side, "2", "1", "512"]) for side in ("sparsek", "dense"))
    assert dense < sparse < 1.1 * dense  # the scores' change of layout
    assert rows["sparsek", "1", "2", "512"]["exposed_communication_ms"] == "not measured"  # on CPU
