# SPDX-License-Identifier: Apache-2.0
"""Numbers of a step that the host reads after it has queued more work, without waiting for that work.

`tensor.item()` waits for everything that was queued before it. A step's loss is known before the optimizer's update:
copied to the host there, it can be read while the update runs, and the host goes on to queue the next step.
"""

from __future__ import annotations

import torch


class Reading:
    """The values of a tensor as they are at this place of the current stream.

    numbers: any shape and dtype, on CPU or GPU; on CPU they are there at once.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._numbers.copy_(numbers.detach(), non_blocking=True)
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def item(self) -> float:
        """The only number; waits for what was queued before it, and for nothing after."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.item()
