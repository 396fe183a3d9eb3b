# SPDX-License-Identifier: Apache-2.0
"""What a run tells of each step: TensorBoard's scalars, the records, and lines, on a terminal too."""

import dataclasses
import json
import math
import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.health import SelectionHealth
from sparsek_megatron.training.report import CURVE, METRICS, Report, read_metrics

SELECTION = SelectionHealth(saturated=0.25, mean_age=31.0, overflow=0.125)
STEP = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.75}
SCALARS = {"loss", "lr", "grad_norm", "tokens_per_second", "seconds", "mfu", "memory_gib"}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def report(folder, *, start=0, peak_flops=2000.0) -> Report:
    config = TrainingConfig(save=str(folder), train_iters=10, log_interval=2)
    return Report(
        config, start=start, tokens_per_step=100, flops_per_token=10.0, peak_flops=peak_flops, entropy=5.0
    )  # fmt: skip


def two_steps(folder, clock) -> None:
    each = report(folder)
    clock[0] += 1.0
    each.step(step=1, **STEP, selection=None)
    clock[0] += 40.0  # memory for checkpoints is made then
    each.restart_clock()
    clock[0] += 2.0
    each.step(step=2, **STEP, selection=SELECTION)
    clock[0] += 40.0
    each.checkpoint(step=2, waited=0.5)
    clock[0] += 40.0
    each.validation(step=2, loss=3.0)
    clock[0] += 1.0
    each.step(step=3, loss=math.nan, lr=1e-3, grad_norm=math.inf, selection=None)
    each.close()


def test_tensorboard_has_every_number_of_every_step(tmp_path, clock):
    two_steps(tmp_path, clock)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    selection = {f"selection/{name}" for name in dataclasses.asdict(SELECTION)}
    others = {"checkpoint/seconds_waited", "valid/loss", "valid/unigram_entropy"}
    assert set(board.Tags()["scalars"]) == {f"train/{name}" for name in SCALARS} | selection | others

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in board.Scalars(tag)}

    assert scalars("train/tokens_per_second") == {1: 100.0, 2: 50.0, 3: 100.0}
    assert scalars("train/seconds") == {1: 1.0, 2: 2.0, 3: 1.0}
    assert scalars("train/mfu") == {1: 0.5, 2: 0.25, 3: 0.5}
    assert scalars("train/grad_norm") == {1: 0.75, 2: 0.75, 3: math.inf}
    assert min(scalars("train/memory_gib").values()) > 0.01
    assert scalars("selection/mean_age") == {2: 31.0} and scalars("selection/overflow") == {2: 0.125}
    assert scalars("valid/loss") == {2: 3.0}


def test_the_records_have_them_too_apart_from_what_a_repeated_run_repeats(tmp_path, clock):
    two_steps(tmp_path, clock)
    steps = [record for record in read_metrics(tmp_path, health=True) if "loss" in record]
    assert [set(record) for record in steps] == [{"step", *STEP, "health"}] * 3
    health = [record["health"] for record in steps]
    assert [each["tokens_per_second"] for each in health] == [100.0, 50.0, 100.0]
    assert [each["seconds"] for each in health] == [1.0, 2.0, 1.0]
    own = {"tokens_per_second", "seconds", "mfu", "memory_gib"}
    looked = set(dataclasses.asdict(SELECTION))
    assert [set(each) - own for each in health] == [{"started"}, looked, {"checkpoint_waited"}]
    assert health[0]["started"] is True and health[2]["checkpoint_waited"] == 0.5
    null = {"step": 3, "loss": None, "lr": 1e-3, "grad_norm": None}
    wanted = [{"step": 1, **STEP}, {"step": 2, **STEP}, {"step": 2, "valid_loss": 3.0}, null]
    assert read_metrics(tmp_path) == wanted
    report(tmp_path, start=2).close()
    assert read_metrics(tmp_path) == wanted[:3]
    assert [r["health"] for r in read_metrics(tmp_path, health=True) if "loss" in r] == health[:2]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_come_beside_a_progress_bar_too(tmp_path, clock, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    two_steps(tmp_path, clock)
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if "/10  loss" in line]
    assert len(lines) == 1
    assert "step 2/10  loss 2.5000  lr 1.00e-03  grad norm 0.750  95 tokens/s  MFU 47.5%" in lines[0]
    assert "gates 25% saturated, age 31, 12.5% pool overflow  ETA " in lines[0]
    assert ("training:" in said.err) == is_terminal


def test_the_validation_before_the_first_step_is_recorded_once_however_often_the_run_starts(tmp_path, clock):
    for start in (0, 0, 1):
        each = report(tmp_path, start=start)
        if start == 0:
            each.validation(step=0, loss=3.0)
        clock[0] += 1.0
        each.step(step=start + 1, **STEP, selection=None)
        each.close()
    wanted = [{"step": 0, "valid_loss": 3.0}, {"step": 1, **STEP}, {"step": 2, **STEP}]
    assert read_metrics(tmp_path) == wanted
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("valid/loss")] == [0]


def test_every_line_is_json_and_the_curve_is_drawn_where_numbers_are_not_finite(tmp_path, clock):
    each = report(tmp_path)
    each.validation(step=0, loss=math.nan)
    clock[0] += 1.0
    each.step(step=1, loss=math.inf, lr=1e-3, grad_norm=1.0, selection=SelectionHealth(math.nan, 1.0, 0.0))
    each.validation(step=1, loss=3.0)
    each.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / METRICS).read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["valid_loss"] for r in records if "valid_loss" in r] == [None, 3.0]
    assert (tmp_path / CURVE).read_bytes().startswith(b"\x89PNG")


def test_records_of_earlier_lives_are_on_the_disk_before_their_file_is_replaced(tmp_path, clock, monkeypatch):
    two_steps(tmp_path, clock)
    flushed = []
    replace, fsync = os.replace, os.fsync

    def see_replace(source, target):
        if str(target).endswith(METRICS):
            assert os.stat(source).st_ino in flushed
        replace(source, target)

    def see_fsync(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", see_replace)
    monkeypatch.setattr(os, "fsync", see_fsync)
    report(tmp_path, start=2).close()
    assert len(read_metrics(tmp_path)) == 3
