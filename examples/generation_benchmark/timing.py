# SPDX-License-Identifier: Apache-2.0
"""Device time of what is queued, call by call or as a CUDA graph, and of a copy."""

import statistics
from collections.abc import Callable

import torch


def elapsed(run: Callable[[], object]) -> float:
    """Microseconds of device time between the start and the end of what `run` queues."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as a CUDA graph, after two calls that compile what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def copy_bandwidth() -> float:
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    us = statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / us * 1e-6
