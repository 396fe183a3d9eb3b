# SPDX-License-Identifier: Apache-2.0
"""Repeated launches of a Triton kernel without its analysis of the arguments.

Triton's JIT finds out at every call which specialisation of a kernel fits the arguments (type, divisibility by 16 and
equality to 1 of each), which costs the host more than the launch itself. Where a caller keeps one `Launch` for one set
of integers, dtypes and pointer alignments, the answer cannot change: the first call goes through the JIT, later
ones run the kernel it compiled, by the interface that Triton has for kernels compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Launch:
    """One kernel on one grid. All buffers are aligned to 16 bytes at every call, or at none.

    kernel     a `triton.jit` function
    grid       up to three ints
    arguments  its arguments before the compile-time ones, in order: a string names a buffer of the call (a tensor, an
               address or None), anything else is passed as it is
    constants  compile-time arguments and compiler options by name
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.arguments, self.constants = kernel, grid, arguments, constants
        self.compiled: Any = None
        self.constant_values: list[Any] = []

    def __call__(self, buffers: Mapping[str, torch.Tensor | int | None]) -> None:
        """Launch. Addresses are allowed from the second call on: the first one needs tensors, for their dtypes."""
        arguments = [buffers[x] if type(x) is str else x for x in self.arguments]
        if self.compiled is not None:
            self.compiled(*arguments, *self.constant_values)
            return
        compiled = self.kernel[self.grid](*arguments, **self.constants)
        if compiled is not None:  # Triton's interpreter compiles nothing
            names = self.kernel.arg_names[len(arguments) :]
            self.constant_values = [self.constants[name] for name in names]
            self.compiled = compiled[(*self.grid, 1, 1)[:3]]


class Pass:
    """Kernels over buffers of fixed shapes, one after another; their launches are made once for each layout of these.

    make  the launches for named buffers (tensors, or None where a kernel's argument is): called with the first ones of
          each layout, which is every buffer's dtype, strides and alignment
    """

    def __init__(self, make: Callable[[Mapping[str, torch.Tensor | None]], list[Launch]]) -> None:
        self._make = make
        self._made: dict[tuple, list[Launch]] = {}

    def __call__(self, buffers: Mapping[str, torch.Tensor | None]) -> None:
        layout = tuple(
            [None if x is None else (x.dtype, x.stride(), x.data_ptr() % 16) for x in buffers.values()]
        )
        launches = self._made.get(layout)
        if launches is None:
            launches = self._made[layout] = self._make(buffers)
        arguments: Mapping[str, torch.Tensor | int | None] = buffers
        if launches[-1].compiled is not None:
            arguments = {name: None if x is None else x.data_ptr() for name, x in buffers.items()}
        for launch in launches:
            launch(arguments)


class Parts:
    """Buffers that lie one after the other in one allocation, each at a multiple of `align` bytes."""

    def __init__(self, align: int = 1, **counts: tuple[torch.dtype, int]) -> None:
        self.at: dict[str, tuple[int, torch.dtype, int]] = {}
        self.bytes = 0
        for name, (dtype, count) in counts.items():
            self.at[name] = (self.bytes, dtype, count)
            self.bytes += -(-count * dtype.itemsize // align) * align

    def view(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        first, dtype, count = self.at[name]
        return tensor.view(-1).view(torch.uint8)[first : first + count * dtype.itemsize].view(dtype)

    def add(self, buffers: dict[str, Any], tensor: torch.Tensor, addresses: bool) -> None:
        """The buffers in `tensor`: as views for Triton to compile with; as addresses once it has, which cost the host
        less."""
        if addresses:
            start = tensor.data_ptr()
            for name, (first, _, _) in self.at.items():
                buffers[name] = start + first
        else:
            for name in self.at:
                buffers[name] = self.view(tensor, name)


REMEMBERED = 1024
"""Launches that `launch` knows; it starts over when they are more."""
_remembered: dict[tuple, tuple[Any, list[Any]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)`, at less cost to the host when it repeats."""
    kinds = [None if x is None else (x.dtype, x.data_ptr() % 16, x.get_device()) for x in tensors]
    key = (kernel.fn, grid, numbers, *kinds, *constants.values())
    known = _remembered.get(key)
    if known is not None:
        compiled, values = known
        compiled(*tensors, *numbers, *values)
        return
    compiled = kernel[grid](*tensors, *numbers, **constants)
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_remembered) >= REMEMBERED:
            _remembered.clear()
        values = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        _remembered[key] = compiled[(*grid, 1, 1)[:3]], values
