# SPDX-License-Identifier: Apache-2.0
"""Times and memory of calls on one GPU, for the scripts of this folder."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20
"""Written between timed calls, so that none finds its inputs in the L2 cache."""


def parse_with_cuda(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; ends the program where there is no GPU to measure."""
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return args


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A replay of `call` as a CUDA graph: its time on the device alone, without the host's launches.

    Warm-up and capture share one stream: autograd runs a backward on the stream of its forward, and libraries create
    their handles and plans per stream and thread.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def median_ms(
    call: Callable[[], object], *, budget_ms: float = 100, least: int = 3, flush: bool = True
) -> float:
    """Median milliseconds of one call between two events, over `least` to 100 calls that fit the budget."""
    buffer = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.int8, device="cuda")

    def timed(repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            buffer.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    call()
    estimate = min(timed(2))
    return statistics.median(timed(int(min(100, max(least, budget_ms / max(estimate, 1e-3))))))


def host_ms(call: Callable[[], object], calls: int = 50) -> float:
    """Milliseconds the host needs to launch one call (mean; nothing waits for the device)."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e3


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of memory allocated by one call, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
