# SPDX-License-Identifier: Apache-2.0
"""`benchmark_training.py --cuda-graph`: the same bits as kernel by kernel, rows without parts, and what is refused."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from programs import REPOSITORY, finish, start_program
from small_benchmark import event
from training_benchmark import graph
from training_benchmark.cases import check, options
from training_benchmark.flags import build_parser
from training_benchmark.plot import plot
from training_benchmark.row import Row, compare_with_dense, line
from training_benchmark.table import read_csv, write_csv
from training_benchmark.trace import split_trace

from sparsek_megatron.errors import UserError


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["fused", "saving"])
def test_a_captured_step_has_the_bits_of_an_eager_one(way):
    """Losses of steps on other tokens than the captured ones, then of another length; gradients and weights at the end.

    No kernel here adds with atomics, and both run on one stream with the same cuBLAS workspace.
    """
    program = str(Path(__file__).with_name("training_graph_program.py"))
    printed = finish(start_program(program, str(REPOSITORY / "examples"), way, gpu=True))
    found = json.loads(printed.strip().splitlines()[-1])
    assert found["again"] == found["eager"], "the eager steps themselves do not repeat"
    assert len(set(found["eager"])) == len(found["eager"]), "no two steps are alike"
    assert found["captured"] == found["eager"]


def test_a_replay_reads_the_new_batch_and_release_goes_back_to_eager(monkeypatch):
    """A graph that records nothing and replays by what `captured` left: the buffers that were there at the capture."""
    replayed = []

    class Graph:
        def register_generator_state(self, state):
            raise AssertionError("no random state was tracked")

        def replay(self):
            replayed.append([x.tolist() for x in static])

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", iter([10, 35]).__next__)
    monkeypatch.setattr(graph, "get_all_rng_states", dict)
    static = []

    def run(tokens, labels):
        static[:] = tokens, labels
        return tokens.sum()

    replay = graph.Replay(run)
    assert replay(torch.tensor([1, 2]), torch.tensor([3, 4])) == 3
    given = torch.tensor([5, 6]), torch.tensor([7, 8])
    replay.capture(*given)
    assert replay.pool_bytes == 25
    assert static[0] is not given[0] and static[1] is not given[1]
    loss = replay(torch.tensor([50, 60]), torch.tensor([70, 80]))
    assert replayed == [[[50, 60], [70, 80]]]
    replay.loss.add_(1)  # the next replay writes there
    assert loss == replay.loss - 1
    replay.release()
    assert replay.pool_bytes == 0 and replay(torch.tensor([9]), torch.tensor([9])) == 9 and len(replayed) == 1


def arguments(*more):
    return build_parser("").parse_args(["--shape", "tiny", "--tokens", "64", "--arms", "sparsek", *more])


@pytest.mark.parametrize(
    ("flags", "on_gpu", "message"),
    [
        ("--cuda-graph", True, "--cuda-graph: --trainers deepspeed decides in hooks on the host"),
        ("--cuda-graph --trainers mcore deepspeed", True, "--cuda-graph: --trainers deepspeed decides"),
        ("--cuda-graph --trainers mcore", False, "--cuda-graph: needs a GPU; leave it out"),
    ],
)
def test_what_cannot_be_captured_is_refused(flags, on_gpu, message):
    with pytest.raises(UserError) as refusal:
        check(arguments(*flags.split()), 1, on_gpu=on_gpu)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_the_flag_is_a_word_of_the_options_column():
    flags = ("--trainers", "mcore", "--apply-rope-fusion")
    check(arguments(*flags, "--cuda-graph"), 1, on_gpu=True)
    assert str(options(arguments(*flags, "--cuda-graph"))) == "fused RoPE, CUDA graph"
    assert str(options(arguments(*flags))) == "fused RoPE"


TRACE = [
    event("step", "user_annotation", 0, 100),
    event("phase:graph", "user_annotation", 5, 20),
    event("cudaGraphLaunch", "cuda_runtime", 10, 5, correlation=1),
    event("part:optimizer", "user_annotation", 30, 10),
    event("cudaLaunchKernel", "cuda_runtime", 32, 1, correlation=2),
    event("walk", "kernel", 60, 3000, correlation=1),
    event("gemm", "kernel", 3060, 1000, correlation=1),
    event("adam", "kernel", 5060, 1000, correlation=2),
]


def captured_row(arm="sparsek", **columns):
    row = Row(
        "8b", 4, 1024, arm, "mcore", 1, 1, 1, "CUDA graph", step_ms=5.0, tokens_per_second=200.0, **columns
    )
    row.model_tflops = row.loss = 0.0
    row.split = split_trace(TRACE, by_part=False)
    return row


def test_a_replayed_step_has_its_kernels_and_gaps_but_no_parts(tmp_path):
    dense, row = captured_row("dense"), captured_row()
    compare_with_dense(row, [dense, row])
    assert (row.speedup, row.share_of_bound, row.without_attention_ms) == (1.0, None, None)
    assert line(row).splitlines()[1] == (
        "    6.0 ms profiled: kernels 5.0; no kernel running 1.0; 3 kernels, host waits: none, 0 allocations"
    )
    assert row.split.slowest["step"].most_common(1) == [("walk [phase:graph < step]", 3.0)]
    write_csv([row], tmp_path / "training.csv")
    (written,) = read_csv(tmp_path / "training.csv", "--plot")
    assert {name for name, value in written.items() if name.endswith("_ms") and value} == {
        "step_ms", "profiled_step_ms", "busy_ms",
    }  # fmt: skip
    plot(tmp_path / "training.csv", tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 0
