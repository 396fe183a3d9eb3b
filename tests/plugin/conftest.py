# SPDX-License-Identifier: Apache-2.0
"""Plug-in tests build Megatron models on CPU, in this process, with a process group of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package")
def _process_group() -> Iterator[None]:
    from mcore_harness import start_process_group

    threads = torch.get_num_threads()
    started = not torch.distributed.is_initialized()
    start_process_group()
    yield
    torch.set_num_threads(threads)
    if started:
        torch.distributed.destroy_process_group()


@pytest.fixture
def megatron(request: pytest.FixtureRequest) -> Iterator[None]:
    """Megatron's parallel state for one rank, seeded. CPU only: hide the GPUs where there are any."""
    if torch.cuda.is_available():
        pytest.skip("CPU test: run with CUDA_VISIBLE_DEVICES= (empty)")
    request.getfixturevalue("_process_group")
    from mcore_harness import parallel

    with parallel():
        yield
