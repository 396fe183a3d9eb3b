# SPDX-License-Identifier: Apache-2.0
"""One training step, forward, backward and optimizer, by DeepSpeed ZeRO-1 or by megatron-core's distributed optimizer.

Both train bf16 weights with fp32 master weights and moments and clip the gradient norm at 1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor
from torch.profiler import record_function
from training_benchmark.graph import Replay

from sparsek_megatron.gradient_clipping import use_foreach_clipping
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.engine import build_engine
from sparsek_megatron.training.model import token_losses
from sparsek_megatron.training.parallel import Machine

TRAINERS = ("deepspeed", "mcore")


class DeepSpeedTrainer:
    """ZeRO stage 1 through the engine that `examples/pretrain_gpt.py` uses."""

    def __init__(self, config: TrainingConfig, model: torch.nn.Module, machine: Machine) -> None:
        self.engine, _ = build_engine(config, model, machine)
        self.engine.train()

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss, on the device: nothing here reads it."""
        with record_function("phase:forward"):
            loss = token_losses(self.engine, tokens, labels).float().mean()
        with record_function("phase:backward"):
            self.engine.backward(loss)
        with record_function("phase:optimizer"), record_function("part:optimizer"):
            self.engine.step()
        return loss.detach()

    def close(self) -> None:
        """Let go of model and optimizer state, which DeepSpeed's hooks would hold as long as the process lives."""
        self.engine.destroy()


class MegatronTrainer:
    """megatron-core's DDP and distributed optimizer, gradients summed in fp32; `gradients` can be captured."""

    def __init__(self, config: TrainingConfig, model: Any, machine: Machine) -> None:
        use_foreach_clipping()
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=machine.world_size > config.tensor_model_parallel_size,
        )
        self.model = DistributedDataParallel(model.config, ddp, model)
        self.model.train()
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.gradients = Replay(self._gradients)

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss, on the device: nothing here reads it."""
        self.optimizer.zero_grad()
        loss = self.gradients(tokens, labels)
        with record_function("phase:optimizer"), record_function("part:optimizer"):
            self.optimizer.step()
        return loss

    def close(self) -> None:
        """Nothing outlives the trainer."""

    def _gradients(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Reduced gradients in the buffers of the wrapped model; the loss."""
        with record_function("phase:forward"):
            self.model.zero_grad_buffer()
            loss = token_losses(self.model, tokens, labels).float().mean()
        with record_function("phase:backward"):
            loss.backward()
            finalize_model_grads([self.model])
        return loss.detach()


def build_trainer(name: str, config: TrainingConfig, model: Any, machine: Machine) -> Any:
    """The trainer of that name around a built model."""
    return (DeepSpeedTrainer if name == "deepspeed" else MegatronTrainer)(config, model, machine)
