# SPDX-License-Identifier: Apache-2.0
"""Gradients of a step's micro-batches add up in fp32 under ZeRO 1, 2 and 3, with bf16 weights.

By itself DeepSpeed adds them up in the weights' type, where what is below 1/256 of a sum is lost; Megatron adds up in
fp32. `build_ds_config` asks for fp32 (`data_types.grad_accum_dtype`, and `communication_data_type` for the reduction)
where a step has more than one micro-batch. What DeepSpeed 0.19 does then:

    ZeRO-1  each weight has an fp32 sum on every rank. The last micro-batch's backward reduces the sums over
            data-parallel ranks, once a step and in fp32, into an fp32 partition: nothing is rounded to bf16. One rank
            has nothing to reduce and adds up as ZeRO-2.
    ZeRO-2  every micro-batch's gradients, bf16 as backward leaves them, are divided by the number of ranks in bf16
            (exact for a power of two), reduced in fp32 and added to the rank's fp32 partition.
    ZeRO-3  as ZeRO-2, divided in fp32 too.

`--offload-optimizer` keeps sums and partitions of ZeRO 1 and 2 on the GPU until the step. Two things are mended here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any


@contextmanager
def zero_1_in_fp32() -> Iterator[None]:
    """Let `deepspeed.initialize` build for ZeRO-1 with fp32 sums the optimizer of every other ZeRO 1 and 2.

    `DeepSpeedZeroOptimizer` sums in fp32 at both stages, but the engine takes `BF16_Optimizer` for this one case: a
    class with checkpoints of its own and without the one decision on a step of `use_one_norm`.
    """
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: Any, basic_optimizer: Any) -> Any:
        choice = choose(engine, basic_optimizer)
        return ZERO_OPTIMIZATION if choice == BFLOAT16 and engine.zero_optimization() else choice

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def forget_skipped_sums(engine: Any) -> bool:
    """With ZeRO 1 or 2 and CPU offload, drop the fp32 partitions of a step that is skipped. Returns whether it applies.

    DeepSpeed drops them after a step that it takes, and after a skipped one without offload alone: here a NaN would
    stay in every later sum.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer) or not zero.cpu_offload:
        return False
    zero.reset_cpu_buffers = MethodType(_reset_cpu_buffers, zero)
    return True


def _reset_cpu_buffers(zero: Any) -> None:
    """In the place of `reset_cpu_buffers`, which ends both kinds of step."""
    type(zero).reset_cpu_buffers(zero)
    for group in zero.averaged_gradients:
        zero.averaged_gradients[group] = None
