# SPDX-License-Identifier: Apache-2.0
"""A layer's recomputation under full recompute: what it computes for nobody.

Backward computes a layer again for what its parts saved, which are their inputs. The layer's own output is the next
layer's input and was read in forward: here nobody reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor


def recomputing() -> bool:
    """Whether backward computes a checkpoint's forward again."""
    return is_checkpointing() and torch.is_grad_enabled()


class _Unread(torch.autograd.Function):
    """Stands for a tensor whose gradient alone is asked for: its shape, on one element of memory."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return grads[0]


def drop_recomputed_output(layer: torch.nn.Module) -> None:
    """Free the layer's output when it is recomputed: Megatron's checkpoint holds it through the layer's backward."""

    def hook(_layer: Any, _inputs: Any, output: Any) -> Any:
        if not recomputing():
            return output
        if isinstance(output, Tensor):
            return _Unread.apply(output)
        return (_Unread.apply(output[0]), *output[1:])

    layer.register_forward_hook(hook)
