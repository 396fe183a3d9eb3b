# SPDX-License-Identifier: Apache-2.0
"""The pretraining program up to its checks; `worker` does the rest. See `examples/pretrain_gpt.py`."""

from collections.abc import Sequence

import torch

from sparsek_megatron.training.arguments import parse
from sparsek_megatron.training.launcher import (
    is_launched,
    launch,
    order_launches,
    processes_to_start,
    world_size_of_environment,
)
from sparsek_megatron.training.validate import check_run


def pretrain(argv: Sequence[str], program: str) -> None:
    """Run the program; with `--nproc-per-node` check everything here once, then start the processes.

    Raises:
        UserError: for each thing that the user can fix.
    """
    config, processes = parse(argv)
    order_launches(
        config.tensor_model_parallel_size * config.context_parallel_size, in_pieces=config.async_tensor_parallel
    )
    start_here = processes is not None and not is_launched()
    world_size = processes_to_start(processes) if start_here else world_size_of_environment()
    check_run(config, world_size, on_gpu=torch.cuda.is_available())
    if start_here:
        launch(program, argv, world_size)
    else:
        from sparsek_megatron.training.worker import run  # megatron-core and DeepSpeed: seconds

        run(config)
