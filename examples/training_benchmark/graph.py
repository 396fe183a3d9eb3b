# SPDX-License-Identifier: Apache-2.0
"""Forward, loss, backward and gradient reduction as one CUDA graph: at short contexts the host's launches bound a step.

Captured is what Megatron-LM captures as `full_iteration`, and the zeroing of gradients before it. By `torch.cuda.graph`
itself: megatron-core's `FullCudaGraphWrapper` keeps its graph and input buffers in the class, and has no reset before
0.19; the buffers outlive that one, so that a second context would not fit into them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states, model_parallel_cuda_manual_seed
from torch import Tensor
from torch.profiler import record_function


def prepare_captures(seed: int) -> None:
    """Before a model is built: random states that recompute can switch in a capture, and a stream of this thread's own.

    Gradients are accumulated on the stream that was current when the model was wrapped, and the default stream cannot
    take part in a capture. Warm-up, capture and optimizer run on that same stream.
    """
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=True, force_reset_rng=True)
    torch.cuda.set_stream(torch.cuda.Stream())


class Replay:
    """`run(tokens, labels)`, which returns a loss without a graph of autograd; after `capture`, replays of it.

    pool_bytes  GPU memory that a capture keeps for its replays, seen by no count of allocated memory
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.run = run
        self.release()

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss; of a replay a copy, for the next one writes to the same place."""
        if self.graph is None:
            return self.run(tokens, labels)
        with record_function("phase:graph"):
            for static, given in zip(self.inputs, (tokens, labels), strict=True):
                static.copy_(given)
            self.graph.replay()
        return self.loss.clone()

    def capture(self, tokens: Tensor, labels: Tensor) -> None:
        """Record one call for batches of this shape, which must have run before: kernels are compiled by then."""
        self.inputs = tokens.clone(), labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        states: Any = get_all_rng_states()
        for state in states.values():
            self.graph.register_generator_state(state)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # "thread_local": NCCL's watchdog asks after its events from another thread meanwhile.
        with torch.cuda.graph(
            self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            self.loss = self.run(*self.inputs)
        self.pool_bytes = torch.cuda.memory_reserved() - before

    def release(self) -> None:
        """Forget the capture: batches of another shape need one of their own."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.loss = torch.empty(0)
        self.pool_bytes = 0
