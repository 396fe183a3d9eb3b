# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank receives from others, counted from the tensors that its collectives are called with."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(x) for x in tensors)


class CollectiveTraffic(TorchDispatchMode):
    """A context that counts: `received[(collective, group)]` bytes, the group by Megatron's description of it.

    Sees every collective of torch.distributed, in backward too. An all-reduce counts as the reduce-scatter and
    all-gather that it is made of; what a rank sends to itself does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[tuple[str, str], int] = defaultdict(int)

    @property
    def total(self) -> int:
        return sum(self.received.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group: Any = next((ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject)), None)
        if group is None or group.size() == 1:
            return
        others = (group.size() - 1) / group.size()
        if name in ("allgather_base", "reduce_scatter_base", "allgather", "reduce_scatter"):
            size = abs(_bytes(args[0]) - _bytes(args[1]))
        elif name == "alltoall_base":
            splits = args[3]
            own = splits[group.rank()] / max(sum(splits), 1) if splits else 1 / group.size()
            size = _bytes(args[0]) * (1 - own)
        elif name == "allreduce":
            size = 2 * others * _bytes(args[0])
        elif name in ("recv", "broadcast"):
            size = _bytes(args[0])
        else:
            return
        self.received[name.removesuffix("_base"), group.group_desc] += round(size)
