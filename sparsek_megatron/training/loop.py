# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, validations, checkpoints, and the refusal to go on with a loss that is not a number."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from sparsek_megatron.data.datasets import StepSampler, batches
from sparsek_megatron.errors import UserError
from sparsek_megatron.training import checkpoint
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.engine import set_learning_rate, take_step
from sparsek_megatron.training.model import token_losses
from sparsek_megatron.training.parallel import DeepSpeedMpu, Machine
from sparsek_megatron.training.report import Report
from sparsek_megatron.training.run_folder import latest_step
from sparsek_megatron.training.schedule import learning_rate


class Trainer:
    """One run: `train` takes steps from `start` to `train_iters`.

    The loss of a step is the mean over all its tokens: every sample has the same number of them, so means of
    micro-batches and ranks average to it.
    """

    def __init__(
        self,
        config: TrainingConfig,
        engine: Any,
        machine: Machine,
        *,
        train_set: Dataset[Any],
        valid_set: Dataset[Any] | None,
        tokenizer_sha256: str,
        report: Report | None,
    ):
        self.config = config
        self.engine = engine
        self.machine = machine
        self.report = report
        self._train_set, self._valid_set = train_set, valid_set
        self._tokenizer_sha256 = tokenizer_sha256
        self._mpu = DeepSpeedMpu()
        self._data_parallel = self._mpu.get_data_parallel_world_size()
        self.global_batch = config.global_batch_size or config.micro_batch_size * self._data_parallel
        self._micro_batches = self.global_batch // (config.micro_batch_size * self._data_parallel)

    def _batches(self, dataset: Dataset[Any], first_step: int, last_step: int) -> Iterator[dict[str, Any]]:
        sampler = StepSampler(
            first_sample=first_step * self.global_batch,
            last_sample=last_step * self.global_batch,
            micro_batch_size=self.config.micro_batch_size,
            global_batch_size=self.global_batch,
            rank=self._mpu.get_data_parallel_rank(),
            world_size=self._data_parallel,
        )
        return batches(dataset, sampler, num_workers=self.config.num_workers, pin=self.machine.on_gpu)

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        device = self.machine.device
        tokens = batch["tokens"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True)
        return token_losses(self.engine, tokens, labels).float().mean()

    def _mean_over_ranks(self, loss: torch.Tensor) -> float:
        if self._data_parallel > 1:
            dist.all_reduce(loss, group=self._mpu.get_data_parallel_group())
            loss = loss / self._data_parallel
        return loss.item()

    def train(self, start: int) -> int:
        """Take steps until `train_iters` or an exit interval; returns the number of steps taken in all.

        Raises:
            UserError: the loss or the gradient norm is NaN or infinite, or a checkpoint cannot be written.
        """
        config = self.config
        self.engine.train()
        data = self._batches(self._train_set, start, config.train_iters)
        if start == 0:
            self._validate(0)
        for step in range(start + 1, config.train_iters + 1):
            lr = learning_rate(config, step - 1)
            set_learning_rate(self.engine, lr)
            loss, grad_norm = self._one_step(data, step)
            self._require_finite(grad_norm, "gradient norm", step)
            if self.report:
                self.report.step(step=step, loss=loss, lr=lr, grad_norm=grad_norm)
            last = step == config.train_iters
            leaving = config.exit_interval is not None and step % config.exit_interval == 0
            if step % config.eval_interval == 0 or last:
                self._validate(step)
            if step % config.save_interval == 0 or last or leaving:
                self._save(step)
            if leaving and not last:
                return step
        return config.train_iters

    def _one_step(self, data: Iterator[dict[str, Any]], step: int) -> tuple[float, float]:
        """One optimizer step; (loss, gradient norm before clipping)."""
        total = torch.zeros((), device=self.machine.device)
        mean, grad_norm = math.nan, None
        for micro_batch in range(1, self._micro_batches + 1):
            loss = self._loss(next(data))
            total += loss.detach() / self._micro_batches
            self.engine.backward(loss)
            if micro_batch == self._micro_batches:
                # Looked at before the update: a bad loss must not reach the weights.
                mean = self._mean_over_ranks(total)
                self._require_finite(mean, "loss", step)
            grad_norm = take_step(self.engine)
        assert grad_norm is not None, "DeepSpeed and this loop disagree about the end of a batch"
        return mean, grad_norm

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if math.isfinite(value):
            return
        good = latest_step(self.config.save)
        advice = "lower --lr, lengthen --lr-warmup-iters, or look at the data of this step"
        resume = f"resume from {self.config.save} (step {good}) after you" if good is not None else "no checkpoint yet;"
        raise UserError(f"step {step}: the {what} is {value}; training stopped before it was saved. {resume} {advice}")

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        if self._valid_set is None:
            return
        self.engine.eval()
        total = torch.zeros((), device=self.machine.device)
        count = 0
        for batch in self._batches(self._valid_set, 0, self.config.eval_iters):
            total += self._loss(batch)
            count += 1
        loss = self._mean_over_ranks(total / count)
        self.engine.train()
        if self.report:
            self.report.validation(step=step, loss=loss)

    def _save(self, step: int) -> None:
        path = checkpoint.save(
            self.engine, self.config, self.machine, step=step, tokenizer_sha256=self._tokenizer_sha256
        )
        if self.report:
            self.report.line(f"step {step}: saved {Path(path)}")
            self.report.resume_clock()
