#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Layers under tensor and context parallelism: tokens/s, exposed communication, memory, bytes by collective.

    torchrun --nproc-per-node 4 examples/benchmark_scaling.py --tokens 32768 131072 --meshes 1x1 2x1 4x1 1x2 1x4 2x2
    python examples/benchmark_scaling.py --plot examples/results/scaling.csv

A mesh is TPxCP; ranks that it leaves over repeat the same work on their own, so that 1x1 is one GPU alone. One step is
forward and backward of `--layers` layers on one sequence; there is no optimizer and no data-parallel reduction. Dense
is megatron-core's layer with cuDNN's attention, tensor parallel only. Rows go to results.csv as they are measured, and
scaling.png is drawn from all of that file. A case that does not fit into the memory of a single process is a row that
says so; among several processes it ends the launch, since the others wait for the one that ran out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from scaling_benchmark.flags import Case, build_parser, cases  # noqa: E402
from scaling_benchmark.layers import build  # noqa: E402
from scaling_benchmark.rows import COLUMNS, append_row, described, plot, read_rows  # noqa: E402
from training_benchmark.trace import covered  # noqa: E402

from sparsek_megatron.context_parallel.traffic import CollectiveTraffic  # noqa: E402
from sparsek_megatron.errors import EXIT_USAGE, UserError, describe_memory_error, report_user_errors  # noqa: E402
from sparsek_megatron.files import require_writable_folder  # noqa: E402
from sparsek_megatron.training.launcher import order_launches, world_size_of_environment  # noqa: E402


def start() -> torch.device:
    """The process group of the launch, NCCL on GPUs and gloo on CPU."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")  # without device_id, as the trainer: a group connects when it is used
        return device
    from sparsek_megatron.cpu import enable_cpu

    enable_cpu()
    dist.init_process_group("gloo")
    return torch.device("cpu")


def elapsed(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a step on this rank."""
    if device.type == "cpu":
        import time

        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)
    times = []
    for _ in range(repeats):
        dist.barrier(device_ids=[device.index])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def communication(step: Callable[[], None], device: torch.device) -> tuple[float | None, float | None]:
    """Milliseconds of one profiled step: (an NCCL kernel runs and no other, the collectives themselves).

    None on CPU, and for the second where the profiler did not see the same collectives on all ranks.

    A collective's kernel waits for the last rank to come. The shortest of all ranks' is the last one's, which waits
    for nobody: the sum of these is what the collectives take themselves.
    """
    if device.type == "cpu":
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    exposed = covered(spans[True] + spans[False]) - covered(spans[False])
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [end - start for start, end in sorted(spans[True])])
    if len({len(lengths) for lengths in every}) > 1:
        return exposed / 1e3, None
    return exposed / 1e3, sum(min(lengths) for lengths in zip(*every, strict=True)) / 1e3


def measure(args: argparse.Namespace, case: Case, device: torch.device) -> dict[str, Any]:
    """One row: the slowest rank's times and the largest memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    block = build(args, case, device)
    local = case.tokens // (case.tp * case.cp)
    x = torch.randn(
        local, 1, args.hidden_size, device=device, dtype=block.config.params_dtype
    ).requires_grad_()
    gradient = torch.randn_like(x)
    rotary = RotaryEmbedding(args.head_dim, rotary_percent=1.0, use_cpu_initialization=device.type == "cpu")(
        case.tokens
    )
    rotary = rotary.to(device)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary).backward(gradient)

    def score() -> None:
        attention: Any = block.layers[0].self_attention
        attention.scores(x).sum().backward()

    for _ in range(args.warmup):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    milliseconds = elapsed(step, device, args.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    scoring = 0.0
    if case.side == "sparsek":
        score()
        scoring = elapsed(score, device, args.steps) * args.layers
    exposed, transfer = (None, None) if args.no_profile else communication(step, device)
    with CollectiveTraffic() as traffic:
        step()
    largest = torch.tensor([milliseconds, scoring, exposed or 0.0, peak], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    milliseconds, scoring, slowest, peak = largest.tolist()
    rate = case.tokens / milliseconds * 1e3
    by_collective = " ".join(f"{op}/{group}={size}" for (op, group), size in sorted(traffic.received.items()))
    return {
        **described(args, case),
        "step_ms": round(milliseconds, 2),
        "tokens_per_s": round(rate),
        "tokens_per_s_per_gpu": round(rate / (case.tp * case.cp)),
        "exposed_communication_ms": "not measured" if exposed is None else round(slowest, 2),
        "transfer_ms": "not measured" if transfer is None else round(transfer, 2),
        "scoring_ms": round(scoring, 3),
        "peak_gib": round(peak, 2),
        "received_mib": round(traffic.total / 2**20, 2),
        "by_collective": by_collective,
    }


def out_of_memory(case: Case, results: Path) -> NoReturn:
    """End the launch: the other ranks wait for this one in their next collective.

    At once, since leaving in order would wait for collectives that this rank has begun and others never join.
    """
    print(
        f"error: {case}: out of memory on rank {dist.get_rank()}; leave this case out, or use --recompute, "
        f"--mlp-tile-tokens or a larger mesh (rows before it are in {results})",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_USAGE)


def check_machine(args: argparse.Namespace, processes: int) -> None:
    """Raises UserError for fewer GPUs than processes here, and a folder or results.csv that takes no rows."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        raise UserError(f"{local} processes here need as many GPUs; there are {torch.cuda.device_count()}")
    if os.environ.get("RANK", "0") == "0":
        require_writable_folder(args.out, "--out")
        if (args.out / "results.csv").exists():
            read_rows(args.out / "results.csv", "--out")


def run(args: argparse.Namespace, todo: list[Case], device: torch.device) -> None:
    """Measure all cases; rank 0 writes and prints each row as it comes."""
    results = args.out / "results.csv"
    first = dist.get_rank() == 0
    for (tp, cp), of_mesh in itertools.groupby(todo, lambda case: (case.tp, case.cp)):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
        if first and cp > 1 and "dense" in args.sides:
            print(f"dense: no context parallelism, left out at {tp}x{cp}", flush=True)
        for case in of_mesh:
            try:
                row = measure(args, case, device)
            except torch.OutOfMemoryError as error:
                said = describe_memory_error(error)
                print(f"{case}: rank {dist.get_rank()}: {said}", file=sys.stderr, flush=True)
                if dist.get_world_size() > 1:
                    out_of_memory(case, results)
                row = dict.fromkeys(COLUMNS, "") | described(args, case) | {"step_ms": "out of memory"}
            if first:
                print(" ".join(f"{name}={row[name]}" for name in COLUMNS), flush=True)
                append_row(row, results)
        parallel_state.destroy_model_parallel()
    if first:
        plot(read_rows(results, "--out"), args.out / "scaling.png")


def main() -> None:
    args = build_parser(__doc__).parse_args()
    if args.plot is not None:
        plot(read_rows(args.plot, "--plot"), args.plot.with_suffix(".png"))
        return
    processes = world_size_of_environment()
    order_launches(processes)
    todo = cases(args, world_size=processes, on_gpu=torch.cuda.is_available())
    check_machine(args, processes)
    run(args, todo, start())
    dist.destroy_process_group()


if __name__ == "__main__":
    with report_user_errors():
        main()
