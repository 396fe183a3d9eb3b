# SPDX-License-Identifier: Apache-2.0
"""The training benchmark: its arithmetic, how kernels are given to parts, its dense arm, and one small run."""

import csv
import datetime
import math
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from programs import REPOSITORY, finish, run, start_code

sys.path.insert(0, str(REPOSITORY / "examples"))

import benchmark_training
from training_benchmark import ranks
from training_benchmark.parts import part_of_kernel
from training_benchmark.row import Row, compare_with_dense, line
from training_benchmark.shapes import SHAPES, causal_pairs, window_pairs
from training_benchmark.table import COLUMNS, read_csv, write_csv
from training_benchmark.trace import split_trace

from sparsek_megatron.async_tensor_parallel import AsyncColumn, AsyncRow
from sparsek_megatron.context_parallel.exchange import StartFromEarlierChunks
from sparsek_megatron.context_parallel.ulysses import _AllToAll
from sparsek_megatron.linear_score import _LinearScore
from sparsek_megatron.memory.linear_cross_entropy import _LinearCrossEntropy
from sparsek_megatron.position_scores import _PositionScores
from sparsek_megatron.training.parallel import Machine

NODE = "autograd::engine::evaluate_function: "


@pytest.mark.parametrize("tokens, width", [(7, 3), (7, 7), (7, 20), (1, 1)])
def test_pairs_are_counted(tokens, width):
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert window_pairs(tokens, width) == int(((j <= i) & (i - j < width)).sum())
    assert causal_pairs(tokens) == int((j <= i).sum())


def test_the_shapes_have_the_sizes_of_their_names():
    sizes = {
        name: shape.num_layers * shape.layer_weights / 1e9 for name, shape in SHAPES.items() if name != "tiny"
    }
    assert sizes == pytest.approx({"1.3b": 1.3, "3b": 3.0, "8b": 8.0}, rel=0.2)


def test_step_flops_are_three_times_the_forward():
    shape = SHAPES["tiny"]
    tokens, vocabulary, pairs = 10, 100, 30.0
    matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 192), (64, 192), (192, 64)]
    layer = sum(2 * a * b * tokens for a, b in matrices) + 4 * 16 * 4 * pairs
    want = 3 * (2 * layer + 2 * 64 * vocabulary * tokens)
    assert shape.step_flops(tokens=tokens, vocabulary=vocabulary, pairs=pairs) == want


@pytest.mark.parametrize(
    ("kernel", "around", "part"),
    [
        ("gemm", ("aten::mm", "part:linear", "part:attention"), "linear"),
        (
            "gemm",
            ("aten::mm", "LinearWithGradAccumulationAndAsyncCommunicationBackward", "phase:backward"),
            "linear",
        ),
        ("attention_forward_kernel", ("sparsek::attention", "part:attention"), "attention"),
        ("walk", ("sparsek::select", "part:attention"), "selection"),
        ("walk_the_dog", ("part:attention",), "attention"),
        ("elementwise", (f"{NODE}ScaledDotProductCudnnAttentionBackward0",), "attention"),
        ("ncclDevKernel_AllGather", ("part:linear",), "communication"),
        ("ncclDevKernel_AllGather", ("part:linear", "part:attention"), "communication"),
        ("ncclDevKernel_SendRecv", ("c10d::alltoall_base_", "part:attention"), "exchange"),
        ("ncclDevKernel_AllGather", ("part:scoring",), "exchange"),
        ("Memcpy DtoH (Device -> Pinned)", (), "offload"),
        ("rms", ("aten::_fused_rms_norm", "part:norm"), "norm"),
        ("elementwise", ("aten::add", "phase:backward"), "other"),
        ("gemm", ("aten::mm", "symm_mem::fused_all_gather_matmul", "part:linear"), "linear"),
        ("Memcpy PtoP", ("aten::copy_", "symm_mem::fused_all_gather_matmul", "part:linear"), "communication"),
        ("reduce", ("aten::sum", "symm_mem::fused_matmul_reduce_scatter", "part:linear"), "communication"),
    ],
)
def test_a_kernel_belongs_to_the_innermost_operation_that_says_what_it_is(kernel, around, part):
    assert part_of_kernel(kernel, around) == part


