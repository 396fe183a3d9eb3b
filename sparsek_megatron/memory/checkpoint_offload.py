# SPDX-License-Identifier: Apache-2.0
"""Layer inputs saved by full recompute, kept in pinned CPU memory until backward needs them.

With `--recompute-granularity full` Megatron saves one hidden state per layer: s / tp * b * h elements, 4 GiB
at 1M tokens and h = 2,048 in bf16. Here the first `num_layers` of them leave the GPU in forward and come
back in backward, each one layer ahead, on a stream of their own. (Megatron's `--cpu-offloading` refuses
recompute and needs Transformer Engine, its fine-grained offloading saves inputs of modules that full
recompute does not save.)

The first layers and not the last: backward starts with the last, whose inputs would have to return at once.

Memory on the GPU is bounded: a layer's input leaves once the copy of the one before it is done, so at most
two are under way in either direction. The host waits for nothing; streams wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsek_megatron.memory.pinned import pinned_empty


@dataclass(eq=False)
class _Saved:
    """One offloaded hidden state, and `device` holding it again once its way back has begun."""

    host: Tensor
    before: _Saved | None  # the one saved before it, which backward needs next
    device: Tensor | None = None
    done: Any = None


class CheckpointOffload:
    """Hooks that take one model's saved layer inputs to the CPU; a context for each forward pass."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.stream: torch.cuda.Stream | None = None
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self.offloaded = 0  # in this forward pass
        self.last: _Saved | None = None
        self.leaving: deque[tuple[Tensor, Any]] = deque()

    def forward(self, run: Callable[[], Any], like: Tensor) -> Any:
        """`run()` with the hooks on: what it saves in the shape and dtype of `like` are its layers' inputs."""
        shape, dtype = like.shape, like.dtype
        self.offloaded, self.last = 0, None

        def pack(tensor: Tensor) -> Tensor | _Saved:
            is_input = tensor.shape == shape and tensor.dtype == dtype
            return self.take(tensor) if is_input and self.offloaded < self.num_layers else tensor

        def unpack(saved: Tensor | _Saved) -> Tensor:
            return saved if isinstance(saved, Tensor) else self.bring_back(saved)

        with saved_tensors_hooks(pack, unpack):
            out = run()
        while self.leaving:
            self._wait_for_oldest()
        return out

    def take(self, tensor: Tensor) -> _Saved:
        """Start the copy to the CPU; keeps the tensor alive until the copy is done."""
        tensor = tensor.detach().contiguous()
        saved = _Saved(self._host_buffer(tensor), self.last)
        self.last = saved
        self.offloaded += 1
        if not tensor.is_cuda:
            saved.host.copy_(tensor)
            return saved
        stream = self._copy_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            saved.host.copy_(tensor, non_blocking=True)
        self.leaving.append((tensor, stream.record_event()))
        if len(self.leaving) > 1:
            self._wait_for_oldest()
        return saved

    def bring_back(self, saved: _Saved) -> Tensor:
        """The tensor on its device again; starts the way back of the one that backward needs next."""
        self._start_return(saved)
        device, done = saved.device, saved.done
        assert device is not None
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        saved.device = None
        self.free[device.shape, device.dtype].append(saved.host)
        if saved.before is not None:
            self._start_return(saved.before)
        return device

    def _start_return(self, saved: _Saved) -> None:
        if saved.device is not None:
            return
        stream = self.stream
        device = torch.empty_like(saved.host, device="cuda" if stream else "cpu")
        saved.device = device
        if stream is None:
            device.copy_(saved.host)
            return
        stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            device.copy_(saved.host, non_blocking=True)
        saved.done = stream.record_event()

    def _wait_for_oldest(self) -> None:
        """Let the computation go on only once the oldest copy is done: its tensor's memory may be used again
        then.
        """
        _, done = self.leaving.popleft()
        torch.cuda.current_stream().wait_event(done)

    def _copy_stream(self) -> torch.cuda.Stream:
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        return self.stream

    def _host_buffer(self, tensor: Tensor) -> Tensor:
        """Pinned memory, used again in each step: pinning it takes longer than the copy."""
        free = self.free.setdefault((tensor.shape, tensor.dtype), [])
        if free:
            return free.pop()
        return (pinned_empty if tensor.is_cuda else torch.empty)(tensor.shape, dtype=tensor.dtype)


def use_checkpoint_offload(model: Any, *, num_layers: int) -> Any:
    """Keep the recompute checkpoints of a model's first `num_layers` layers in pinned CPU memory; returns
    the model.

    model: a megatron-core model with a `decoder` and `recompute_granularity="full"`, before it is wrapped.
    Results do not change by a bit. CPU memory: s / tp * b * h elements per layer and micro batch under way.
    On CPU tensors the copies are plain ones.

    Raises NotImplementedError without full recompute, ValueError where there are not that many layers.
    """
    config = model.config
    if config.recompute_granularity != "full":
        raise NotImplementedError(
            f"--cpu-offloading-num-layers {num_layers}: keeps the checkpoints of full recompute, and "
            f"--recompute-granularity is {config.recompute_granularity}; use --recompute-granularity full"
        )
    here = len(model.decoder.layers)
    if not 0 <= num_layers <= here:
        raise ValueError(
            f"--cpu-offloading-num-layers {num_layers}: must be between 0 and the {here} layers here"
        )
    if num_layers:
        offload, run = CheckpointOffload(num_layers), model.decoder.forward

        def forward(hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            # A later pipeline stage gets its input through `set_input_tensor`.
            like = model.decoder.input_tensor if hidden_states is None else hidden_states
            if not torch.is_grad_enabled():
                return run(hidden_states, *args, **kwargs)
            return offload.forward(lambda: run(hidden_states, *args, **kwargs), like)

        model.decoder.forward = forward
    return model
