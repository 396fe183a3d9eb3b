# SPDX-License-Identifier: Apache-2.0
"""What checkpoints cost, from step times that are known: made up, or written by `Report` under the test's clock."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
from programs import REPOSITORY

from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.checkpoint_cost import (
    begun,
    checkpoint_costs,
    mean_and_margin,
    slowest_steps,
)
from sparsek_megatron.training.report import METRICS, Report, read_metrics

sys.path.insert(0, str(REPOSITORY / "examples"))

from checkpoint_cost import main

WAITED = 0.05


def life(last: int, saves: tuple[int, ...], *, first: int = 1, base=lambda step: 0.4, more=None) -> list[dict]:
    """Records of a process's steps `first` to `last`: base(step) seconds, and `more` ones by step."""
    records = [{"step": first - 1, "valid_loss": 5.0}]
    for step in range(first, last + 1):
        health = {"seconds": base(step) + (more or {}).get(step, 0.0)}
        health |= {"checkpoint_waited": WAITED} if step - 1 in saves else {}
        health |= {"started": True} if step == first else {}
        records.append({"step": step, "loss": 1.0, "health": health})
    return records


def carried(save: int, each: float = 0.02) -> dict[int, float]:
    """Seconds more in each of ten steps."""
    return dict.fromkeys(range(save + 1, save + 11), each)


def drifting(step: int) -> float:
    return 0.4 + 0.003 * step


def test_a_checkpoint_costs_what_training_waited_and_what_its_steps_take_longer():
    first, second = checkpoint_costs(life(60, (20, 40), more=carried(20) | {41: 0.1}), 10)
    assert (first.step, first.waited, first.before, first.after) == (20, WAITED, 10, 10)
    assert first.base == second.base == pytest.approx(0.4)
    assert first.seconds == pytest.approx(WAITED + 10 * 0.02) and first.share == pytest.approx(0.25 / 4)
    assert second.seconds == pytest.approx(WAITED + 0.1) and second.step == 40
    assert second.carrying == pytest.approx((0.5, *[0.4] * 9))


@pytest.mark.parametrize(
    ("save", "last", "before", "after"), [(20, 40, 10, 10), (20, 37, 10, 7), (10, 30, 5, 10), (12, 27, 7, 5)]
)
def test_a_linear_drift_cancels_with_neighbours_on_both_sides_even_where_one_is_shorter(save, last, before, after):
    (cost,) = checkpoint_costs(life(last, (save,), base=drifting, more=carried(save)), 10)
    assert (cost.before, cost.after) == (before, after)
    assert cost.base == pytest.approx(drifting(save + 5.5), rel=1e-12)
    assert cost.seconds == pytest.approx(WAITED + 10 * 0.02, rel=1e-12)


@pytest.mark.parametrize(
    ("save", "last", "before", "after", "base"), [(20, 34, 10, 0, 15.5), (9, 29, 0, 10, 24.5)]
)
def test_a_side_of_less_than_half_does_not_count(save, last, before, after, base):
    (cost,) = checkpoint_costs(life(last, (save,), base=drifting), 10)
    assert (cost.before, cost.after) == (before, after) and cost.base == pytest.approx(drifting(base))


def test_steps_that_carry_another_checkpoint_are_no_neighbours():
    records = life(90, (20, 35, 55, 65, 70), more={n: 1.0 for save in (20, 35, 55, 65) for n in carried(save)})
    costs = checkpoint_costs(records, 10)
    assert [(each.step, each.before, each.after) for each in costs] == [(20, 10, 5), (35, 5, 10), (55, 10, 0)]
    assert [each.base for each in costs] == pytest.approx([0.4] * 3)
    assert begun(records) == [[20, 35, 55, 65, 70]]
    assert checkpoint_costs(life(60, (20, 25)), 10) == []


def test_the_first_steps_of_a_process_are_slow_for_another_reason():
    compiling = {1: 30.0, 2: 1.0, 5: 1.0}
    (cost,) = checkpoint_costs(life(30, (10,), more=compiling), 10)
    assert (cost.before, cost.after) == (5, 10) and cost.base == pytest.approx(0.4)
    assert [len(checkpoint_costs(life(30, (save,)), 10)) for save in (4, 5)] == [0, 1]


def test_a_resumed_run_is_compared_with_itself():
    again = dict.fromkeys(range(36, 41), 30.0)
    resumed = life(70, (50,), first=36, base=lambda step: 0.8, more=again)
    older = [{"step": 0, "loss": 1.0, "health": {"tokens_per_second": 1.0}}]
    costs = checkpoint_costs([*older, *life(35, (20,)), *resumed], 10)
    assert [(each.step, each.before, each.after) for each in costs] == [(20, 10, 5), (50, 10, 10)]
    assert [each.base for each in costs] == pytest.approx([0.4, 0.8])
    assert begun([*older, *life(35, (20,)), *resumed]) == [[20], [50]] and begun(older) == []