@pytest.mark.parametrize(
    ("function", "part", "collective"),
    [
        (StartFromEarlierChunks, "attention", "exchange"),
        (_AllToAll, "attention", "exchange"),
        (_LinearScore, "scoring", "exchange"),
        (_PositionScores, "scoring", "exchange"),
        (_LinearCrossEntropy, "loss", "communication"),
        (AsyncColumn, "linear", "communication"),
        (AsyncRow, "linear", "communication"),
    ],
)
def test_backward_functions_are_known_by_the_names_that_autograd_gives_them(function, part, collective):
    around = (f"{NODE}{function._backward_cls.__name__}", "phase:backward")
    assert part_of_kernel("elementwise", around) == part
    assert part_of_kernel("ncclDevKernel_AllGather", ("c10d::allgather", *around)) == collective


def event(name, category, start, duration, thread=1, **arguments):
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "pid": 1, "tid": thread,
            "args": arguments}  # fmt: skip


def test_a_trace_is_split_by_where_kernels_were_launched_not_by_when_they_ran():
    split = split_trace([
        {"ph": "M", "name": "process_name"},
        event("step", "user_annotation", 0, 100),
        event("phase:forward", "user_annotation", 0, 50),
        event("part:linear", "user_annotation", 10, 10),
        event("aten::mm", "cpu_op", 11, 5),
        event("cudaLaunchKernel", "cuda_runtime", 12, 1, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 30, 1, correlation=2),
        event("cudaStreamSynchronize", "cuda_runtime", 40, 5, correlation=9),
        # another thread at the same time: its launches are not inside the first one's ranges
        event("_LinearScoreBackward", "cpu_op", 10, 10, thread=2),
        event("cudaLaunchKernel", "cuda_runtime", 12, 1, thread=2, correlation=3),
        event("cudaMemcpy", "cuda_runtime", 50, 1, correlation=5),
        event("cudaMemcpyAsync", "cuda_runtime", 52, 1, correlation=6),
        event("cudaMalloc", "cuda_runtime", 60, 1, correlation=10),
        event("cudaDeviceSynchronize", "cuda_runtime", 150, 5, correlation=11),  # after the step: the profiler's own
        event("gemm", "kernel", 60, 3000, 7, correlation=1),
        event("elementwise", "kernel", 3060, 1000, 7, correlation=2),
        event("elementwise", "kernel", 2060, 2000, 8, correlation=3),
        event("Memset", "gpu_memset", 5060, 1000, 7, correlation=4),
    ])  # fmt: skip
    assert {part: ms for part, ms in split.parts.items() if ms} == {
        "linear": 3.0,
        "other": 2.0,
        "scoring": 2.0,
    }
    assert split.busy_ms == 5.0 and split.step_ms == 6.0 and split.kernels == 3
    assert dict(split.waits) == {"forward": 1, "between": 1} and split.allocations == 1
    assert split.attention_ms == 2.0 and split.idle_ms == 1.0


def test_an_exchange_beside_attention_is_time_of_attention_once():
    split = split_trace([
        event("step", "user_annotation", 0, 100),
        event("part:attention", "user_annotation", 10, 10),
        event("cudaLaunchKernelExC", "cuda_runtime", 12, 1, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 14, 1, correlation=2),
        event("ncclDevKernel_SendRecv", "kernel", 60, 3000, 7, correlation=1),
        event("sort", "kernel", 1060, 4000, 8, correlation=2),
    ])  # fmt: skip
    assert split.parts["exchange"] == 3.0 and split.parts["attention"] == 4.0 and split.attention_ms == 5.0


