# SPDX-License-Identifier: Apache-2.0
"""Processes, devices and groups: torch.distributed, mcore's parallel state, and DeepSpeed's view of it."""

import contextlib
import datetime
import itertools
import os
import sys
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from sparsek_megatron.context_parallel import check_agreement
from sparsek_megatron.errors import EXIT_USAGE, RankError, UserError, describe_os_error
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.launcher import order_launches, world_size_of_environment

_REPORTED = "user_error_reported"
_starts = itertools.count()


@dataclass(frozen=True)
class Machine:
    """What this process runs on."""

    rank: int
    world_size: int
    device: torch.device
    store: distributed_c10d.Store

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes shared files."""
        return self.rank == 0


def initialize(config: TrainingConfig) -> Machine:
    """Join the process group and build mcore's groups; NCCL on GPUs, gloo on CPU.

    Seeds every RNG: the same default generator on all ranks, mcore's tracker per tensor-parallel rank.

    Raises:
        UserError: the launcher's variables are incomplete, or the ranks have different settings.
    """
    processes = world_size_of_environment()
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    order_launches(
        config.tensor_model_parallel_size * config.context_parallel_size, in_pieces=config.async_tensor_parallel
    )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"process {local} of this node (from 0) has no GPU: there are {count}; start at most as many "
                "(--nproc-per-node, NPROC_PER_NODE)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        from sparsek_megatron.cpu import enable_cpu

        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        enable_cpu()
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    backend = "nccl" if on_gpu else "gloo"
    if processes > 1 or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1  # pyright: ignore[reportPrivateImportUsage]
    # A name of its own each time: a process that starts over must not read what its last groups left in the store.
    groups = distributed_c10d.PrefixStore(f"groups_{next(_starts)}", store)
    try:
        check_agreement(config, groups, rank, world_size)
    except ValueError as err:
        raise UserError(str(err)) from None
    # Without device_id: with it NCCL would at once connect every group that mcore builds, some 0.4 GiB of a GPU each.
    dist.init_process_group(backend, timeout=timeout, store=groups, rank=rank, world_size=world_size)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # set_device above has chosen it
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    # A restarted run may find the store of the processes before it: what they left there must not be read.
    session = [uuid.uuid4().hex]
    dist.broadcast_object_list(session, src=0)
    return Machine(rank, world_size, device, distributed_c10d.PrefixStore(session[0], store))


@contextlib.contextmanager
def end_together(machine: Machine) -> Iterator[None]:
    """Where a rank ends with what the user can fix, let the first one say it and end the others quietly.

    The others may have met the same error, or only the broken connections that it left.

    Raises:
        RankError: on the first rank, whichever error of the user's it met.
    """
    try:
        yield
    except (UserError, OSError) as err:
        message = describe_os_error(err) if isinstance(err, OSError) else str(err)
        if message is None:
            raise
        if machine.store.add(_REPORTED, 1) > 1:
            sys.exit(EXIT_USAGE)
        raise RankError(message) from err
    except RuntimeError:
        if machine.world_size > 1 and machine.store.check([_REPORTED]):
            sys.exit(EXIT_USAGE)
        raise


def shutdown() -> None:
    """Leave the process group."""
    parallel_state.destroy_model_parallel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.destroy_process_group()


class DeepSpeedMpu:
    """DeepSpeed's view of mcore's groups (its `mpu` argument).

    Without it DeepSpeed takes all ranks for data parallel and averages different shards. It must offer no
    `get_sequence_parallel_*`: DeepSpeed would take Megatron's sequence parallelism for its own (Ulysses) and double
    the gradients. Model parallel here is tensor parallel: there is no pipeline under this engine.
    """

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_pipeline_model_parallel_group(self) -> Any:
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_rank(self) -> int:
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()
