# SPDX-License-Identifier: Apache-2.0
"""The end of a backward pass under ZeRO 1 and 2: the compute stream waits for the reduction, the host does not.

With `overlap_comm` DeepSpeed reduces gradients on a stream of its own and ends every backward that reduces with a wait
of the host for the whole device. What comes next only needs its kernels to run after the reduction's.

Memory, now that the host runs ahead:

    buckets               are allocated and freed on the compute stream, used on the reduction stream in between. They
                          are freed after `wait_stream`: their next user runs after the reduction.
    reduced partitions    are allocated on the reduction stream, read and freed on the compute stream. The reduction
                          stream allocates only after it has waited for the compute stream (`average_tensor`), thus
                          after the step that read the last ones.
    oversized gradients   are reduced in place and freed at once, where DeepSpeed relies on nobody else taking their
                          memory before the reduction has read it: `record_stream` holds it until then.

Other waits of DeepSpeed's for the device (`allreduce_and_copy`, its variant for scattered gradients) are only reached
with `use_multi_rank_bucket_allreduce` or `contiguous_gradients` switched off in a user's file. The step's own
wait is `zero_step`'s.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def wait_by_stream(engine: Any) -> bool:
    """Let `engine`, a DeepSpeed engine, end its backward passes without the host's wait. Returns whether it applies.

    It does with ZeRO 1 and 2 on CUDA with `overlap_comm` and without offload, whose copies the host waits for anyway.
    With a DeepSpeed whose backward ends otherwise than this module knows, its own wait stays, and the first rank says
    so.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.cpu_offload or not zero.overlap_comm:
        return False
    if not isinstance(zero.reduction_stream, torch.cuda.Stream):
        return False
    zero.average_tensor = MethodType(_average_tensor, zero)
    if not ends_as_known(type(zero)):
        if engine.global_rank == 0:
            print("this DeepSpeed ends backward otherwise than 0.19.8; the host waits for the GPU there", flush=True)
        return False
    zero.independent_gradient_partition_epilogue = MethodType(_end_backward, zero)
    return True


def ends_as_known(kind: type) -> bool:
    """Whether `kind`'s end of a backward pass is what `_end_backward` stands for.

    That is: reduce what is left; then, of all that it does, only the host's wait and the clearing behind it depend on
    `overlap_comm`.
    """
    source = inspect.getsource(kind.independent_gradient_partition_epilogue)  # pyright: ignore[reportAttributeAccessIssue]
    before, _, after = source.partition("if self.overlap_comm:")
    steps = [line.strip() for line in after.splitlines() if line.strip() and not line.strip().startswith("#")]
    return (
        "self.reduce_ipg_grads()" in before
        and "overlap_comm" not in before + after
        and steps[:3]
        == [
            "if not get_accelerator().resolves_data_dependency():",
            "get_accelerator().synchronize()",
            "self._clear_previous_reduced_grads()",
        ]
    )


def _end_backward(zero: Any) -> None:
    """In the place of `independent_gradient_partition_epilogue`."""
    zero.reduce_ipg_grads()
    torch.cuda.current_stream().wait_stream(zero.reduction_stream)
    zero._clear_previous_reduced_grads()
    # DeepSpeed's own does the rest. Its buckets are empty by now: it reduces nothing, on whichever stream.
    zero.overlap_comm = False
    try:
        type(zero).independent_gradient_partition_epilogue(zero)
    finally:
        zero.overlap_comm = True


def _average_tensor(zero: Any, tensor: Tensor, communication_data_type: torch.dtype) -> None:
    """In the place of `average_tensor`: what fits into no bucket is the gradient itself."""
    if tensor.numel() > zero.reduce_bucket_size:
        tensor.record_stream(zero.reduction_stream)  # pyright: ignore[reportArgumentType]
    type(zero).average_tensor(zero, tensor, communication_data_type)
