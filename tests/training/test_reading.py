# SPDX-License-Identifier: Apache-2.0
"""A reading keeps what a tensor held, and on a GPU waits for nothing that was queued after it."""

import time

import pytest
import torch

from sparsek_megatron.training.reading import Reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_later_changes_do_not_reach_it(dtype):
    number = torch.tensor(3, dtype=dtype)
    reading = Reading(number)
    number += 1
    assert reading.item() == 3 and type(reading.item()) is type(number.item())


@pytest.mark.gpu
def test_it_does_not_wait_for_later_work():
    number = torch.tensor([3.0], device="cuda")
    cycles = 10**9  # half a second at 2 GHz
    Reading(number).item()  # the first pinned block, the first event
    number += 0  # a kernel's first launch loads it, for which the host may wait
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    reading = Reading(number)
    torch.cuda._sleep(cycles)
    number += 1
    began = time.perf_counter()
    assert reading.item() == 3.0
    read = time.perf_counter() - began
    torch.cuda.synchronize()
    slept = time.perf_counter() - began
    assert slept > 0.1, "nothing was under way to be waited for"
    assert read < slept / 4
    assert number.item() == 4.0
