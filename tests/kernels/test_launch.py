# SPDX-License-Identifier: Apache-2.0
"""Remembered launches: the compiled kernel gets what the JIT got, and only calls that it was compiled for."""

from functools import partial

import pytest
import torch
from sparsek_kernels import launch as module
from sparsek_kernels.launch import Launch, Pass, launch


class Kernel:
    """A stand-in for a Triton kernel: records what reaches the JIT and what reaches a kernel that it compiled."""

    arg_names = ("X", "Y", "n", "SIZE", "FLAG")

    def __init__(self):
        self.jit, self.direct = [], []
        self.fn = self

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.jit.append((grid, arguments, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.direct.append((grid, arguments))


@pytest.fixture(autouse=True)
def forget():
    module._remembered.clear()
    yield
    module._remembered.clear()


CONSTANTS = {"FLAG": True, "SIZE": 8, "num_warps": 4}


def test_a_launch_compiles_once_and_passes_constants_in_the_kernels_order():
    kernel = Kernel()
    made = Launch(kernel, (3, 2), ("x", "y", 5), CONSTANTS)
    x, y = torch.zeros(4), torch.zeros(4)
    made({"x": x, "y": y, "unused": None})
    assert kernel.jit == [((3, 2), (x, y, 5), CONSTANTS)]
    made({"x": 4096, "y": None})
    assert len(kernel.jit) == 1
    assert kernel.direct == [((3, 2, 1), (4096, None, 5, 8, True))]


def test_launch_goes_back_to_the_jit_for_everything_a_specialisation_depends_on():
    kernel, x = Kernel(), torch.zeros(64)
    launch(kernel, (1,), (x, None), (16,), CONSTANTS)
    launch(kernel, (1,), (x + 1, None), (16,), CONSTANTS)
    assert (len(kernel.jit), len(kernel.direct)) == (1, 1)
    assert kernel.direct[0][0] == (1, 1, 1) and kernel.direct[0][1][2:] == (16, 8, True)
    others = (
        ((2,), (x, None), (16,), CONSTANTS),
        ((1,), (x[1:], None), (16,), CONSTANTS),  # not aligned to 16 bytes
        ((1,), (x.double(), None), (16,), CONSTANTS),
        ((1,), (x, x), (16,), CONSTANTS),
        ((1,), (x, None), (17,), CONSTANTS),
        ((1,), (x, None), (16,), {**CONSTANTS, "SIZE": 16}),
        ((1,), (x, None), (16,), {**CONSTANTS, "num_warps": 8}),
    )
    for count, call in enumerate(others, start=2):
        launch(kernel, *call)
        assert len(kernel.jit) == count
    assert len(kernel.direct) == 1


def test_launch_starts_over_when_it_remembers_too_much(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    kernel, x = Kernel(), torch.zeros(64)
    for n in (1, 2, 3, 3):
        launch(kernel, (1,), (x, None), (n,), CONSTANTS)
    assert (len(kernel.jit), len(kernel.direct)) == (3, 1)
    assert len(module._remembered) == 1


def test_an_interpreted_kernel_is_launched_every_time():
    kernel = Kernel()
    kernel.__class__ = type("Interpreted", (Kernel,), {"__getitem__": lambda self, grid: self.jit_only})
    kernel.jit_only = lambda *arguments, **constants: kernel.jit.append(arguments)
    made = Launch(kernel, (1,), (1, 2, 3), CONSTANTS)
    for _ in range(2):
        made({})
        launch(kernel, (1,), (None, None), (3,), CONSTANTS)
    assert len(kernel.jit) == 4


def test_a_pass_makes_its_launches_once_for_each_layout_and_then_passes_addresses():
    made = []
    kernels = [Kernel(), Kernel()]

    def make(number, buffers):
        made.append(buffers["x"])
        return [Launch(kernel, (1,), ("x", "table", number), CONSTANTS) for kernel in kernels]

    run = partial(Pass(make), 5)
    x = torch.zeros(64)
    run({"x": x, "table": None})
    run({"x": torch.ones(64), "table": None})
    y = torch.zeros(64)
    run({"x": y, "table": None})
    assert len(made) == 1 and all(len(kernel.jit) == 1 for kernel in kernels)
    assert kernels[1].direct[-1] == ((1, 1, 1), (y.data_ptr(), None, 5, 8, True))
    others = (
        {"x": x[1:], "table": None},  # not aligned to 16 bytes
        {"x": x.view(8, 8).t(), "table": None},
        {"x": x.double(), "table": None},
        {"x": x, "table": x},
    )
    for count, buffers in enumerate(others, start=2):
        run(buffers)
        run(buffers)
        assert len(made) == len(kernels[0].jit) == count


def test_a_pass_starts_over_when_it_knows_too_many_layouts(monkeypatch):
    monkeypatch.setattr(Pass, "LAYOUTS", 2)
    kernel, x = Kernel(), torch.zeros(64)
    run = Pass(lambda _, buffers: [Launch(kernel, (1,), ("x", None, 5), CONSTANTS)])
    for step in (1, 2, 3, 3, 1):
        run(None, {"x": x[::step]})
    assert (len(kernel.jit), len(kernel.direct)) == (4, 1)
    assert len(run._made) == 2


def test_a_compiler_gets_the_kernels_own_launch(monkeypatch):
    kernel, x = Kernel(), torch.zeros(64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for _ in range(2):
        launch(kernel, (1,), (x, None), (16,), CONSTANTS)
    assert (len(kernel.jit), len(kernel.direct)) == (2, 0)
