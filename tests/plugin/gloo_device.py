# SPDX-License-Identifier: Apache-2.0
"""One gloo device for all process groups of a process.

A device is a thread that wakes up a hundred times a second, and PyTorch gives each group one of its own.
megatron-core makes dozens of groups for each layout: idle ones took more CPU than the tests' work.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

_PerGroup: Any = distributed_c10d.ProcessGroupGloo


class _OnSharedDevice(_PerGroup):
    device: Any = None

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        if _OnSharedDevice.device is None:
            _OnSharedDevice.device = _PerGroup.create_default_device()
        options = _PerGroup._Options()
        options._devices, options._threads, options._timeout = [_OnSharedDevice.device], 2, timeout
        super().__init__(store, rank, size, options)


def share_gloo_device() -> None:
    """Have the gloo groups that this process makes from now on use one device."""
    setattr(distributed_c10d, "ProcessGroupGloo", _OnSharedDevice)  # noqa: B010 - not its declared type
