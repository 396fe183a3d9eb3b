# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory: exactly what is asked for, registered while it is in use and no longer."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsek_megatron.memory.pinned import pinned_empty
from sparsek_megatron.training.snapshot import Snapshotter

ODD = (3 * 2**20 + 5,)


class Runtime:
    """CUDA's runtime as `pinned_empty` uses it: what is registered."""

    def __init__(self, answer=0):
        self.registered, self.answer = {}, answer

    def cudaHostRegister(self, address, size, flags):
        if not self.answer:
            self.registered[address] = size
        return self.answer

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)

    def check(result):
        if result:
            raise RuntimeError(f"CUDA's error {result}")

    monkeypatch.setattr(torch.cuda, "check_error", check)
    return fake


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_the_size_asked_for_is_registered_as_long_as_a_tensor_needs_it(runtime, dtype):
    tensor = pinned_empty((2, *ODD), dtype)
    size = 2 * ODD[0] * dtype.itemsize
    assert tensor.shape == (2, *ODD) and tensor.dtype == dtype and tensor.untyped_storage().nbytes() == size
    assert runtime.registered == {tensor.data_ptr(): size}
    tensor.fill_(3)
    view = tensor.view(-1)[7:]
    del tensor
    assert len(runtime.registered) == 1 and (view == 3).all()
    del view
    assert not runtime.registered


def test_a_refusal_leaves_nothing_registered(runtime):
    runtime.answer = 2
    with pytest.raises(RuntimeError, match=r"0\.0 GiB of host memory could not be pinned: CUDA's error 2"):
        pinned_empty(ODD, torch.float32)
    assert not runtime.registered
    with pytest.raises(RuntimeError, match=r"1048576\.0 GiB of host memory could not be had: .*memory"):
        pinned_empty((1 << 50,), torch.uint8)


def test_a_forked_process_does_not_take_it_along(runtime):
    """Otherwise this process's next write would move a page away from the one that CUDA copies into."""
    tensor = pinned_empty(ODD, torch.uint8)
    lines = smaps(tensor.data_ptr())
    assert "dc" in lines["VmFlags"].split()


def smaps(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that holds `address`."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split()[0]:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            inside = low <= address < high
        elif inside:
            found[name] = value
    return found


@pytest.mark.gpu
def test_a_snapshot_lies_in_as_much_host_memory_as_it_has():
    device = torch.device("cuda")
    state = {"large": torch.randn(ODD, device=device), "half": torch.randn(ODD, device=device).bfloat16(), "step": 3}
    expected = {name: x.cpu() for name, x in state.items() if name != "step"}
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    snapshots = Snapshotter(device)
    taken = snapshots.take("x", state)
    snapshots.before_update()
    for name in expected:
        state[name].add_(1)
    snapshots.wait()
    for name, x in expected.items():
        assert taken[name].is_pinned() and torch.equal(taken[name], x)
        assert taken[name].untyped_storage().nbytes() == x.untyped_storage().nbytes()
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before


@pytest.mark.gpu
def test_cuda_forgets_memory_that_is_given_back(monkeypatch):
    answers = []
    runtime = torch.cuda.cudart()
    register, unregister = runtime.cudaHostRegister, runtime.cudaHostUnregister
    spy = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: answers.append(int(unregister(address)))
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: spy)
    tensor = pinned_empty(ODD, torch.float32)
    assert tensor.is_pinned() and not answers
    del tensor
    assert answers == [0]


@pytest.mark.gpu
def test_copies_in_both_directions_do_not_hold_the_host():
    size = 1 << 30
    host, device = pinned_empty((size,), torch.uint8), torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    back = torch.empty_like(device)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    host.copy_(device, non_blocking=True)
    back.copy_(host, non_blocking=True)
    issued = time.perf_counter() - begun
    torch.cuda.synchronize()
    took = time.perf_counter() - begun
    assert torch.equal(back, device)
    assert issued < took / 4, (issued, took)
