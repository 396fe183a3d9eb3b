# SPDX-License-Identifier: Apache-2.0
"""Copies of tensors in host memory, taken while training goes on.

On a GPU the copies run on a stream of their own into pinned buffers that every checkpoint reuses: the next step's
forward and backward overlap with them, and only its optimizer step waits (`before_update`). On CPU they are plain
copies, made at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch

from sparsek_megatron.memory.pinned import pinned_empty


class Snapshotter:
    """Takes snapshots of nested dictionaries, lists and tuples of tensors; holds the buffers of the last ones.

    A new snapshot overwrites the buffers of the previous one of the same name, which must have been written by then.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []
        self._copied: Any = None

    def take(self, name: str, state: Any) -> Any:
        """`state` with every tensor replaced by its copy in host memory, and every enumeration by its value.

        Python before 3.11.4 pickles an enumeration's member as a call of `getattr`, which `safe_load` refuses to make.
        A tensor that occurs twice is copied once. On a GPU the copies are complete after `wait`.
        """
        copies: dict[Any, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if tensor.numel() == 0 or key not in copies:
                copies[key] = self._copy((name, len(copies)), tensor.detach())
            return copies[key]

        if self._stream is None:
            return _map_tensors(state, copy)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            snapshot = _map_tensors(state, copy)
        self._copied = self._stream.record_event()
        return snapshot

    def _copy(self, key: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            on_gpu = self._stream is not None
            buffer = (pinned_empty if on_gpu else torch.empty)(tensor.shape, dtype=tensor.dtype)
            self._buffers[key] = buffer
        if tensor.is_cuda:
            self._sources.append(tensor)  # its memory must not be reused before it has been copied
        return buffer.copy_(tensor, non_blocking=True)

    def before_update(self) -> None:
        """Let the GPU finish copying before the weights change. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Block the calling thread until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
            self._sources.clear()


def _map_tensors(state: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, Mapping):
        kind = OrderedDict if isinstance(state, OrderedDict) else dict
        return kind((key, _map_tensors(value, function)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_map_tensors(value, function) for value in state)
    return state.value if isinstance(state, Enum) else state
