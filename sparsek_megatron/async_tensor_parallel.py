# SPDX-License-Identifier: Apache-2.0
"""Async tensor parallelism: the linear layers' collectives in pieces, beside the matrix products that need them.

Under sequence parallelism a column-parallel layer needs the whole sequence before its product, a row-parallel one sums
its product over the ranks after it, and gathers the gradient before that of its input. Without Transformer Engine
megatron-core does one after the other. Here each is cut into one piece per rank by torch's symmetric memory operators
(`symm_mem::fused_all_gather_matmul`, `symm_mem::fused_matmul_reduce_scatter`): while one piece is multiplied, copy
engines fetch the next from another GPU's memory. The backward of a column-parallel layer stays as megatron-core
arranges it: its gather lies beside the gradient of the input, its reduce-scatter beside that of the weight.

A product is computed from the same numbers in other tiles, and a sum over ranks is taken in fp32 and rounded once:
results equal megatron-core's to rounding. Two streams take turns, so CUDA_DEVICE_MAX_CONNECTIONS must not be 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

_PROBE_BYTES = 1 << 20


def use_async_tensor_parallel(model: Any) -> Any:
    """Overlap the collectives of a model's tensor-parallel linear layers with their products; returns the model.

    model: a megatron-core model under tensor and sequence parallelism, before it is wrapped, with megatron-core's own
    linear layers. Its tensor-parallel GPUs must see each other's memory (one host, NVLink). On CPU the collectives
    come whole and nothing overlaps. The output layer is left to the loss.

    Raises ValueError without sequence parallelism and under CUDA_DEVICE_MAX_CONNECTIONS=1; NotImplementedError for
    Transformer Engine's layers, experts, biases in every linear layer (qkv alone may have them), fused gradient
    accumulation, and GPUs that cannot share memory.
    """
    config = model.config
    if config.tensor_model_parallel_size == 1 or not config.sequence_parallel:
        raise ValueError(
            f"--async-tensor-parallel with --tensor-model-parallel-size {config.tensor_model_parallel_size}: there is "
            "nothing to overlap; use a size above 1 and --sequence-parallel, or leave it out"
        )
    refusals = (
        (config.num_moe_experts, "--num-experts: experts have collectives of their own"),
        (config.add_bias_linear, "--add-bias-linear: use --disable-bias-linear"),
        (config.gradient_accumulation_fusion, "use --no-gradient-accumulation-fusion"),
    )
    for refused, why in refusals:
        if refused:
            raise NotImplementedError(f"--async-tensor-parallel: {why}, or leave --async-tensor-parallel out")
    output = getattr(model, "output_layer", None)
    layers = [
        module
        for module in model.modules()
        if type(module) in (ColumnParallelLinear, RowParallelLinear)
        and module.sequence_parallel
        and module is not output
    ]
    if not layers:
        raise NotImplementedError(
            "--async-tensor-parallel: no linear layer is megatron-core's own; Transformer Engine's overlap with "
            "--tp-comm-overlap"
        )
    if torch.cuda.is_available():
        _check_gpus(layers[0].tp_group)
    for layer in layers:
        if type(layer) is ColumnParallelLinear:
            layer._forward_impl = _column_product
        else:
            layer.forward = _row_forward(layer)
    return model


def _column_product(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, tp_group: Any, **_: Any
) -> Tensor:
    """In the place of `ColumnParallelLinear._forward_impl`, whose names it takes."""
    out: Any = AsyncColumn.apply(input, weight, tp_group)
    return out if bias is None else out + bias


def _row_forward(layer: Any) -> Callable[[Tensor], tuple[Tensor, None]]:
    def forward(input_: Tensor) -> tuple[Tensor, None]:
        out: Any = AsyncRow.apply(input_, layer.weight, layer.tp_group)
        return out, None

    return forward


class AsyncColumn(torch.autograd.Function):
    """x [s / tp, b, h] of this rank, weight [o, h] -> [s, b, o]: gather, then multiply."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return _gather_and_multiply(x, weight.t(), group)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,), group = grads, ctx.group
        x, weight = ctx.saved_tensors
        d_x = d_weight = gathered = gathering = None
        if ctx.needs_input_grad[1]:
            gathered = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
            gathering = dist.all_gather_into_tensor(gathered, x.contiguous(), group=group, async_op=True)
        reducing = None
        if ctx.needs_input_grad[0]:
            whole, d_x = d_out @ weight, torch.empty_like(x, memory_format=torch.contiguous_format)
            reducing = dist.reduce_scatter_tensor(d_x, whole, group=group, async_op=True)
        if gathered is not None and gathering is not None:
            gathering.wait()
            d_weight = d_out.flatten(0, 1).t() @ gathered.flatten(0, 1)
        if reducing is not None:
            reducing.wait()
        return d_x, d_weight, None


class AsyncRow(torch.autograd.Function):
    """x [s, b, i] of this rank's columns, weight [h, i] -> [s / tp, b, h]: multiply, then sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return _multiply_and_scatter(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        x, weight = ctx.saved_tensors
        gathered, d_x = _gather_and_multiply(d_out, weight, ctx.group)
        # The gathered gradient is the one of x @ weight.t() on every rank: each term of a sum has the sum's gradient.
        d_weight = gathered.flatten(0, 1).t() @ x.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None


def _gather_and_multiply(shard: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(x, x @ matrix) for the x [s, b, m] whose first dimension the ranks of `group` share."""
    if shard.is_cuda:
        x, (out,) = torch.ops.symm_mem.fused_all_gather_matmul(
            shard.contiguous(), [matrix], 0, group.group_name
        )
        return x, out
    x = shard.new_empty(shard.shape[0] * group.size(), *shard.shape[1:])
    dist.all_gather_into_tensor(x, shard.contiguous(), group=group)
    return x, x @ matrix


def _multiply_and_scatter(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    """This rank's part [s / tp, b, n] of the sum of x @ matrix over the ranks of `group`."""
    if x.is_cuda:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x.contiguous(), matrix, "sum", 0, group.group_name
        )
    out = x.new_empty(x.shape[0] // group.size(), x.shape[1], matrix.shape[1])
    dist.reduce_scatter_tensor(out, x @ matrix, group=group)
    return out


def _check_gpus(group: Any) -> None:
    """Refuse what would be slow or fail in the middle of a step."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ValueError(
            "--async-tensor-parallel under CUDA_DEVICE_MAX_CONNECTIONS=1: copies and products would wait for each "
            "other in one queue; unset it, or leave --async-tensor-parallel out"
        )
    from torch.distributed import _symmetric_memory as symmetric_memory

    try:
        symmetric_memory.get_symm_mem_workspace(group.group_name, min_size=_PROBE_BYTES)
    except RuntimeError as err:
        raise NotImplementedError(
            "--async-tensor-parallel: the GPUs of a tensor-parallel group cannot read each other's memory "
            f"({str(err).splitlines()[0]}); use GPUs of one host joined by NVLink, or leave it out"
        ) from None
