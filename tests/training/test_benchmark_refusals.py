# SPDX-License-Identifier: Apache-2.0
"""What the training benchmark refuses: flags out of range or against each other, and a second start by torchrun."""

import pytest
from small_benchmark import started_with

FULL = "--arms sparsek --recompute-granularity full"
MISTAKES = [
    ("--arms window", "--arms window: flex_attention's backward needs a GPU"),
    (
        "--arms window --shape 3b --tokens 1048576",
        "--tokens 1048576: the window arm's flex_attention addresses 2^31 elements of a rank's queries",
    ),
    ("--arms sparse", "--arms sparse: must be among dense, window, sparsek"),
    ("--vocab-size 100", "--vocab-size 100: the data has token id"),
    ("--data-path nowhere", "--data-path nowhere: no dataset of that name"),
    ("--num-layers 1 2", "--num-layers: 2 numbers for 1 shapes"),
    ("--num-layers 0", "--num-layers 0: must be at least 1"),
    ("--steps 0", "--steps 0: must be at least 1"),
    ("--steps -1", "--steps -1: must be at least 0"),
    ("--warmup 0", "--warmup 0: must be at least 1"),
    ("--tokens 0", "--tokens 0: must be at least 1"),
    ("--tokens 64 -4", "--tokens -4: must be at least 1"),
    ("--topk 0", "--topk 0: must be an integer >= 1"),
    ("--topk 4097", "--topk 4097: must be at most 4096"),
    ("--window 0", "--window 0: must be an integer >= 1"),
    ("--initial-slope -1", "--initial-slope -1.0: must be a finite number >= 0"),
    ("--mlp-tile-tokens -3", "--mlp-tile-tokens -3: must be at least 1"),
    ("--mlp-tile-tokens 0", "--mlp-tile-tokens 0: must be at least 1"),
    ("--peak-tflops 0", "--peak-tflops 0.0: must be above 0"),
    ("--peak-tflops -5", "--peak-tflops -5.0: must be above 0"),
    ("--longest-dense 10", "--longest-dense 10: leaves no case"),
    (
        "--cpu-offloading-num-layers 1",
        "--cpu-offloading-num-layers 1: keeps the checkpoints of full recompute; add",
    ),
    (
        f"{FULL} --cpu-offloading-num-layers 3",
        "--cpu-offloading-num-layers 3: must be between 0 and --num-layers",
    ),
    (
        f"{FULL} --cpu-offloading-num-layers 2 --recompute-inputs 2",
        "--recompute-inputs 2: must be between 0 and 1, half of the layers",
    ),
    (f"{FULL} --recompute-num-layers 0", "--recompute-num-layers 0: must be between 1 and --num-layers 2"),
    (f"{FULL} --recompute-num-layers 3", "--recompute-num-layers 3: must be between 1 and --num-layers 2"),
    (
        "--recompute-num-layers 4",
        "--recompute-num-layers 4: has no effect without --recompute-granularity; add",
    ),
    (
        "--recompute-granularity selective --recompute-num-layers 4",
        "--recompute-num-layers 4: has no effect with --recompute-granularity selective; add",
    ),
    (
        "--tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2: does not divide the 1 processes started",
    ),
    (
        "--arms sparsek --context-parallel-size 2",
        "--context-parallel-size 2: times --tensor-model-parallel-size 1",
    ),
    ("--async-tensor-parallel", "--async-tensor-parallel with --tensor-model-parallel-size 1: there is nothing"),
    ("--context-parallel-size 0", "--context-parallel-size 0: must be at least 1"),
    ("--trainers deepspeed mcore", "--trainers mcore: megatron-core's distributed optimizer needs a GPU; use"),
    ("--out FILE", "FILE: cannot write there"),
    ("--plot FILE", "FILE: has no column shape; give a training.csv"),
    ("--plot nowhere.csv", "--plot nowhere.csv: cannot be read"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_named(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("text\n")
    assert message in refused(started_with, *arguments.split())
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tensor-model-parallel-size 2 --vocab-size 513", "--vocab-size 513: not divisible by 2"),
        (
            "--tensor-model-parallel-size 2 --tokens 97",
            "--tokens 97: not divisible by --tensor-model-parallel-size 2",
        ),
        (
            "--context-parallel-size 2 --tokens 98 --arms sparsek",
            "--tokens 98: not divisible by 2 x --context-par",
        ),
        (
            "--context-parallel-size 2 --tokens 97",
            "not divisible by --tensor-model-parallel-size x --context-para",
        ),
        (
            "--tensor-model-parallel-size 4",
            "--shape tiny: its num_query_groups 2: not divisible by",
        ),
    ],
)
def test_mistakes_between_ranks_are_named(arguments, message, refused, monkeypatch):
    monkeypatch.setattr("training_benchmark.runner.world_size_of_environment", lambda: 4)
    assert message in refused(started_with, *arguments.split())


def test_a_run_that_ended_is_not_begun_anew_by_torchrun(refused, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "torchrun has started this benchmark again" in refused(started_with)
