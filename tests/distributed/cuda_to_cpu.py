# SPDX-License-Identifier: Apache-2.0
"""Lets megatron-core's DDP, distributed optimizer and pipeline schedules run on CPU. For tests only.

Those files ask for device "cuda" by name, check `tensor.type()` against torch.cuda types and synchronise streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") or (isinstance(device, int) and not isinstance(device, bool))


class _Stream:
    """A stream on which everything has already happened."""

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


class _CudaIsCpu(TorchFunctionMode):
    """Device "cuda" becomes CPU, and CPU tensors say that their type is a torch.cuda one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and kwargs["device"] is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str) and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_to_cpu() -> Iterator[None]:
    """Within it, megatron-core's CUDA-only code runs on CPU tensors."""
    kept = {name: getattr(torch.cuda, name) for name in ("synchronize", "current_stream")}
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: _Stream()
    try:
        with _CudaIsCpu():
            yield
    finally:
        for name, function in kept.items():
            setattr(torch.cuda, name, function)
