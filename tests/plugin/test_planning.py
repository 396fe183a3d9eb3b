# SPDX-License-Identifier: Apache-2.0
"""The cost model counts what the code sends and computes, and its search keeps to what fits and divides."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsek_megatron.planning import H200, MODELS, Layout, Machine, Model, Run, best_layout, estimate
from sparsek_megatron.planning.calibration import calibrate, layer_seconds
from sparsek_megatron.planning.cost import context_bytes, layer_flops, state_bytes
from sparsek_megatron.planning.search import layouts
from sparsek_megatron.training.flops import mean_attended_keys

TINY = Model(2, 64, 128, 4, 2, head_dim=16, vocabulary=100, topk=16, window=16, stride=8, pool=64)


@pytest.mark.parametrize(("name", "billions"), [("7B", 8.0), ("70B", 70.6), ("405B", 405.8)])
def test_shapes_have_the_parameters_of_their_models(name: str, billions: float) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("tokens", [20, 1_000, 100_000])
def test_attended_keys_are_those_of_the_selection(tokens: int) -> None:
    exact = mean_attended_keys(tokens, topk=16, window=16, stride=8)
    assert TINY.attended(tokens) == pytest.approx(exact, rel=0.05)


def test_costs_of_layouts_add_up() -> None:
    model, run = MODELS["7B"], Run(1 << 17, 1 << 21)
    alone = estimate(model, run, Layout(1, 1, 1, 1), H200)
    split = estimate(model, run, Layout(2, 2, 2, 2), H200)
    assert split.compute == pytest.approx(alone.compute / 16)
    assert split.bubble == pytest.approx(split.compute / 8)  # 8 micro-batches, 2 stages
    products, attention = layer_flops(model, run.tokens)
    forward_and_backward = 16 * 32 * 4 * products / (H200.peak * H200.matmul)
    assert alone.compute > forward_and_backward
    assert alone.received == dict.fromkeys(("tensor", "context", "pipeline", "data"), 0.0)
    assert attention == pytest.approx(4 * 32 * 128 * model.attended(1 << 17) * (1 << 17))


def test_context_parallel_bytes_do_not_depend_on_the_length_and_tensor_parallel_ones_do() -> None:
    model = MODELS["7B"]

    def received(tokens: int, *, tp: int = 1, cp: int = 1) -> dict[str, float]:
        return estimate(model, Run(tokens, tokens), Layout(tp, cp, 1, 1), H200).received

    assert received(1 << 17, cp=4)["context"] == received(1 << 20, cp=4)["context"] > 0
    assert received(1 << 20, tp=4)["tensor"] == pytest.approx(8 * received(1 << 17, tp=4)["tensor"])


def test_context_bytes_are_those_of_the_collectives() -> None:
    """Written out from the tensors that the exchange sends (test_context_parallel.py counts them)."""
    forward, backward = context_bytes(dataclasses.replace(TINY, kv_heads=1), tp=1, cp=4)
    row, recent, others = 2 * 16 * 2, 23, 6
    assert forward == others * (16 * row + 8 * 64 + 4 * recent) + 2 * recent * row
    assert backward == others * (16 * row + 4 * (64 + recent)) + 2 * recent * row


def test_zero_shards_the_optimizer_over_data_and_context_ranks() -> None:
    model = MODELS["7B"]
    whole = state_bytes(model, Layout(1, 1, 1, 1))
    assert whole == model.parameters * 18
    assert state_bytes(model, Layout(1, 2, 1, 4)) == model.parameters * (6 + 12 / 8)
    assert state_bytes(model, Layout(1, 2, 1, 4, zero=3)) == model.parameters * 18 / 8


def test_the_search_keeps_to_memory_and_divisors() -> None:
    run = Run(1 << 20, 1 << 24)
    plan = best_layout(MODELS["7B"], run, 64, H200)
    assert plan is not None and plan.layout.gpus == 64
    assert plan.cost.memory <= H200.memory
    every = [estimate(MODELS["7B"], run, layout, H200) for layout in layouts(MODELS["7B"], run, 64, H200)]
    assert plan.cost.seconds == min(cost.seconds for cost in every if cost.memory <= H200.memory)
    assert best_layout(MODELS["405B"], run, 8, H200) is None
    assert all(
        layout.tp <= 8 and run.sequences % layout.dp == 0 for layout in layouts(MODELS["7B"], run, 64, H200)
    )


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(16, 1, 1, 1), "kv_heads = 8 is not divisible by 16"),
        (Layout(1, 3, 1, 1), "tokens = 131072 is not divisible by 6"),
        (Layout(1, 1, 5, 1), "layers = 32 is not divisible by 5"),
        (Layout(1, 1, 1, 3), "sequences per step = 16 is not divisible by 3"),
        (Layout(1, 1, 2, 1, zero=3), "ZeRO-3 runs without a pipeline"),
    ],
)
def test_layouts_that_do_not_divide_are_named(layout: Layout, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimate(MODELS["7B"], Run(1 << 17, 1 << 21), layout, H200)


def rows_of(
    machine: Machine, meshes: list[tuple[int, int]], tokens: int = 1 << 17, model: Model = MODELS["7B"]
) -> list[dict[str, str]]:
    """What benchmark_scaling would have written on a machine that the model describes exactly."""
    model = dataclasses.replace(model, layers=2)
    rows = []
    for tp, cp in meshes:
        milliseconds = layer_seconds(model, tokens, tp, cp, machine, recompute=cp > 1) * 1e3
        row = {"side": "sparsek", "tp": tp, "cp": cp, "tokens": tokens, "layers": 2, "recompute": cp > 1}
        row |= {"hidden_size": model.hidden, "ffn_hidden_size": model.ffn, "cp_comm_type": "p2p"}
        same = ("heads", "kv_heads", "head_dim", "topk", "window", "stride")
        row |= {name: getattr(model, name) for name in same}
        rows.append({**row, "step_ms": milliseconds})
    return [{name: str(value) for name, value in row.items()} for row in rows]


def test_calibration_finds_the_constants_and_reports_the_error_of_every_row() -> None:
    machine = dataclasses.replace(H200, matmul=0.55, fast=200e9, exchange=2e-3)
    meshes = [(1, 1), (1, 2), (2, 1)]
    rows = rows_of(machine, meshes) + rows_of(machine, meshes, 1 << 15)
    fitted, compared = calibrate(rows, H200)
    for name in ("matmul", "fast", "exchange"):
        assert getattr(fitted, name) == pytest.approx(getattr(machine, name), rel=1e-6), name
    assert all(predicted == pytest.approx(measured) for _, measured, predicted in compared)
    rows[0]["step_ms"] = str(float(rows[0]["step_ms"]) * 1.25)
    name, measured, predicted = calibrate(rows, H200)[1][0]
    assert name == "TP=1 CP=1, 131,072 tokens" and -0.2 < predicted / measured - 1 < -0.05


def test_measured_layers_reduce_no_gradients() -> None:
    """benchmark_scaling has no optimizer: its context-parallel ranks keep the gradients that they computed."""
    model, layout = dataclasses.replace(MODELS["7B"], vocabulary=0), Layout(2, 2, 1, 1)
    cost = estimate(model, Run(1 << 17, 1 << 17), layout, H200)
    seconds = layer_seconds(model, 1 << 17, 2, 2, H200, recompute=True)
    assert seconds == pytest.approx(cost.compute + cost.tensor + cost.context) and cost.data > 0


def test_calibration_leaves_alone_what_no_row_depends_on() -> None:
    machine = dataclasses.replace(H200, matmul=0.55, fast=200e9, exchange=2e-3)
    fitted, _ = calibrate(rows_of(machine, [(1, 1)]), H200)
    assert (fitted.fast, fitted.exchange) == (H200.fast, H200.exchange)
    assert fitted.matmul == pytest.approx(0.55)
    with pytest.raises(ValueError, match="no sparsek row of one GPU"):
        calibrate(rows_of(machine, [(2, 1)]), H200)


def test_calibration_takes_every_row_in_its_own_shape() -> None:
    machine = dataclasses.replace(H200, matmul=0.55, fast=200e9, exchange=2e-3)
    rows = [
        row for model in MODELS.values() for row in rows_of(machine, [(1, 1), (1, 2), (2, 1)], model=model)
    ]
    fitted, _ = calibrate(rows, H200)
    assert (fitted.matmul, fitted.fast, fitted.exchange) == pytest.approx((0.55, 200e9, 2e-3))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("tp", "0", "row 2: tp '0': must be a whole number between 1 and"),
        ("cp", "two", "row 2: cp 'two': must be a whole number between 1 and"),
        ("layers", "9" * 5_000, "row 2: layers '9999"),
        ("kv_heads", "", "row 2: kv_heads '': must be a whole number between 1 and"),
        ("step_ms", "0", "row 2: step_ms '0': must be milliseconds between 0.001 and 1e+09"),
        ("step_ms", "nan", "row 2: step_ms 'nan': must be milliseconds"),
        ("recompute", "yes", "row 2: recompute 'yes': must be True or False"),
        ("cp_comm_type", "a2a", "row 2: cp_comm_type 'a2a': the cost model has p2p alone"),
        ("stride", None, "row 2 has no column stride: not results.csv of this version's"),
        ("tp", "3", "kv_heads = 8 is not divisible by 3"),
    ],
)
def test_rows_that_cannot_be_fitted_are_named(column: str, value: str | None, words: str) -> None:
    rows = rows_of(H200, [(1, 1), (1, 2), (2, 1)])
    rows[1] = {name: text for name, text in {**rows[1], column: value}.items() if text is not None}
    with pytest.raises(ValueError, match=re.escape(words)):
        calibrate(rows, H200)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("meshes", "milliseconds", "words"),
    [
        ([(1, 1)], {0: 1.0}, "s for 1e12 FLOPs of matrix products, which no machine has"),
        ([(1, 1), (2, 1)], {1: 1.0}, "s for a GB within a node, which no machine has"),
        ([(1, 1), (2, 1), (1, 2)], {2: 100.0}, "ms for a collective of an exchange, which no machine has"),
        ([(1, 1), (1, 2)], {}, "rows do not tell the link's rate from the time of an exchange"),
    ],
)
def test_constants_that_no_machine_has_are_refused(
    meshes: list[tuple[int, int]], milliseconds: dict[int, float], words: str
) -> None:
    rows = rows_of(H200, meshes)
    for index, value in milliseconds.items():
        rows[index]["step_ms"] = str(value)
    with pytest.raises(ValueError, match=words):
        calibrate(rows, H200)


def plan(*flags: str) -> subprocess.CompletedProcess[str]:
    """The example's run with these flags."""
    program = Path(__file__).parents[2] / "examples" / "plan_parallelism.py"
    return subprocess.run([sys.executable, str(program), *flags], capture_output=True, text=True, timeout=120)


