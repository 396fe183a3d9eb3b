# SPDX-License-Identifier: Apache-2.0
"""An MLP whose inner activations exist one tile of tokens at a time, in forward and in backward.

A SwiGLU MLP of width f holds 3 f / tp numbers per token in forward and as many gradients in backward: 64 GiB
at 1M tokens and f = 5,504 in bf16, whatever is recomputed around it. A token's MLP does not depend on other
tokens, so each tile of the sequence is computed alone, and again in backward: one more forward of the MLP.
Under full recompute of single decoder layers that forward replaces the one of the layer's recomputation, whose
result is the layer's output and is read by nobody (what backward needs are inputs); it is skipped there, and tiles
cost nothing. Nor is the layer's output kept there. A multi-token prediction layer recomputes the norm behind its MLP
too, which reads the result.

Weight gradients are summed over tiles in fp32 and handed to autograd once, so hooks on parameters
(Megatron's DDP, DeepSpeed) fire once. (megatron-core 0.19's `mlp_chunks_for_training` cuts the forward pass
only and saves what all chunks need.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from sparsek_megatron.memory.recomputation import drop_recomputed_output, recomputing
from sparsek_megatron.recompute import checkpoints_of_one_layer


class _Tiled(torch.autograd.Function):
    """run(x) tile by tile along the first dimension; `weights` are the parameters that `run` uses.

    `unread` says that nobody reads the result, only its gradient: zeros then.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], rows: int, unread: bool, x: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.run, ctx.rows = run, rows
        ctx.save_for_backward(x, *weights)
        if unread:
            return torch.zeros_like(x)
        out = None
        for start in range(0, x.shape[0], rows):
            part = run(x[start : start + rows])
            out = part.new_empty(x.shape[0], *part.shape[1:]) if out is None else out
            out[start : start + rows] = part
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        x, *weights = ctx.saved_tensors
        needed = [i for i, weight in enumerate(weights) if ctx.needs_input_grad[4 + i]]
        sums: dict[int, Tensor] = {}
        d_x = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        for start in range(0, x.shape[0], ctx.rows):
            tile = slice(start, start + ctx.rows)
            with torch.enable_grad():
                part = x[tile].detach().requires_grad_(d_x is not None)
                out = ctx.run(part)
            inputs = [part] * (d_x is not None) + [weights[i] for i in needed]
            found = list(torch.autograd.grad(out, inputs, d_out[tile]))
            if d_x is not None:
                d_x[tile] = found.pop(0)
            for i, gradient in zip(needed, found, strict=True):
                if i in sums:
                    sums[i] += gradient
                else:
                    sums[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        d_weights = (sums[i].to(weight.dtype) if i in sums else None for i, weight in enumerate(weights))
        return None, None, None, d_x, *d_weights


def use_tiled_mlp(model: Any, *, tile_tokens: int) -> Any:
    """Compute every MLP of a model in tiles of about `tile_tokens` tokens; returns the model.

    model: a megatron-core model with dense MLPs, before it is wrapped. Under sequence parallelism a tile is
    gathered from all tensor-parallel ranks and `tile_tokens` counts it whole. Results equal the ordinary
    ones to the rounding of weight gradients.

    Raises ValueError for a tile without tokens; NotImplementedError where the model has experts, biases, or
    gradient accumulation fused into the weight's product.
    """
    config = model.config
    if tile_tokens < 1:
        raise ValueError(f"--mlp-tile-tokens {tile_tokens}: must be at least 1")
    refusals = (
        (config.num_moe_experts, "--num-experts: experts see other tokens of the batch"),
        (config.add_bias_linear, "--add-bias-linear: use --disable-bias-linear"),
        (config.gradient_accumulation_fusion, "use --no-gradient-accumulation-fusion"),
        (config.fp8, "--fp8-format: each tile would take its own scales"),
    )
    for refused, why in refusals:
        if refused:
            raise NotImplementedError(f"tiled MLP: {why}, or leave --mlp-tile-tokens out")
    gathered = config.tensor_model_parallel_size if config.sequence_parallel else 1
    layers_alone = checkpoints_of_one_layer(config)
    predicting = [module for module in model.modules() if isinstance(module, MultiTokenPredictionLayer)]
    read_again = {module for layer in predicting for module in layer.modules()}
    for mlp in [module for module in model.modules() if isinstance(module, MLP)]:
        unread = layers_alone and mlp not in read_again
        mlp.forward = _tiled_forward(mlp, tile_tokens // gathered, unread_when_recomputed=unread)
    if layers_alone:
        for layer in model.decoder.layers:
            drop_recomputed_output(layer)
    return model


def _tiled_forward(
    mlp: Any, tile_tokens: int, *, unread_when_recomputed: bool
) -> Callable[..., tuple[Tensor, None]]:
    """The MLP's forward in tiles of about `tile_tokens` of this rank's tokens."""
    whole = mlp.forward

    def run(tile: Tensor) -> Tensor:
        return whole(tile)[0]

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        rows = max(1, tile_tokens // hidden_states.shape[1])
        if rows >= hidden_states.shape[0]:
            return run(hidden_states), None
        unread = unread_when_recomputed and recomputing()
        out: Any = _Tiled.apply(run, rows, unread, hidden_states, *mlp.parameters())
        return out, None

    return forward
