# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy` in place of a Megatron model's output layer and loss.

Megatron's GPTModel (and HybridModel) computes `loss = compute_language_model_loss(labels,
output_layer(hidden))`. Here the output layer, told of the labels, returns the losses themselves and the
second call passes them on: the model's own code is unchanged, so whatever a version does around these two
calls is kept. Without labels (evaluation of logits, generation) the output layer is Megatron's.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from sparsek_megatron.memory.linear_cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy


class _ChunkedLoss:
    """Stands in for one model's output layer and loss while labels are known."""

    def __init__(self, model: Any, chunk_tokens: int | None) -> None:
        self.output_layer = model.output_layer
        self.chunk_tokens = chunk_tokens
        self.parameters = inspect.signature(model.forward)
        self.stock_output, self.stock_loss = model.output_layer.forward, model.compute_language_model_loss
        self.labels: Tensor | None = None
        model.register_forward_pre_hook(self.remember_labels, with_kwargs=True)
        model.register_forward_hook(self.forget_labels, always_call=True)
        model.output_layer.forward = self.output
        model.compute_language_model_loss = self.loss

    def remember_labels(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.labels = self.parameters.bind(*args, **kwargs).arguments.get("labels")

    def forget_labels(self, *_: Any) -> None:
        self.labels = None

    def output(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.labels is None:
            return self.stock_output(input_, weight, *args, **kwargs)
        layer = self.output_layer
        losses = linear_cross_entropy(
            input_,
            layer.weight if weight is None else weight,
            self.labels,
            group=layer.tp_group,
            sequence_parallel=layer.sequence_parallel,
            chunk_tokens=self.chunk_tokens,
        )
        return losses, None

    def loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        return self.stock_loss(labels, logits) if self.labels is None else logits


def use_chunked_loss(model: Any, *, chunk_tokens: int | None = None) -> Any:
    """Make a model's training forward compute its loss in chunks of tokens; returns the model.

    model: a megatron-core model with `output_layer` and `compute_language_model_loss`, before it is wrapped
    (Float16Module, DDP, DeepSpeed). Left alone on pipeline stages without an output layer. Losses [b, s] and
    gradients equal the ordinary ones to rounding; logits, asked for by calling without labels, are
    unchanged. chunk_tokens: tokens whose logits exist at a time on a rank; None sizes a chunk to 2^28 logits.

    Raises NotImplementedError for a setting that needs whole logits, naming the flag.
    """
    if not getattr(model, "post_process", True):
        return model
    config, layer = model.config, model.output_layer
    refusals = (
        (config.mtp_num_layers, f"--mtp-num-layers {config.mtp_num_layers}: its losses need whole logits"),
        (getattr(config, "use_mup", False), "--use-mup: it scales whole logits"),
        (
            config.defer_embedding_wgrad_compute,
            "--defer-embedding-wgrad-compute: it keeps the gradient of whole logits",
        ),
        (layer.bias is not None, "output layer with a bias"),
        (layer.gather_output, "parallel_output=False: it gathers whole logits"),
    )
    for refused, why in refusals:
        if refused:
            raise NotImplementedError(f"{why}; leave it out, or do without the chunked loss")
    _ChunkedLoss(model, chunk_tokens)
    return model


def whole_logits_are_large(*, tokens: int, vocabulary: int) -> bool:
    """Whether a micro batch's logits on one rank ([tokens, vocabulary / TP]) are more than one chunk."""
    return tokens * vocabulary > CHUNK_ELEMENTS
