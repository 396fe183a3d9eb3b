# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-1 and 2 steps with one norm of all gradients, by torch's multi-tensor kernels.

DeepSpeed looks at every gradient on its own, once for values that are not finite and once for its norm: about nine
small kernels for each parameter, queued while the GPU waits for them. The norm of all gradients is finite exactly when
they all are (and below 1e19), so it answers both questions.

Whether the step is taken is then decided where the norm is:

    torch's fused AdamW, bf16   on the device. The kernel of the update reads `found_inf`, and where it is 1 leaves
                                weights, moments and its step count alone, as under torch's gradient scaler. DeepSpeed
                                ends the step as any other and copies master weights that did not change.
    any other                   on the host, by DeepSpeed, which waits for the norm and drops the gradients.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from sparsek_megatron.training.reading import Reading


def use_one_norm(engine: Any) -> bool:
    """Let `engine`, a DeepSpeed engine, decide on its step by one norm. Returns whether anything was replaced.

    Replaced where ZeRO 1 or 2 keeps its state on the device and takes a norm. Norms and clipped gradients equal
    DeepSpeed's to the rounding of a sum in fp32.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.cpu_offload or zero.has_moe_layers:
        return False
    if not zero.compute_grad_norm:  # zero_optimization.compute_grad_norm: nothing else would see what is not finite
        return False
    told = skips_on_device(zero)
    zero.is_told_to_skip = told  # pyright: ignore[reportAttributeAccessIssue]
    if told:
        zero.check_grad_overflow = False  # DeepSpeed reads the norm of bf16 gradients for this alone
    for name, function in (
        ("check_overflow", _leave_it_to_the_norm),
        ("scaled_global_norm", _norm_of_all),
        ("unscale_and_clip_grads", _clip),
    ):
        setattr(zero, name, MethodType(function, zero))
    return True


def skips_on_device(zero: Any) -> bool:
    """Whether `zero`'s step is decided on the device, by the optimizer's own kernel."""
    optimizer = zero.optimizer
    return (
        zero.dtype == torch.bfloat16  # in other types DeepSpeed reads the norm whatever it is told
        and isinstance(optimizer, torch.optim.AdamW)
        and all(group["fused"] for group in optimizer.param_groups)
    )


def _leave_it_to_the_norm(zero: Any, partition_gradients: bool = True) -> None:
    """In the place of `check_overflow`, which a step calls before it takes the norm."""
    zero.overflow = False


def _norm_of_all(zero: Any, norm_type: int = 2) -> Tensor:
    """Norm of the gradients of all groups and ranks, 0-dim fp32; infinite where one is not finite."""
    from deepspeed import comm
    from deepspeed.runtime.utils import is_model_parallel_parameter

    first = zero.model_parallel_rank == 0  # counts what all tensor-parallel ranks hold
    gradients = [
        gradient
        for group, parameters in enumerate(zero.params_in_partition)
        for gradient, parameter in zip(_own(zero.averaged_gradients[group]), parameters, strict=False)
        if first or is_model_parallel_parameter(parameter)
    ]
    square = torch.zeros((), device=zero.device)
    if gradients:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        square = torch.stack(norms).square().sum()
    comm.all_reduce(square, group=zero.dp_process_group)
    zero._model_parallel_all_reduce(tensor=square, op=comm.ReduceOp.SUM)
    norm = square.sqrt()
    norm = torch.where(norm.isfinite(), norm, float("inf"))
    if zero.is_told_to_skip:
        zero.optimizer.found_inf = norm.isinf().float()
    zero.norm_reading = Reading(norm)
    return norm


def norm_of_step(engine: Any) -> float:
    """Norm before clipping that the last step took; where the norm is one, without a wait for the update behind it.

    To be called after each step: DeepSpeed counts the skipped ones, and has not seen one that the device skipped.
    """
    zero = engine.optimizer
    reading = getattr(zero, "norm_reading", None)
    norm = float(engine.get_global_grad_norm()) if reading is None else reading.item()
    if reading is not None and not zero.overflow and math.isinf(norm):
        zero.overflow, engine._step_applied = True, False
        engine.skipped_steps += 1
    return norm


def _own(gradients: list[Tensor]) -> list[Tensor]:
    """This rank's gradients without what fills its partition up."""
    return [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]


def _clip(zero: Any, gradients: list[Tensor], norm: Tensor) -> None:
    """Divide flat gradients by the loss scale, and where `norm` is above `clip_grad` down to that."""
    scale = zero.loss_scale
    if zero.clip_grad > 0:
        scale = ((norm / scale + 1e-6) / zero.clip_grad).clamp(min=1.0) * scale
    elif scale == 1:
        return
    for gradient in gradients:
        gradient.mul_(1.0 / scale)
