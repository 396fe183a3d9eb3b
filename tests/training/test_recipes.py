# SPDX-License-Identifier: Apache-2.0
"""The recipes in `examples/configs/`: settings that can run, and first lines that agree with the measured rows."""

import csv
import re
import sys

import pytest
from programs import REPOSITORY

from sparsek_megatron.training.arguments import TrainingConfig, parse
from sparsek_megatron.training.validate import (
    check_deepspeed,
    check_parallelism,
    check_ranges,
    sparsek_config,
)

sys.path.insert(0, str(REPOSITORY / "examples"))
from training_benchmark.model import Options
from training_benchmark.shapes import SHAPES

CONFIGS = REPOSITORY / "examples" / "configs"
RECIPES = sorted(CONFIGS.glob("gpt_*.yaml"))
SIZED = [path for path in RECIPES if re.fullmatch(r"gpt_[\d.]+b_\d+[km]_\dgpu", path.stem)]
TOKENS = {"8k": 1 << 13, "32k": 1 << 15, "128k": 1 << 17, "512k": 1 << 19, "1m": 1 << 20}
TRAINERS = {"megatron-core's optimizer": "mcore", "DeepSpeed's ZeRO-1": "deepspeed"}
SLOPES = {"slope 0": "0", "the default slope": "topk"}
COUNTS = {"one": "1", "two": "2", "four": "4"}
NUMBERS = r"([\d.]+) s(?: a step of \w+ sequences?)?, ([\d,]+) tokens/s, MFU ([\d.]+) %, peak ([\d.]+) GiB"

IN_TRAINER = (
    r"In examples/pretrain_gpt.py, (\d+) sequences a step \(--global-batch-size \1\), [\d-]+, (\w+) H200, the default "
    r"slope:\n([\d.]+) s a step, ([\d,]+) tokens/s, peak ([\d.]+) GiB"
)


def settings(path) -> TrainingConfig:
    return parse(["--config", str(path), "--tokenizer-model", "t", "--data-path", "d", "--save", "s"])[0]


def first_lines(path) -> str:
    """The comment above the settings, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:].strip() for line in lines if line.startswith("#"))


def sparsek_rows(**wanted: str) -> list[dict[str, str]]:
    """Rows of the training benchmark that no later one replaces."""
    with (REPOSITORY / "examples" / "results" / "training.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "sparsek" and not row["replaced"]]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def has(row: dict[str, str], seconds: str, tokens_per_second: str, mfu: str, peak: str) -> bool:
    """Whether a row's numbers, at the digits given, are these."""
    if not row["step_ms"]:
        return False
    digits = len(seconds.partition(".")[2])
    return (
        f"{float(row['step_ms']) / 1e3:.{digits}f}" == seconds
        and f"{float(row['tokens_per_second']):,.0f}" == tokens_per_second
        and abs(100 * float(row["mfu"]) - float(mfu)) < 0.051
        and f"{float(row['peak_gib']):.1f}" == peak
    )


def options(config: TrainingConfig) -> str:
    """The benchmark's words for what a recipe switches on."""
    layers = config.recompute_num_layers if config.recompute_method == "block" else None
    return str(
        Options(
            recompute=config.recompute_granularity,
            recompute_layers=layers,
            apply_rope_fusion=config.apply_rope_fusion,
            cpu_offloading_num_layers=config.cpu_offloading_num_layers,
            recompute_inputs=config.recompute_inputs,
            mlp_tile_tokens=config.mlp_tile_tokens,
        )
    )


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_a_recipe_is_the_shape_context_and_gpus_of_its_name(path):
    shape, context, gpus = path.stem.removeprefix("gpt_").split("_")
    config, processes = settings(path), int(gpus.removesuffix("gpu"))
    assert config.tensor_model_parallel_size * config.context_parallel_size == processes
    check_ranges(config)
    check_parallelism(config, processes)
    check_deepspeed(config, processes, on_gpu=True)
    sparsek_config(config)
    assert config.seq_length == TOKENS[context]
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        assert getattr(config, name) == getattr(SHAPES[shape], name), name
    assert f"NPROC_PER_NODE={processes} launch/torchrun.sh examples/pretrain_gpt.py" in first_lines(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_its_command_and_what_it_was_measured_to_take(path):
    lines = first_lines(path)
    assert "launch/torchrun.sh examples/pretrain_gpt.py" in lines
    assert f"--config examples/configs/{path.name} " in lines
    assert re.search(NUMBERS, lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_settings_and_the_numbers_of_a_row(path):
    config, lines = settings(path), first_lines(path)
    said = re.search(
        r"Measured \S+ with examples/benchmark_training.py, (\w+) H200[^,]*, ([^,]+), ([^:]+):", lines
    )
    assert said
    gpus, trainer, slope = COUNTS[said[1]], TRAINERS[said[2]], SLOPES[said[3]]
    of_shape = {
        "shape": path.stem.split("_")[1],
        "layers": str(config.num_layers),
        "tokens": str(config.seq_length),
    }
    rows = sparsek_rows(
        **of_shape,
        gpus=gpus,
        tp=str(config.tensor_model_parallel_size),
        cp=str(config.context_parallel_size),
        trainer=trainer,
        slope=slope,
        topk=str(config.sparsek_topk),
        window=str(config.sparsek_window),
        stride=str(config.sparsek_stride),
        options=options(config),
    )
    own, *others = re.findall(NUMBERS, lines)
    assert any(has(row, *own) for row in rows), rows
    for numbers in others:
        assert any(has(row, *numbers) for row in sparsek_rows(**of_shape, gpus=gpus)), numbers


def test_the_list_of_recipes_is_complete_and_quotes_their_numbers():
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    line = r"^\| `(gpt_[^`]+)` \|.*\| ([\d,]+) \| (?:([\d,]+) \((\d+)\)|not measured) \|$"
    listed = {name: tuple(numbers) for name, *numbers in re.findall(line, page, flags=re.MULTILINE)}
    stated = {}
    for path in RECIPES:
        benchmark, trainer = (re.search(pattern, first_lines(path)) for pattern in (NUMBERS, IN_TRAINER))
        assert benchmark
        stated[path.name] = (benchmark[2], *((trainer[4], trainer[1]) if trainer else ("", "")))
    assert listed == stated


def test_what_a_recipe_takes_in_the_trainer_is_as_measured():
    with (REPOSITORY / "examples" / "results" / "recipes.csv").open(newline="") as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    stated = {path.stem: re.search(IN_TRAINER, first_lines(path)) for path in RECIPES}
    assert {name for name, found in stated.items() if found} == set(rows)
    for name, row in rows.items():
        config, found = settings(CONFIGS / f"{name}.yaml"), stated[name]
        tokens, seconds = int(row["sequences"]) * config.seq_length, float(row["step_s"])
        assert int(row["tokens"]) == config.seq_length
        assert float(row["tokens_per_second"]) == pytest.approx(tokens / seconds, rel=1e-4)
        assert found and found.groups() == (
            row["sequences"], {number: word for word, number in COUNTS.items()}[row["gpus"]], f"{seconds:.2f}",
            f"{int(row['tokens_per_second']):,}", f"{float(row['peak_gib']):.1f}",
        )  # fmt: skip