def test_the_example_prints_a_row_for_each_case_and_the_errors(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    rows = rows_of(H200, [(1, 1), (2, 1)])
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = plan("--models", "7B", "--gpus", "8", "64", "--tokens", "131072", "--calibrate", str(results))
    assert done.returncode == 0, done.stderr
    assert f"matrix products at {H200.matmul:.1%}" in done.stdout
    assert done.stdout.count("| 7B |") == 2
    assert len(re.findall(r"\([+-]0\.0%\)", done.stdout)) == len(rows)


def test_the_example_tells_what_does_not_divide_from_what_does_not_fit() -> None:
    done = plan("--models", "7B", "405B", "--gpus", "8", "24", "--tokens", "131072")
    lines = [line for line in done.stdout.splitlines() if "| 131,072 |" in line]
    assert "| 7B | 24 | 131,072 | no layout divides 128 sequences and 32 layers |" in lines[1]
    assert "| 405B | 8 | 131,072 | does not fit |" in lines[2]


def test_an_overlong_field_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("side,tp\n" + "x" * (csv.field_size_limit() + 1))
    done = plan("--calibrate", str(tmp_path / "results.csv"))
    assert done.returncode == 2 and done.stdout == ""
    assert "field larger than field limit" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpus", "8", "0"), "--gpus 0: must be greater than 0"),
        (("--tokens", "0"), "--tokens 0: must be greater than 0"),
        (("--slow-gb", "nan"), "--slow-gb nan: must be finite"),
        (("--slow-gb", "inf"), "--slow-gb inf: must be finite"),
        (("--calibrate", "nofile.csv"), "--calibrate nofile.csv: cannot read it (No such file or directory)"),
        (("--calibrate", __file__), "row 1 has no column side: not results.csv of this version's"),
    ],
)
def test_bad_flags_of_the_example_end_in_one_line(flags: tuple[str, ...], words: str) -> None:
    done = plan(*flags)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1
