# SPDX-License-Identifier: Apache-2.0
"""Layer inputs saved by full recompute, kept in pinned CPU memory until backward needs them, or not kept at all.

With `--recompute-granularity full` Megatron saves one hidden state per layer: s / tp * b * h elements, 4 GiB
at 1M tokens and h = 2,048 in bf16. Here the first `num_layers` of them leave the GPU in forward and come
back in backward, each one layer ahead, on a stream of their own. (Megatron's `--cpu-offloading` refuses
recompute and needs Transformer Engine, its fine-grained offloading saves inputs of modules that full
recompute does not save.)

The first layers and not the last: backward starts with the last, whose inputs would have to return at once.

Where CPU memory is short too, every second of the first inputs is computed again from the one before it.

Memory on the GPU is bounded: a layer's input leaves once the copy of the one before it is done, so at most
two are under way. The next one comes back when a layer's backward is through its MLP, which holds most memory.
The host waits for nothing; streams wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsek_megatron.memory.pinned import pinned_empty
from sparsek_megatron.recompute import check_recomputed_inputs


@dataclass(eq=False)
class _Saved:
    """One offloaded hidden state, and `device` holding it again once its way back has begun."""

    host: Tensor | None
    free: list[Tensor] = field(repr=False)  # where `host` goes once nobody needs it
    before: _Saved | None  # the one saved before it, which backward needs next
    device: Tensor | None = None
    done: Any = None

    def release(self) -> None:
        """Give `host` back; the next copy into it runs after those under way, on the same stream."""
        if self.host is not None:
            self.free.append(self.host)
            self.host = None

    def __del__(self) -> None:  # of a forward without backward
        self.release()


@dataclass(eq=False)
class _Dropped:
    """A hidden state that is not kept: `layer` computes it from the one before."""

    layer: Callable[[Tensor], Tensor]
    before: _Saved


class CheckpointOffload:
    """Hooks that take one model's saved layer inputs to the CPU; a context for each forward pass.

    num_layers: inputs that leave the GPU. dropped: of these, how many are computed again, the second, fourth, ...
    """

    def __init__(self, num_layers: int, *, dropped: int = 0) -> None:
        self.num_layers, self.dropped = num_layers, dropped
        self.stream: torch.cuda.Stream | None = None
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self.in_forward = False
        self.inputs = 0  # in this forward pass
        self.are_inputs = True  # each saved right after its own layer's call
        self.calls: list[Callable[[Tensor], Tensor]] = []  # of checkpointed layers in this forward pass
        self.last: _Saved | None = None
        self.next: _Saved | None = None  # that backward will ask for
        self.leaving: deque[tuple[Tensor, Any]] = deque()

    def watch(self, layer: torch.nn.Module) -> None:
        """Have backward through this layer fetch the next input, once it is through the layer's MLP."""
        if self.dropped:
            layer.register_forward_pre_hook(self._note_call, with_kwargs=True)
        getattr(layer, "self_attention", layer).register_forward_hook(self._fetch_in_backward)

    def forward(self, run: Callable[[], Any], like: Tensor) -> Any:
        """`run()` with the hooks on: what it saves in the shape and dtype of `like` are its layers' inputs."""
        shape, dtype = like.shape, like.dtype
        self.inputs, self.are_inputs, self.in_forward = 0, True, True
        if self.next is not None and self.next.device is not None:  # of a backward that did not end
            self._returned(self.next)
        self.next = None

        def pack(tensor: Tensor) -> Tensor | _Saved | _Dropped:
            if tensor.shape == shape and tensor.dtype == dtype and self.inputs < self.num_layers:
                return self.take(tensor.detach())
            return tensor if tensor.is_leaf else tensor.detach()  # an operation that saved its result would hold itself

        def unpack(saved: Tensor | _Saved | _Dropped) -> Tensor:
            return saved if isinstance(saved, Tensor) else self.bring_back(saved)

        try:
            with saved_tensors_hooks(pack, unpack):
                out = run()
        finally:
            self.in_forward, self.last = False, None
            self.calls.clear()
        while self.leaving:
            self._wait_for_oldest()
        return out

    def take(self, tensor: Tensor) -> _Saved | _Dropped:
        """Start the copy to the CPU; keeps the tensor alive until the copy is done."""
        index = self.inputs
        self.inputs += 1
        self.are_inputs = self.are_inputs and len(self.calls) == index + 1
        if self.are_inputs and self.last is not None and index % 2 and index < 2 * self.dropped:
            return _Dropped(self.calls[index - 1], self.last)
        tensor = tensor.contiguous()
        host, free = self._host_buffer(tensor)
        self.last = saved = _Saved(host, free, self.last)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return saved
        stream = self._copy_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        self.leaving.append((tensor, stream.record_event()))
        if len(self.leaving) > 1:
            self._wait_for_oldest()
        return saved

    def bring_back(self, saved: _Saved | _Dropped) -> Tensor:
        """The tensor on its device again."""
        if isinstance(saved, _Dropped):
            self.next = saved.before  # its own layer's backward fetches it a second time: it would take room till then
            with torch.no_grad():
                return saved.layer(self._returned(saved.before))
        self.next = saved.before
        device = self._returned(saved)
        saved.release()
        return device

    def _note_call(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Remember how this pass calls a layer whose activations are not kept."""
        if not self.in_forward or torch.is_grad_enabled():
            return
        others, named = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
        states = random._get_all_rng_states()

        def again(hidden_states: Tensor) -> Tensor:
            with random._fork_rng():
                random._set_all_rng_states(*states)
                return _first(layer(hidden_states, *others, **named))

        self.calls.append(again)

    def _fetch_in_backward(self, _module: Any, _inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and _first(output).requires_grad:
            _first(output).register_hook(lambda _: self._start_return(self.next))

    def _returned(self, saved: _Saved) -> Tensor:
        self._start_return(saved)
        device, saved.device = saved.device, None
        assert device is not None
        if saved.done is not None:
            torch.cuda.current_stream().wait_event(saved.done)
        return device

    def _start_return(self, saved: _Saved | None) -> None:
        if saved is None or saved.device is not None:
            return
        stream, host = self.stream, saved.host
        assert host is not None
        device = torch.empty_like(host, device="cuda" if stream else "cpu")
        saved.device = device
        if stream is None:
            device.copy_(host)
            return
        stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            device.copy_(host, non_blocking=True)
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

    def _host_buffer(self, tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pinned memory, and the list it came from and goes back to: pinning it takes longer than the copy."""
        free = self.free.setdefault((tensor.shape, tensor.dtype), [])
        if free:
            return free.pop(), free
        if not tensor.is_cuda:
            return torch.empty(tensor.shape, dtype=tensor.dtype), free
        try:
            return pinned_empty(tensor.shape, dtype=tensor.dtype), free
        except RuntimeError as err:
            raise RuntimeError(
                f"--cpu-offloading-num-layers {self.num_layers}: at the input of layer {self.inputs} of these {err}; "
                f"lower it, or raise --recompute-inputs {self.dropped}"
            ) from None


def _first(output: Any) -> Tensor:
    """A module's tensor, of those that return more."""
    return output if isinstance(output, Tensor) else output[0]


def use_checkpoint_offload(model: Any, *, num_layers: int, recompute_inputs: int = 0) -> Any:
    """Keep the recompute checkpoints of a model's first `num_layers` layers in pinned CPU memory; returns
    the model.

    model: a megatron-core model with a `decoder` and `recompute_granularity="full"`, before it is wrapped.
    Results do not change by a bit. CPU memory: s / tp * b * h elements per layer and micro batch under way, but
    for `recompute_inputs` of these layers (the second, the fourth, ...): their inputs are not kept, and computed
    again from the layer before, one more forward of that layer each.
    On CPU tensors the copies are plain ones.

    Raises NotImplementedError without full recompute, and for recomputed inputs where layers compute in fp8 or fp4
    or share a checkpoint; ValueError where there are not that many layers.
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
    check_recomputed_inputs(config, count=recompute_inputs, num_layers=num_layers)
    if recompute_inputs and (config.fp8 or getattr(config, "fp4", None)):
        raise NotImplementedError(
            f"--recompute-inputs {recompute_inputs}: does not know the scales of fp8 and fp4; leave it out"
        )
    if num_layers:
        offload, run = CheckpointOffload(num_layers, dropped=recompute_inputs), model.decoder.forward
        for layer in model.decoder.layers:
            offload.watch(layer)

        def forward(hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            # A later pipeline stage gets its input through `set_input_tensor`.
            like = model.decoder.input_tensor if hidden_states is None else hidden_states
            if not torch.is_grad_enabled():
                return run(hidden_states, *args, **kwargs)
            return offload.forward(lambda: run(hidden_states, *args, **kwargs), like)

        model.decoder.forward = forward
    return model
