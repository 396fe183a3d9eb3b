# SPDX-License-Identifier: Apache-2.0
"""The same programs on GPUs: NCCL, bfloat16 and the Triton kernels."""

import csv
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import clip_grads
from programs import Prepared, run

from sparsek_megatron.training.report import read_metrics

pytestmark = pytest.mark.gpu


def train(prepared: Prepared, save: Path, *more: str) -> str:
    model = (
        "--hidden-size 128 --kv-channels 64 --seq-length 256 --sparsek-topk 32 --sparsek-window 32 --lr 3e-3"
    )
    flags = [
        *prepared.flags(save),
        *model.split(),
        "--load",
        str(save),
        "--train-iters",
        "12",
        "--save-interval",
        "4",
    ]
    return run("pretrain_gpt.py", *flags, *more, gpu=True)


def losses(save: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(save) if "loss" in r]


def test_one_gpu_trains_in_bf16_resumes_and_generates(prepared, tmp_path):
    save = tmp_path / "one"
    said = train(prepared, save, "--nproc-per-node", "1", "--exit-interval", "4")
    assert "1 x GPU" in said and "NCCL, Triton kernels, bf16" in said
    assert "resuming" in train(prepared, save, "--nproc-per-node", "1")
    assert len(losses(save)) == 12 and losses(save)[-1] < losses(save)[0] - 0.3
    sample = run("generate.py", "--load", str(save), "--prompt", "import ", "--max-new-tokens", "8", gpu=True)
    assert "\nimport " in sample


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "layout", ["--tensor-model-parallel-size 2 --sequence-parallel", "--zero-stage 2", "--zero-stage 3"]
)
def test_two_gpus_follow_one(prepared, tmp_path, layout):
    batch = ("--global-batch-size", "4")
    train(prepared, tmp_path / "one", "--nproc-per-node", "1", *batch)
    train(prepared, tmp_path / "two", "--nproc-per-node", "2", *batch, *layout.split())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=3e-2)


CLIPS_ON_DEVICE = pytest.mark.skipif(
    not hasattr(clip_grads, "multi_tensor_scale_tensor_impl"),
    reason="this megatron-core reads the norm to clip by it",
)


@pytest.mark.parametrize("trainer", ["deepspeed", pytest.param("mcore", marks=CLIPS_ON_DEVICE)])
def test_a_step_never_waits_for_the_gpu(tmp_path, trainer):
    """In the profiler's trace of a whole step, optimizer included."""
    case = "--shape 1.3b --num-layers 1 --tokens 4096 --arms sparsek --warmup 2 --steps 1 --trainers"
    printed = run("benchmark_training.py", *case.split(), trainer, "--out", str(tmp_path), gpu=True)
    with (tmp_path / "training.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["error"] == "" and int(row["kernels"]) > 100
    assert row["host_waits"] == "0", printed
