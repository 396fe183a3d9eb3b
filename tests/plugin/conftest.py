# SPDX-License-Identifier: Apache-2.0
"""Plug-in tests build Megatron models in this process, with a process group of one: on CPU, `gpu` tests on a GPU."""

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


@pytest.fixture(scope="module")
def megatron_on_cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's parallel state for one GPU, seeded, on top of a process group that there may be."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.cuda.set_device(0)
    started = not torch.distributed.is_initialized()
    if started:
        meeting = tmp_path_factory.mktemp("group") / "ranks"
        torch.distributed.init_process_group("nccl", init_method=f"file://{meeting}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    if started:
        torch.distributed.destroy_process_group()
