# SPDX-License-Identifier: Apache-2.0
"""A profiled step of the training benchmark: which kernel is whose part, and the bound that the parts' times give."""

import pytest
from small_benchmark import event
from training_benchmark.parts import part_of_kernel
from training_benchmark.row import Row, compare_with_dense, line
from training_benchmark.table import read_csv, write_csv
from training_benchmark.trace import split_trace

from sparsek_megatron.async_tensor_parallel import AsyncColumn, AsyncRow
from sparsek_megatron.context_parallel.exchange import StartFromEarlierChunks
from sparsek_megatron.context_parallel.ulysses import _AllToAll
from sparsek_megatron.linear_score import _LinearScore
from sparsek_megatron.memory.linear_cross_entropy import _LinearCrossEntropy
from sparsek_megatron.position_scores import _PositionScores

NODE = "autograd::engine::evaluate_function: "


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
