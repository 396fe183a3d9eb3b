# SPDX-License-Identifier: Apache-2.0
"""The states of every random number generator of a process, as plain data and tensors."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def rng_states(*, on_gpu: bool) -> dict[str, Any]:
    """States of Python's, NumPy's, torch's and mcore's generators."""
    version, keys, gauss = random.getstate()
    name, numbers, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": (version, list(keys), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(numbers).copy()), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    if on_gpu:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, Any], *, on_gpu: bool) -> None:
    """Set what `rng_states` returned.

    Where only one of the two runs is on a GPU, mcore's generators and the GPU's are left as they were seeded: their
    states are those of another device.
    """
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, numbers.numpy(), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if ("cuda" in states) != on_gpu:
        return
    _tracker().set_states(states["tracker"])
    if on_gpu:
        torch.cuda.set_rng_state(states["cuda"])