def test_the_slowest_steps_are_named():
    costs = checkpoint_costs(life(60, (20, 40), more={23: 0.3, 47: 0.5, 35: 9.0}), 10)
    first, second = slowest_steps(costs, 2)
    assert (first.save, first.step, second.save, second.step) == (40, 47, 20, 23)
    assert first.since == pytest.approx(WAITED + 6 * 0.4) and second.since == pytest.approx(WAITED + 2 * 0.4)
    assert first.over - second.over == pytest.approx(0.2 + costs[0].base - costs[1].base)


def test_the_interval_is_students():
    assert mean_and_margin([3.0]) == (3.0, None)
    assert mean_and_margin([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert mean_and_margin([1.0, 3.0]) == pytest.approx((2.0, 12.706))
    assert mean_and_margin([0.0, 2.0] * 16)[1] == pytest.approx(2.0395 * math.sqrt(32 / 31) / math.sqrt(32), rel=1e-4)
    assert mean_and_margin([0.0, 2.0] * 15 + [1.0])[1] == pytest.approx(2.042 / math.sqrt(31))


def report_a_run(folder: Path, monkeypatch, *, steps: int, saves: tuple[int, ...], start: int = 0) -> None:
    """Steps of 0.5 s; `save()` takes 0.125 s and the step after it 0.25 s more."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = TrainingConfig(save=str(folder), train_iters=steps, log_interval=1000)
    report = Report(config, start=start, tokens_per_step=8, flops_per_token=1.0, peak_flops=None, entropy=5.0)
    for step in range(start + 1, steps + 1):
        now[0] += 0.75 if step - 1 in saves else 0.5
        report.step(step=step, loss=2.0, lr=1e-3, grad_norm=1.0, selection=None)
        if step in saves:
            now[0] += 0.125
            report.checkpoint(step=step, waited=0.125)
    report.close()


def test_the_program_tells_what_a_run_has_recorded(tmp_path, monkeypatch, capsys):
    report_a_run(tmp_path, monkeypatch, steps=45, saves=(20, 40))
    main([str(tmp_path), "--steps", "10"])
    said = capsys.readouterr().out.splitlines()
    assert "| 20 | 125.0 | 250.0 | 25.00 | 500.0 | 10, 10 | 7.50% |" in said
    assert "slowest: step 21, 250.0 ms over base, 0.1 s after the checkpoint of step 20 began" in said
    assert sum(line.startswith("1 of 2 checkpoints left out: fewer than 10 steps") for line in said) == 1
    assert said[-1] == "a checkpoint every 10 steps costs 7.50% (one checkpoint, no interval)"
    report_a_run(tmp_path, monkeypatch, steps=90, start=40, saves=(60, 80))
    assert begun(read_metrics(tmp_path, health=True)) == [[20], [60, 80]]
    main([str(tmp_path), "--steps", "10"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in said if line[2:3].isdigit()] == ["| 20", "| 60", "| 80"]
    assert sum(line.startswith("1 of 3 with neighbours on one side only") for line in said) == 1
    assert said[-1] == "a checkpoint every 10 steps costs 7.50% (95 % interval 7.50% to 7.50%, 3 checkpoints)"


def test_what_cannot_be_told_is_refused_in_one_line(tmp_path, refused):
    def refusal(records: list[dict], *more: str) -> str:
        (tmp_path / METRICS).write_text("".join(json.dumps(each) + "\n" for each in records))
        return refused(main, [str(tmp_path), *more])

    assert f"{tmp_path}: there is no metrics.jsonl" in refused(main, [str(tmp_path)])
    assert refusal(life(60, ()), "--steps", "1") == "error: --steps 1: must be at least 2"
    assert "--save-interval 100, 150 steps or more" in refusal(life(60, ()))
    assert "no step follows a checkpoint" in refusal([{"step": 1, "loss": 1.0, "health": {"mfu": 0.5}}])
    close = refusal(life(60, (10, 20, 30, 45)), "--steps", "10")
    assert "at most 15 steps apart are too close for --steps 10; train with --save-interval 20, or give" in close
    assert close.endswith("--steps 7")
    assert refusal(life(60, (10, 13)), "--steps", "2").endswith("for --steps 2; train with --save-interval 4")
    assert "1 of 1 checkpoints left out" in refusal(life(60, (20,)))
