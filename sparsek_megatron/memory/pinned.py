# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory of the size asked for."""

import contextlib
import functools
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 21  # bytes, a huge page; below, torch's own allocator serves


class _Pages(mmap.mmap):
    """Memory that CUDA forgets before it is unmapped."""

    unregister: Callable[[], Any] | None = None

    def __del__(self) -> None:
        if self.unregister is not None:
            self.unregister()


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in pinned host memory, which is given back with the last tensor that lies in it.

    torch's `pin_memory=True` takes the next power of two and keeps it: 16 GiB where 12 are asked for, in 7.0 s. These
    take 12, in 2 (`examples/benchmark_trainer.md`). A forked process does not have them.

    Raises:
        RuntimeError: the host has too little memory, or CUDA cannot pin it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    try:
        pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # else this process's next write could move to a page that is not pinned
    except OSError as err:
        raise RuntimeError(f"{size / 2**30:.1f} GiB of host memory could not be had: {err.strerror}") from None
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
    runtime: Any = torch.cuda.cudart()
    address = tensor.data_ptr()
    try:
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, size, 0)))
    except RuntimeError as err:
        raise RuntimeError(f"{size / 2**30:.1f} GiB of host memory could not be pinned: {err}") from None
    pages.unregister = functools.partial(runtime.cudaHostUnregister, address)
    return tensor
