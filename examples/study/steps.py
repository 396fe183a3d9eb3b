# SPDX-License-Identifier: Apache-2.0
"""Training steps of one run: AdamW with fp32 masters, and on a GPU the whole step as one CUDA graph.

A model this small is bound by the host when its kernels are launched one by one; as a graph a step is one launch, and
many runs share a GPU without waiting for Python. Eager and captured steps do the same arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from data import Batch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from sparsek_megatron.optimizer import SCORER_ATTRIBUTE

WARMUP = 50
EAGER_STEPS = 3
"""Steps before the capture: kernels are compiled and optimizer states allocated in them."""


class Optimizer:
    """AdamW with fp32 master weights; scorers at their own rate; slope and norms without weight decay."""

    def __init__(self, model: GPTModel, learning_rate: float, scorer_lr_mult: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        groups: dict[tuple[bool, bool], list[Any]] = {}
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            key = (hasattr(parameter, SCORER_ATTRIBUTE), parameter.dim() > 1)
            groups.setdefault(key, []).append(master)
        self.rates = [learning_rate * (scorer_lr_mult if scorer else 1.0) for scorer, _ in groups]
        on_gpu = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": group,
                    "weight_decay": 0.1 if decays else 0.0,
                    "lr": torch.zeros((), device=self.masters[0].device) if on_gpu else 0.0,
                }
                for (_, decays), group in groups.items()
            ],
            betas=(0.9, 0.95),
            fused=on_gpu,
            capturable=on_gpu,
        )

    def set_rate(self, factor: float) -> None:
        """Learning rates of the next step: `factor` times the full ones."""
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * rate)
            else:
                group["lr"] = factor * rate

    def step(self) -> None:
        """Clip to norm 1, update, and copy back; parameters without a gradient stay."""
        pairs = zip(self.parameters, self.masters, strict=True)
        used = [(parameter, master) for parameter, master in pairs if parameter.grad is not None]
        for parameter, master in used:
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_([master for _, master in used], 1.0)
        self.adam.step()
        with torch.no_grad():
            for parameter, master in used:
                parameter.copy_(master)


def rate_factor(step: int, progress: float) -> float:
    """Warm-up over WARMUP steps, times a cosine from 1 to a twentieth at progress 1."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, progress))))


def logits_of(model: GPTModel, inputs: Tensor) -> Tensor:
    """[b, n, vocabulary] in the model's dtype."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, None)


def token_losses(model: GPTModel, tokens: Tensor) -> Tensor:
    """Losses [b, n] fp32 in nats of predicting tokens[:, 1:], tokens [b, n + 1]."""
    logits = logits_of(model, tokens[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(tokens.shape[0], -1)


class Stepper:
    """Steps on batches of one shape; `mean_loss` since it was last read. eager: capture nothing."""

    def __init__(
        self, model: GPTModel, optimizer: Optimizer, size: int, length: int, *, eager: bool = False
    ) -> None:
        self.model, self.optimizer, self.eager = model, optimizer, eager
        self.device = optimizer.masters[0].device
        self.tokens = torch.zeros(size, length + 1, dtype=torch.int64, device=self.device)
        self.weights = torch.zeros(size, length, device=self.device)
        self.total = torch.zeros((), device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.taken = self.read = 0
        self.stream = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream()
            torch.cuda.synchronize()  # the model and the buffers were made on another stream

    def step(self, batch: Batch, factor: float) -> None:
        """One step; returns before the GPU has finished it."""
        with torch.cuda.stream(self.stream):
            for buffer, values in ((self.tokens, batch.tokens), (self.weights, batch.weights)):
                buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)
            self.optimizer.set_rate(factor)
            if self.stream is not None and self.taken == EAGER_STEPS and not self.eager:
                self._capture()
            if self.graph is not None:
                self.graph.replay()
            else:
                self._run()
        self.taken += 1

    def _run(self) -> None:
        losses = token_losses(self.model, self.tokens)
        loss = (losses * self.weights).sum() / self.weights.sum()
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def _capture(self) -> None:
        for master in self.optimizer.masters:
            master.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self._run()

    def mean_loss(self) -> float:
        """Mean of the steps since the last reading; waits for the GPU."""
        with torch.cuda.stream(self.stream):  # nothing on CPU, where the stream is None
            value = float(self.total) / max(1, self.taken - self.read)
            self.total.zero_()
        self.read = self.taken
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} after {self.taken} steps")
        return value
