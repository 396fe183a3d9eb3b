# SPDX-License-Identifier: Apache-2.0
"""Weights of a training run's checkpoint in a model of any tensor-parallel size."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from sparsek_megatron.errors import UserError
from sparsek_megatron.training.checkpoint import safe_load, why_unreadable
from sparsek_megatron.training.reshard import cut_shard, merge_shards
from sparsek_megatron.training.run_folder import checkpoint_name
from sparsek_megatron.training.trained_run import TrainedRun


@torch.no_grad()
def load_weights(model: torch.nn.Module, run: TrainedRun) -> None:
    """Fill `model`, this rank's shard at any tensor-parallel size, from the run's checkpoint.

    Files are memory-mapped, and one parameter at a time is put together. Checksums are not looked at here: see
    `trained_run.newest_with_weights`.

    Raises:
        UserError: a file cannot be read, or does not hold this model; the model is then unchanged.
    """
    path = run.folder / checkpoint_name(run.step)
    saved_size = run.settings["tensor_model_parallel_size"]
    files = [path / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(saved_size)]
    try:
        shards = [safe_load(file, mmap=True)["module"] for file in files]
    except Exception as err:
        reason = why_unreadable(err)
        raise UserError(f"{path}: cannot be read ({reason})") from err
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [name for name in targets if name not in shards[0]]
    if any(".scorer." in name for name in missing):
        raise UserError(
            f"{path}: the checkpoint has no scorer ({missing[0]}): it was not trained with SparseK attention; "
            "add scorers to dense weights with sparsek_megatron.convert and train them"
        )
    if missing:
        raise UserError(f"{path}: the checkpoint does not hold {missing[0]}")
    values = {}
    for name, target in targets.items():
        sharded = getattr(target, "tensor_model_parallel", False)
        dim = target.partition_dim if sharded else None  # pyright: ignore[reportAttributeAccessIssue]
        stride = target.partition_stride if sharded else 1  # pyright: ignore[reportAttributeAccessIssue]
        if saved_size == size or dim is None:
            value = shards[0 if dim is None else rank][name]
        else:
            parts = [shard[name] for shard in shards]
            value = cut_shard(merge_shards(parts, dim, stride), dim, stride, rank=rank, size=size)
        if value.shape != target.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(value.shape)} there and {tuple(target.shape)} in the model "
                "of its settings"
            )
        values[name] = value
    for name, target in targets.items():
        target.copy_(values.pop(name))
