# SPDX-License-Identifier: Apache-2.0
"""The training benchmark: its arithmetic, how kernels are given to parts, its dense arm, and one small run."""

import csv
import sys

import pytest
import torch
from programs import REPOSITORY, finish, run, start_script

sys.path.insert(0, str(REPOSITORY / "examples"))

from training_benchmark.parts import part_of_kernel
from training_benchmark.report import Row, compare_with_dense
from training_benchmark.shapes import SHAPES, causal_pairs, window_pairs
from training_benchmark.trace import split_trace

from sparsek_megatron.context_parallel.exchange import StartFromEarlierChunks
from sparsek_megatron.context_parallel.ulysses import _AllToAll
from sparsek_megatron.linear_score import _LinearScore
from sparsek_megatron.memory.linear_cross_entropy import _LinearCrossEntropy

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
        (_LinearCrossEntropy, "loss", "communication"),
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


def test_the_bound_is_the_dense_step_without_its_attention():
    def row(arm, step_ms, attention_ms):
        found = Row(
            "8b", 4, 1024, arm, "deepspeed", 1, 1, 1, "", step_ms=step_ms, tokens_per_second=1e3 / step_ms
        )
        found.split = split_trace([event("step", "user_annotation", 0, 1)])
        found.split.busy_ms = step_ms
        found.split.attention_ms = attention_ms
        return found

    dense, sparse = row("dense", 100.0, 80.0), row("sparsek", 25.0, 4.0)
    for each in (dense, sparse):
        compare_with_dense(each, [dense, sparse])
    assert sparse.share_of_bound == pytest.approx(20 / 25) and sparse.speedup == pytest.approx(4)
    alone = row("sparsek", 25.0, 4.0)
    compare_with_dense(alone, [alone])
    assert alone.share_of_bound == pytest.approx(21 / 25) and alone.speedup is None


def test_a_small_run_without_a_gpu(tmp_path):
    out = tmp_path / "results"
    small = "--shape tiny --tokens 96 --topk 8 --window 8 --stride 8 --vocab-size 512 --warmup 1 --steps 1"
    printed = run("benchmark_training.py", *small.split(), "--arms", "dense", "sparsek", "--out", str(out))
    with (out / "training.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["arm"] for row in rows] == ["dense", "sparsek"]
    assert all(row["error"] == "" and float(row["tokens_per_second"]) > 0 for row in rows), printed
    assert all(abs(float(row["loss"]) - 6.24) < 0.3 for row in rows)
    assert (out / "training.png").stat().st_size > 1000


def test_two_processes_share_sequences_in_the_sparse_arm_and_heads_in_the_dense_one(tmp_path):
    """Each arm in its own layout, compared with the other; the loss of random weights is the same in both."""
    small = "--shape tiny --tokens 96 --topk 8 --window 8 --stride 8 --vocab-size 512 --warmup 1 --steps 1"
    flags = [
        *small.split(),
        "--context-parallel-size",
        "2",
        "--arms",
        "dense",
        "sparsek",
        "--out",
        str(tmp_path),
    ]
    program = str(REPOSITORY / "examples" / "benchmark_training.py")
    printed = finish(start_script("launch/torchrun.sh", program, *flags, NPROC_PER_NODE="2"))
    assert "TP2 of 2:" in printed and "TP1 CP2 of 2:" in printed
    with (tmp_path / "training.csv").open(newline="") as stream:
        dense, sparse = csv.DictReader(stream)
    assert [(row["tp"], row["cp"], row["error"]) for row in (dense, sparse)] == [
        ("2", "1", ""),
        ("1", "2", ""),
    ]
    assert float(sparse["speedup"]) > 0 and abs(float(sparse["loss"]) - float(dense["loss"])) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arms", "window"), "--arms window: flex_attention's backward needs a GPU"),
        (("--arms", "sparse"), "--arms sparse: must be among dense, window, sparsek"),
        (("--vocab-size", "100", "--arms", "dense"), "--vocab-size 100: the data has token id"),
        (("--data-path", "nowhere", "--arms", "dense"), "--data-path nowhere: no dataset of that name"),
        (("--num-layers", "1", "2", "--arms", "dense"), "--num-layers: 2 numbers for 1 shapes"),
        (("--steps", "0", "--arms", "dense"), "--steps 0: must be at least 1"),
        (("--vocab-size", "513", "--tensor-model-parallel-size", "2"), "--vocab-size 513: not divisible by"),
        (
            ("--arms", "dense", "--context-parallel-size", "0"),
            "--context-parallel-size 0: must be at least 1",
        ),
    ],
)
def test_mistakes_are_named(arguments, message, refused):
    import benchmark_training

    def program():
        benchmark_training.Benchmark(
            benchmark_training.build_parser().parse_args(["--tokens", "64", *arguments])
        )

    assert message in refused(program)
