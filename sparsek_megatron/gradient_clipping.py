# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping of Megatron's optimizer without Transformer Engine and Apex: torch's multi-tensor kernels.

Megatron's own stand-ins for those libraries read the norm of every gradient back to the host, one by one, and scale
each on its own. Filled with torch's kernels the same slots need one launch for many tensors and read nothing. What is
left is megatron-core's: versions that can clip by a norm on the device (0.19) do, and the host then never waits in an
optimizer step; earlier ones read the norm of all gradients once.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor


def _l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """Norm of all tensors together, [1] fp32 on their device; called as Apex's `amp_C.multi_tensor_l2norm`."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def _scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float | Tensor
) -> None:
    """tensor_lists[1] = tensor_lists[0] * scale, a number or a tensor [1]; called as `amp_C.multi_tensor_scale`."""
    sources, targets = tensor_lists
    if sources is not targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(targets, scale.view(()) if isinstance(scale, Tensor) else scale)  # pyright: ignore[reportPrivateImportUsage]


def use_foreach_clipping() -> bool:
    """Fill the slots that megatron-core filled with its stand-ins; Transformer Engine's and Apex's kernels stay.

    For the whole process. Returns whether anything was replaced. Norms and clipped gradients equal the stand-ins' to
    the rounding of a sum in fp32.
    """
    if clip_grads.l2_norm_impl is not utils.local_multi_tensor_l2_norm:
        return False
    filled: Any = clip_grads
    filled.l2_norm_impl, filled.multi_tensor_scale_impl = _l2_norm, _scale
    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):
        filled.multi_tensor_scale_tensor_impl = _scale
    return True
