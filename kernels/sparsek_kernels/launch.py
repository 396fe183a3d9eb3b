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


Named = Mapping[str, Any]
"""Tensors of a call by name; None where a kernel takes none."""


class Pass:
    """Kernels one after another; their launches are made once for each layout of the buffers.

    A layout is the dtype, strides and alignment of every buffer. Their shapes and device, and every number that `make`
    gives a kernel, must follow from it and from what the pass itself is remembered by.

    make  (what the numbers are from, buffers) -> launches
    """

    LAYOUTS = 64
    """Layouts that a pass knows; it starts over when they are more."""

    def __init__(self, make: Callable[[Any, Named], list[Launch]]) -> None:
        self._make = make
        self._made: dict[tuple, list[Launch]] = {}

    def __call__(self, sizes: Any, buffers: Named) -> None:
        layout = tuple(
            [None if x is None else (x.dtype, x.stride(), x.data_ptr() % 16) for x in buffers.values()]
        )
        launches = self._made.get(layout)
        if launches is None:
            if len(self._made) >= self.LAYOUTS:
                self._made.clear()
            launches = self._made[layout] = self._make(sizes, buffers)
        arguments: Mapping[str, torch.Tensor | int | None] = buffers
        if launches[-1].compiled is not None:
            arguments = {name: None if x is None else x.data_ptr() for name, x in buffers.items()}
        for launch in launches:
            launch(arguments)


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
    if torch.compiler.is_compiling():  # it knows Triton's own launches, and no addresses
        kernel[grid](*tensors, *numbers, **constants)
        return
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
