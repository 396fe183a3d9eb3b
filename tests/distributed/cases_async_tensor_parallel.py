# SPDX-License-Identifier: Apache-2.0
"""Async tensor parallelism against one rank in float32; over NCCL through torch's symmetric memory operators."""

from __future__ import annotations

from typing import Any

import torch
from mcore_harness import (
    RECOMPUTE,
    batch,
    build_gpt,
    device,
    full_gradients,
    full_weights,
    load_full,
    parallel,
    randomise,
    relative_errors,
    tiny_config,
)
from worker import case

from sparsek_megatron import SparseKConfig, async_tensor_parallel, get_sparsek_layer_spec
from sparsek_megatron.memory import use_tiled_mlp

# Every key is attended: rounding cannot change a selection.
SPARSEK = SparseKConfig(topk=32, window=32, stride=4, reference_length=64)


def run(
    *, tp: int, overlapped: bool = False, tiles: bool = False, frozen: str = "",
    qkv_bias: bool = False, weights: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """(whole weights; losses and whole gradients of unevenly weighted losses)."""
    with parallel(tp=tp):
        changes: dict[str, Any] = {"kv_channels": 64} if torch.cuda.is_available() else {}
        config = tiny_config(sequence_parallel=tp > 1, add_qkv_bias=qkv_bias, **changes, **(RECOMPUTE if tiles else {}))
        model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SPARSEK)).to(device())
        if weights is None:
            randomise(model)
        else:
            load_full(model, weights)
        whole = full_weights(model)
        if overlapped:
            async_tensor_parallel.use_async_tensor_parallel(model)
        if tiles:
            use_tiled_mlp(model, tile_tokens=24)
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in name)
        tokens, positions, labels = (each.to(device()) for each in batch())
        importance = torch.linspace(0.0, 2.0, tokens.numel(), device=device()).view(tokens.shape)
        losses = model(tokens, positions, None, labels=labels)
        (losses * importance).sum().backward()
        if frozen:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return whole, {"losses": losses.detach(), **full_gradients(model)}


def errors(**layout: Any) -> dict[str, float]:
    """Of losses and gradients against one rank, and how often each operator ran."""
    weights, want = run(tp=1, frozen=layout.get("frozen", ""), qkv_bias=layout.get("qkv_bias", False))
    calls = {"_gather_and_multiply": 0, "_multiply_and_scatter": 0}
    stock = {name: getattr(async_tensor_parallel, name) for name in calls}

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return stock[name](*args)

        return call

    for name in calls:
        setattr(async_tensor_parallel, name, counted(name))
    try:
        _, got = run(weights=weights, overlapped=True, **layout)
    finally:
        for name, function in stock.items():
            setattr(async_tensor_parallel, name, function)
    return {**relative_errors(got, want), **{name: float(count) for name, count in calls.items()}}


@case
def async_tp2() -> dict[str, float]:
    return errors(tp=2)


@case
def async_tp2_recomputed_in_tiles() -> dict[str, float]:
    return errors(tp=2, tiles=True)


@case
def async_tp2_with_frozen_columns() -> dict[str, float]:
    return errors(tp=2, frozen="linear_fc1")


@case
def async_tp2_with_frozen_rows() -> dict[str, float]:
    return errors(tp=2, frozen="linear_proj")


@case
def async_tp2_with_qkv_bias() -> dict[str, float]:
    return errors(tp=2, qkv_bias=True)


@case
def async_tp4() -> dict[str, float]:
    return errors(tp=4)
