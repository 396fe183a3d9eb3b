# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of the step alone, so that resuming needs no state."""

import math

from sparsek_megatron.training.arguments import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of step `step` (0 is the first): linear warm-up, then decay to `min_lr` at `lr_decay_iters`.

    The shapes are Megatron's: the decay runs from the end of the warm-up.
    """
    if step < config.lr_warmup_iters:
        return config.lr * (step + 1) / config.lr_warmup_iters
    last = config.lr_decay_iters or config.train_iters
    if config.lr_decay_style == "constant":
        return config.lr
    if step >= last:
        return config.min_lr
    progress = (step - config.lr_warmup_iters) / max(1, last - config.lr_warmup_iters)
    weight = 1 - progress if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + weight * (config.lr - config.min_lr)
