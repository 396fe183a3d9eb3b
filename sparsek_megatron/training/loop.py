# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, validations, checkpoints, and what interrupts them: bad gradients, signals, hangs."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import Dataset

from sparsek_megatron.data.datasets import StepSampler, batches
from sparsek_megatron.data.fingerprint import Fingerprint
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.checkpoint import Checkpoints
from sparsek_megatron.training.engine import set_learning_rate, take_step
from sparsek_megatron.training.health import SelectionWatch
from sparsek_megatron.training.model import token_losses
from sparsek_megatron.training.parallel import DeepSpeedMpu, Machine
from sparsek_megatron.training.reading import Reading
from sparsek_megatron.training.report import Report
from sparsek_megatron.training.run_folder import latest_step
from sparsek_megatron.training.schedule import learning_rate
from sparsek_megatron.training.stopping import StopRequest, name_of
from sparsek_megatron.training.watchdog import Watchdog, progress

ADVICE = "lower --lr, lengthen --lr-warmup-iters, or look at the data of these steps"


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
        data: Mapping[str, Fingerprint],
        report: Report | None,
    ):
        self.config = config
        self.engine = engine
        self.machine = machine
        self.report = report
        self.checkpoints = Checkpoints(engine, config, machine, tokenizer_sha256=tokenizer_sha256, data=data)
        self._train_set, self._valid_set = train_set, valid_set
        self._mpu = DeepSpeedMpu()
        self._data_parallel = parallel_state.get_data_parallel_world_size()
        self.global_batch = config.global_batch_size or config.micro_batch_size * self._data_parallel
        self._micro_batches = self.global_batch // (config.micro_batch_size * self._data_parallel)
        self._selection = SelectionWatch(config, engine.module)
        self._skipped = 0  # steps in a row
        self._bad_ranks: list[int] = []  # whose loss was not finite in the last one
        self._saved = 0  # the step that the run would resume from; 0 is the start
        self._is_due = False  # a checkpoint that a skipped step has put off

    def _batches(self, dataset: Dataset[Any], first_step: int, last_step: int) -> Iterator[dict[str, Any]]:
        sampler = StepSampler(
            first_sample=first_step * self.global_batch,
            last_sample=last_step * self.global_batch,
            micro_batch_size=self.config.micro_batch_size,
            global_batch_size=self.global_batch,
            rank=parallel_state.get_data_parallel_rank(),
            world_size=self._data_parallel,
        )
        return batches(dataset, sampler, num_workers=self.config.num_workers, pin=self.machine.on_gpu)

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        device = self.machine.device
        tokens = batch["tokens"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True)
        return token_losses(self.engine, tokens, labels).float().mean()

    def _mean_over_ranks(self, loss: torch.Tensor) -> Reading:
        sharers = self._mpu.get_data_parallel_world_size()  # context-parallel ranks hold as many tokens each
        if sharers > 1:
            dist.all_reduce(loss, group=self._mpu.get_data_parallel_group())
            loss = loss / sharers
        return Reading(loss)

    def train(self, start: int, stop: StopRequest) -> int:
        """Take steps until `train_iters`, an exit interval or a signal to stop; returns the number of the last step.

        The last checkpoint is in force when it returns. A signal from before the first step ends the run before it.

        Raises:
            UserError: too many steps in a row had a non-finite gradient, or a checkpoint cannot be written.
        """
        self.engine.train()
        self._watchdog = Watchdog(self.config.hang_timeout_seconds, self.machine.rank)
        self._stop = stop
        try:
            steps = self._steps(start)
            self._finish_checkpoint()
            self._tell_news()
        finally:
            self._watchdog.close()
        return steps

    def _steps(self, start: int) -> int:
        config = self.config
        if start < config.train_iters and (signal := name_of(self._stop.ask(self.machine.device))):
            if self.report:
                self.report.line(f"stopped by {signal} before step {start + 1}; the same command goes on there")
            return start
        self._saved = start
        data = self._batches(self._train_set, start, config.train_iters)
        if start == 0:
            self._validate(0)
        for step in range(start + 1, config.train_iters + 1):
            self._watchdog.beat(f"step {step}")
            lr = learning_rate(config, step - 1)
            set_learning_rate(self.engine, lr)
            last = step == config.train_iters
            look = step % config.log_interval == 0 or last
            loss, grad_norm, local_loss, signal = self._one_step(data, look=look)
            skipped = not math.isfinite(grad_norm)
            selection = self._selection.collect(self.machine.device) if look else None
            if self.report:
                self.report.step(step=step, loss=loss, lr=lr, grad_norm=grad_norm, selection=selection)
            self._tell_news()
            self._count_skipped(step, loss, local_loss, skipped=skipped)
            leaving = signal is not None or (config.exit_interval is not None and step % config.exit_interval == 0)
            if (step % config.eval_interval == 0 or last) and not signal:
                self._validate(step)
            if self._is_due or step % config.save_interval == 0 or last or leaving:
                self._save(step, skipped=skipped, ends=last or leaving)
            elif step == start + 1:
                self._watchdog.beat("the memory for checkpoints")
                self.checkpoints.reserve()
                if self.report:
                    self.report.restart_clock()
            if leaving and not last:
                if signal and self.report:
                    where = f"from step {self._saved}" if self._saved else "from the start"
                    self.report.line(
                        f"stopped by {signal} after step {step}; with --load, the same command resumes {where}"
                    )
                return step
        if start < config.train_iters != self._saved:
            self._finish_checkpoint()
            folder = config.load if self._saved == start else config.save
            resume = f"Resume from {folder} (step {self._saved})" if self._saved else "Start again"
            raise UserError(
                f"step {config.train_iters}: the last step was skipped and its weights may be the cause: they are not "
                f"saved. {resume} after you {ADVICE}"
            )
        return config.train_iters

    def _one_step(self, data: Iterator[dict[str, Any]], *, look: bool) -> tuple[float, float, float, str | None]:
        """One optimizer step: (loss, gradient norm before clipping, this rank's share of the loss, signal to stop).

        What the host must know is queued before the optimizer's update and read after that was queued: the next forward
        is launched while the update runs. With `look`, the first micro-batch's scores are kept for
        `self._selection.collect`.
        """
        total = torch.zeros((), device=self.machine.device)
        grad_norm: float | None = None
        answers: tuple[Reading, Reading, Reading] | None = None
        for micro_batch in range(1, self._micro_batches + 1):
            progress()
            if look and micro_batch == 1:
                self._selection.arm()
            loss = self._loss(next(data))
            self._selection.disarm()
            total += loss.detach() / self._micro_batches
            self.engine.backward(loss)
            if micro_batch == self._micro_batches:
                local = Reading(total)
                answers = self._mean_over_ranks(total), local, self._stop.ask(self.machine.device)
                self.checkpoints.before_update()
            grad_norm = take_step(self.engine)
        assert grad_norm is not None and answers, "DeepSpeed and this loop disagree about the end of a batch"
        loss_of_all, local, asked = answers
        return loss_of_all.item(), grad_norm, local.item(), name_of(asked)

    def _count_skipped(self, step: int, loss: float, local_loss: float, *, skipped: bool) -> None:
        """Report a step whose gradient was not finite, which was skipped; too many in a row end the run."""
        if not skipped:
            self._skipped = 0
            return
        self._skipped += 1
        bad: list[Any] = [None] * self.machine.world_size
        dist.all_gather_object(bad, not math.isfinite(local_loss))
        self._bad_ranks = ranks = [rank for rank, is_bad in enumerate(bad) if is_bad]
        where = f"the loss of rank {', '.join(map(str, ranks))} is not finite" if ranks else "every loss is finite"
        limit = self.config.max_skipped_steps
        if self.report:
            self.report.line(
                f"step {step}: skipped, its gradient is not finite ({where}); {self._skipped} in a row, limit {limit}"
            )
        if self._skipped <= limit:
            return
        self._finish_checkpoint()
        good = latest_step(self.config.save)
        resume = f"resume from {self.config.save} (step {good}) after you" if good is not None else "no checkpoint yet;"
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient is not finite in {self._skipped} steps in a row "
            f"(--max-skipped-steps {limit}); training stopped. {resume} {ADVICE}"
        )

    def _validate(self, step: int) -> None:
        self._watchdog.beat(f"the validation at step {step}")
        loss = self._validation_loss(self.config.eval_iters)
        if self.report and loss is not None:
            self.report.validation(step=step, loss=loss)

    @torch.no_grad()
    def _validation_loss(self, steps: int) -> float | None:
        """Mean over the first `steps` global batches of the validation data, None without such data."""
        if self._valid_set is None:
            return None
        self.engine.eval()
        total = torch.zeros((), device=self.machine.device)
        count = 0
        for batch in self._batches(self._valid_set, 0, steps):
            progress()
            total += self._loss(batch)
            count += 1
        progress()
        self.engine.train()
        return self._mean_over_ranks(total / count).item()

    def _save(self, step: int, *, skipped: bool, ends: bool) -> None:
        """Begin the checkpoint of `step`, unless it was skipped: what led there may be in the weights already.

        The next step that is not skipped takes it then. Where the run `ends`, the weights are saved after all if they
        are not the cause.
        """
        is_told, self._is_due = self._is_due, skipped and not ends
        suspicion = self._suspicion(step) if skipped and ends else "the next good step takes it"
        if skipped and suspicion:
            newest = f"; the newest is of step {self._saved}" if ends and self._saved else ""
            if self.report and (ends or not is_told):
                self.report.line(f"step {step}: no checkpoint after a skipped step: {suspicion}{newest}")
            return
        self._watchdog.beat(f"the checkpoint of step {step}")
        waited = self.checkpoints.save(step)
        self._saved = step
        if self.report:
            self.report.checkpoint(step=step, waited=waited)

    def _finish_checkpoint(self) -> None:
        self._watchdog.beat("writing the last checkpoint")
        self.checkpoints.finish()

    def _suspicion(self, step: int) -> str | None:
        """Why the weights may be the cause of a skipped step, None where its own data were.

        Those give a loss that is not finite, and the same weights a finite one on other data. Weights that have become
        huge give a finite loss behind the last norm, and infinite gradients.
        """
        if not self._bad_ranks:
            return "every loss was finite, the weights may be the cause"
        self._watchdog.beat(f"the validation after step {step} was skipped")
        loss = self._validation_loss(1)
        if loss is None:
            return "there is no validation data to tell whether the weights are the cause"
        return None if math.isfinite(loss) else f"the validation loss is {loss} too, the weights may be the cause"

    def _tell_news(self) -> None:
        for line in self.checkpoints.news():
            if self.report:
                self.report.line(line)
