# SPDX-License-Identifier: Apache-2.0
"""Resuming in another layout: a ZeRO 1 or 2 checkpoint read by other numbers of data- and tensor-parallel ranks.

DeepSpeed cuts each tensor-parallel rank's parameters, laid end to end, into equal flat partitions over its
data-parallel ranks, and saves with each partition which piece of which parameter lies where. Here a parameter's pieces
are put together, its tensor-parallel shards merged and cut anew, and this rank's pieces copied into its own partition:
fp32 weights and Adam's moments move bit by bit. One parameter is in memory at a time; files are memory-mapped.

DeepSpeed's own converter (`ds_to_universal`) does this in a separate step and unpickles its input without restriction.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from sparsek_megatron.errors import UserError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MASTER = "fp32"


def merge_shards(shards: Sequence[torch.Tensor], dim: int | None, stride: int) -> torch.Tensor:
    """The whole of a parameter from its tensor-parallel shards, in rank order.

    dim: the dimension that is cut, None where every rank holds the whole. stride: how many parts a shard interleaves
    along it (2 for the [gate, up] of a gated MLP), as Megatron's `partition_stride`.
    """
    if dim is None:
        return shards[0]
    parts = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([part[i] for i in range(stride) for part in parts], dim)


def cut_shard(whole: torch.Tensor, dim: int | None, stride: int, *, rank: int, size: int) -> torch.Tensor:
    """Tensor-parallel rank `rank`'s shard of a whole parameter: the inverse of `merge_shards`."""
    if dim is None:
        return whole
    return torch.cat([part.chunk(size, dim)[rank] for part in whole.chunk(stride, dim)], dim)


class SavedState:
    """The optimizer state of a checkpoint, parameter by parameter; `RuntimeError` where a rank's file is missing."""

    def __init__(self, folder: Path, load_file: Callable[..., Any]):
        names = {(int(m[2]), int(m[1])): p for p in folder.iterdir() if (m := _OPTIMIZER_FILE.fullmatch(p.name))}
        self.tensor_parallel = 1 + max((tensor for tensor, _ in names), default=0)
        data_parallel = 1 + max((data for _, data in names), default=0)
        files = self.tensor_parallel * data_parallel
        if len(names) != files:
            raise RuntimeError(f"it has {len(names)} of {files} files of optimizer state")

        @functools.cache
        def partitions(tensor: int) -> list[Any]:
            files = [names[tensor, data] for data in range(data_parallel)]
            return [load_file(file)["optimizer_state_dict"] for file in files]

        @functools.cache
        def model_states(tensor: int) -> Any:
            return load_file(folder / f"mp_rank_{tensor:02d}_model_states.pt")

        self._partitions = partitions
        self.model_states = model_states

    def group_state(self, group: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(entries of a group's optimizer state, the group's settings) of the first partition."""
        optimizer = self._partitions(0)[0]["base_optimizer_state"]
        return optimizer["state"][group], optimizer["param_groups"][group]

    def shard(self, group: int, name: str, key: str, tensor: int) -> torch.Tensor:
        """One tensor-parallel shard of a parameter: its fp32 weights (`key` "fp32") or a moment."""
        pieces = []
        for partition in self._partitions(tensor):
            address = partition["param_slice_mappings"][group].get(name)
            if address is None:
                continue
            if key == _MASTER:
                flat = partition["single_partition_of_fp32_groups"][group]
            else:
                flat = partition["base_optimizer_state"]["state"][group][key]
            pieces.append(flat.narrow(0, address.start, address.numel))
        shape = self.model_states(tensor)["param_shapes"][group][name]
        return torch.cat(pieces).view(torch.Size(shape))


def load_resharded(engine: Any, folder: Path, *, load_file: Callable[..., Any]) -> None:
    """Load a checkpoint of any ZeRO 1 or 2 layout into an engine of any other. `load_file` reads one file.

    The engine must be as `deepspeed.initialize` left it.

    Raises:
        UserError: a parameter does not have the checkpoint's shape.
    """
    saved = SavedState(folder, functools.partial(load_file, mmap=True))
    zero = engine.optimizer
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    states: dict[int, Any] = {}
    groups = zero.optimizer.state_dict()["param_groups"]
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        entries, settings = saved.group_state(group)
        moments = [key for key, value in entries.items() if torch.is_tensor(value) and value.dim() > 0]
        state: dict[str, Any] = {key: torch.zeros_like(flat) for key in moments}
        state |= {key: _copied(value) for key, value in entries.items() if key not in moments}
        targets = {_MASTER: flat.data} | {key: state[key] for key in moments}
        for parameter in zero.bit16_groups[group]:
            name = zero.param_names[parameter]
            is_sharded = getattr(parameter, "tensor_model_parallel", False)
            dim = parameter.partition_dim if is_sharded else None
            stride = parameter.partition_stride if is_sharded else 1
            for key, target in targets.items():
                if dim is None or saved.tensor_parallel == size:
                    own = saved.shard(group, name, key, 0 if dim is None else rank)
                else:
                    shards = [saved.shard(group, name, key, tensor) for tensor in range(saved.tensor_parallel)]
                    own = cut_shard(merge_shards(shards, dim, stride), dim, stride, rank=rank, size=size)
                if own.shape != parameter.shape:
                    raise UserError(
                        f"{folder}: {name} has shape {tuple(own.shape)} there and {tuple(parameter.shape)} here; keep "
                        "the model's settings"
                    )
                if key == _MASTER:
                    parameter.data.copy_(own)
                _copy_own_piece(parameter, own, target)
        states[group] = state
        groups[group] |= {"step": settings["step"]} if "step" in settings else {}
    zero.optimizer.load_state_dict({"state": states, "param_groups": groups})
    model_states = saved.model_states(0)
    for name, buffer in engine.module.named_buffers():
        if name in model_states["module"]:
            buffer.copy_(model_states["module"][name])
    engine.global_steps = model_states["global_steps"]
    engine.global_samples = model_states["global_samples"]
    engine.skipped_steps = model_states["skipped_steps"]


def _copy_own_piece(parameter: Any, value: torch.Tensor, flat: torch.Tensor) -> None:
    """Copy what this data-parallel rank owns of a parameter-shaped value into its flat partition."""
    mapping = parameter._hp_mapping
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        flat.narrow(0, there.start, there.numel).copy_(value.flatten().narrow(0, here.start, here.numel))


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