def profiled(arm, step_ms, *, profiled_ms, attention_ms):
    """A row whose profiled step had no gap between its kernels."""
    row = Row("8b", 4, 1024, arm, "deepspeed", 1, 1, 1, "", step_ms=step_ms, tokens_per_second=1e3 / step_ms)
    row.model_tflops = row.loss = 0.0
    row.split = split_trace([event("step", "user_annotation", 0, 1)])
    row.split.busy_ms, row.split.step_ms = profiled_ms - 10.0, profiled_ms
    row.split.attention_ms = row.split.parts["attention"] = attention_ms
    return row


def test_the_bound_is_the_dense_step_without_its_attention():
    dense = profiled("dense", 100.0, profiled_ms=100.0, attention_ms=80.0)
    sparse = profiled("sparsek", 25.0, profiled_ms=25.0, attention_ms=4.0)
    for each in (dense, sparse):
        compare_with_dense(each, [dense, sparse])
    assert sparse.share_of_bound == pytest.approx(20 / 25) and sparse.speedup == pytest.approx(4)
    alone = profiled("sparsek", 25.0, profiled_ms=25.0, attention_ms=4.0)
    compare_with_dense(alone, [alone])
    assert alone.share_of_bound == pytest.approx(21 / 25) and alone.speedup is None


def test_attention_has_its_share_of_the_profiled_step_where_that_one_was_slower(tmp_path):
    row = profiled("sparsek", 100.0, profiled_ms=160.0, attention_ms=40.0)
    assert row.without_attention_ms == pytest.approx(75.0) and row.share_of_bound == pytest.approx(0.75)
    assert "160.0 ms profiled: attention 40.0; no kernel running 10.0; 75.0 % of the bound" in line(row)
    write_csv([row], tmp_path / "training.csv")
    (written,) = read_csv(tmp_path / "training.csv", "--plot")
    assert [float(written[name]) for name in ("step_ms", "profiled_step_ms", "busy_ms", "share_of_bound")] == [
        100.0, 160.0, 150.0, 0.75,
    ]  # fmt: skip


SMALL = (
    *("--shape", "tiny", "--topk", "8", "--window", "8", "--stride", "8"),
    *("--vocab-size", "512", "--warmup", "1", "--steps", "1"),
)


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
        raise torch.cuda.OutOfMemoryError
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


def test_a_row_has_the_memory_of_the_rank_that_held_most_and_the_mean_loss(monkeypatch):
    def gathered(into, own):
        into[:] = [own, (6.0, 12.5), (7.0, 7.0)]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda shared, src: None)
    row = Row("8b", 4, 1024, "sparsek", "mcore", 3, 1, 1, "", loss=5.0, peak_gib=3.0)
    agreed = ranks.agree(row, Machine(0, 3, torch.device("cpu"), dist.HashStore()))
    assert (agreed.loss, agreed.peak_gib) == (6.0, 12.5)


def test_the_committed_table_has_the_programs_columns_and_marks_what_later_rows_replace():
    rows = read_csv(REPOSITORY / "examples" / "results" / "training.csv", "--plot")
    assert tuple(rows[0]) == COLUMNS
    case = COLUMNS[: COLUMNS.index("options") + 1]
    for index, row in enumerate(rows):
        later = [each for each in rows[index + 1 :] if all(each[name] == row[name] for name in case)]
        variables = [(each["max_connections"], row["max_connections"]) for each in later]
        replaced = any(theirs == own or not theirs or not own for theirs, own in variables)
        assert row["replaced"] == ("1" if replaced else ""), row


FULL = "--arms sparsek --recompute-granularity full"
MISTAKES = [
    ("--arms window", "--arms window: flex_attention's backward needs a GPU"),
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
    ("--trainers mcore --out FILE", "FILE: cannot write there"),
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


def started_with(*arguments):
    """The program with a small model, should it run; the dense arm and 64 tokens where no others are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["benchmark_training.py", *SMALL, "--tokens", "64", "--arms", "dense", *arguments]
        )
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the program sets it: not beyond this call
        benchmark_training.main()
