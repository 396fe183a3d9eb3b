# SPDX-License-Identifier: Apache-2.0
"""Small runs of the training benchmark: rows of every arm, one process or two, and a rank that ends them all."""

import csv
import datetime
import math
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from programs import REPOSITORY, finish, run, start_code
from small_benchmark import SMALL, started_with

sys.path.insert(0, str(REPOSITORY / "examples"))

from training_benchmark import ranks

from sparsek_megatron.training.parallel import Machine


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of a run of one process: the sparse arm, then the dense one."""
    out = tmp_path_factory.mktemp("single") / "results"
    run("benchmark_training.py", *SMALL, "--tokens", "96", "--arms", "sparsek", "dense", "--out", str(out))
    return out


def test_a_small_run_without_a_gpu(single):
    rows = rows_of(single / "training.csv")
    assert [row["arm"] for row in rows] == ["sparsek", "dense"]
    assert all(row["error"] == "" and float(row["tokens_per_second"]) > 0 for row in rows)
    assert all(abs(float(row["loss"]) - math.log(512)) < 0.01 for row in rows)
    assert float(rows[0]["speedup"]) > 0  # although the dense arm ran after it
    settings = [[row[name] for name in ("topk", "window", "stride", "slope")] for row in rows]
    assert settings == [["8", "8", "8", "topk"], [""] * 4]
    assert all(row["device"] == "CPU" and row["replaced"] == "" for row in rows)
    assert all(datetime.date.fromisoformat(row["date"]) for row in rows)
    in_repository = (REPOSITORY / ".git").exists()
    assert all(len(row["commit"]) >= 7 if in_repository else row["commit"] == "" for row in rows)


def test_the_plot_can_be_made_again_from_the_table_alone(single, tmp_path):
    shutil.copy(single / "training.csv", tmp_path)
    started_with("--plot", str(tmp_path / "training.csv"))
    assert (tmp_path / "training.png").read_bytes() == (single / "training.png").read_bytes()


ENDING = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch
from training_benchmark.trainers import DeepSpeedTrainer
from sparsek_megatron.errors import report_user_errors
import benchmark_training

step = DeepSpeedTrainer.step

def step_or_none_left(self, tokens, labels):
    if os.environ["RANK"] == "1" and tokens.shape[1] == 128:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB. If reserved is large try this.")
    return step(self, tokens, labels)

DeepSpeedTrainer.step = step_or_none_left
with report_user_errors():
    benchmark_training.main()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(what two processes printed, their rows), the second of which ran out of memory in its third case of five."""
    folder = tmp_path_factory.mktemp("ended")
    (folder / "program.py").write_text(ENDING)
    flags = [
        *SMALL,
        "--context-parallel-size",
        "2",
        "--arms",
        "dense",
        "sparsek",
        "dense",
        "--longest-dense",
        "96",
    ]
    flags += ["--tokens", "96", "128", "160", "--out", str(folder)]
    launch = [
        "--standalone",
        "--nproc-per-node=2",
        str(folder / "program.py"),
        str(REPOSITORY / "examples"),
        *flags,
    ]
    started = start_code(f"from torch.distributed.run import main; main({launch!r})")
    return finish(started, code=1, seconds=120), rows_of(folder / "training.csv")


def test_two_processes_share_sequences_in_the_sparse_arm_and_heads_in_the_dense_one(ended, single):
    """Each arm in its own layout, compared with the other. Context parallelism's loss, after a step, is that of one
    process: same weights; tensor-parallel ranks draw others.
    """
    printed, (dense, sparse, _) = ended
    assert "TP2 of 2:" in printed and "TP1 CP2 of 2:" in printed
    assert [(row["tp"], row["cp"], row["error"]) for row in (dense, sparse)] == [
        ("2", "1", ""),
        ("1", "2", ""),
    ]
    alone = rows_of(single / "training.csv")[0]
    assert float(sparse["speedup"]) > 0 and abs(float(dense["loss"]) - math.log(512)) < 0.01
    assert float(sparse["loss"]) == pytest.approx(float(alone["loss"]), abs=2e-4)  # the file has four digits
    assert dense["max_connections"] == sparse["max_connections"] == "1"


def test_a_rank_without_memory_ends_all_and_names_what_did_not_run(ended):
    printed, rows = ended
    assert [row["tokens"] for row in rows] == ["96", "96", "128"]
    assert rows[-1]["error"] == "out of memory on rank 1" and rows[-1]["step_ms"] == ""
    assert printed.count("sparsek  deepspeed TP1 CP2 of 2: out of memory on rank 1\n") == 1
    assert "tiny x2 128 sparsek deepspeed: rank 1: CUDA out of memory. Tried to allocate 6 GiB.\n" in printed
    end = "error: tiny x2 128 sparsek deepspeed: out of memory on rank 1 of 2, which ends the others too; not run: "
    assert printed.count(f"{end}tiny x2 96 dense deepspeed; run them without this case\n") == 1


def test_one_rank_tells_the_end_and_ranks_that_meet_its_broken_connection_end_quietly(monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("training_benchmark.ranks.os._exit", leave)
    machine = Machine(0, 2, torch.device("cpu"), dist.HashStore())
    told = []
    ranks.leave_if_ended(machine)  # an error of this rank's own: it goes on to be raised
    for _ in range(2):
        with pytest.raises(SystemExit, match="2"):
            ranks.end_launch(machine, lambda: told.append("once"))
    assert told == ["once"]
    with pytest.raises(SystemExit, match="2"):
        ranks.leave_if_ended(machine)
