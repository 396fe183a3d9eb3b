# SPDX-License-Identifier: Apache-2.0
"""Run the cases of one command line on this rank."""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from typing import Any

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from training_benchmark import cases, ranks
from training_benchmark.arms import attended_pairs
from training_benchmark.cases import Case
from training_benchmark.graph import prepare_captures
from training_benchmark.model import build, device_batch, read_tokens
from training_benchmark.plot import plot
from training_benchmark.row import Row, compare_with_dense, line, reject_without_loss
from training_benchmark.table import attention_settings, origin, write_csv
from training_benchmark.trace import places_of_waits, profile_step
from training_benchmark.trainers import build_trainer

from sparsek_megatron.errors import UserError, describe_memory_error
from sparsek_megatron.files import require_writable_folder
from sparsek_megatron.training import parallel
from sparsek_megatron.training.flops import peak_tflops
from sparsek_megatron.training.launcher import world_size_of_environment


def timed_steps(
    trainer: Any, batch: tuple[torch.Tensor, torch.Tensor], count: int
) -> tuple[float, torch.Tensor]:
    """(seconds of one step, last loss): the clock covers `count` steps, so that work queued ahead counts once."""
    _wait()
    began = time.perf_counter()
    loss = None
    for _ in range(count):
        loss = trainer.step(*batch)
    _wait()
    assert loss is not None
    return (time.perf_counter() - began) / count, loss


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _release() -> None:
    """Give back what a finished case held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Benchmark:
    """Every case of one command line, on this rank.

    Raises:
        UserError: for a flag that cannot be followed, before any process group or model exists.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        on_gpu = torch.cuda.is_available()
        cases.check(args, world_size_of_environment(), on_gpu=on_gpu)
        self.args = args
        self.planned = cases.planned(args)
        self.sparsek, self.options = cases.sparsek_config(args), cases.options(args)
        self.stream, self.source = read_tokens(args.data_path, max(args.tokens) + 1)
        if int(self.stream.max()) >= args.vocab_size:
            raise UserError(
                f"--vocab-size {args.vocab_size}: the data has token id {int(self.stream.max())}; "
                f"use at least {int(self.stream.max()) + 1}"
            )
        require_writable_folder(args.out, "--out")
        if args.trace:
            require_writable_folder(args.trace, "--trace")
        self.device_name = torch.cuda.get_device_name() if on_gpu else "CPU"
        self.peak = args.peak_tflops if args.peak_tflops is not None else peak_tflops(self.device_name)
        self.rows: list[Row] = []
        self.table = args.out / "training.csv"
        self.title = ""

    def run(self) -> None:
        """All cases; each is printed and written as it ends."""
        layout = shape = None
        for model, group in itertools.groupby(self.planned, key=lambda case: case.model):
            own = list(group)
            if shape != model[0]:
                shape = model[0]
                torch.compiler.reset()  # else another shape's widths become variables of slower compiled kernels
            if layout != cases.layout(self.args, own[0].arm):
                if layout is not None:
                    parallel.shutdown()
                layout = cases.layout(self.args, own[0].arm)
                self.start(own[-1])
            self.run_model(own)
            _release()
        if self.first:
            plot(self.table, self.table.with_suffix(".png"), "--out")
        parallel.shutdown()

    def start(self, case: Case) -> None:
        """The process groups of a case's layout; the title is printed with the first."""
        args = self.args
        config = cases.configuration(args, case, self.sparsek)
        self.machine = parallel.initialize(config)
        if self.options.cuda_graph and self.machine.on_gpu:
            prepare_captures(config.seed)
        self.origin = origin(self.device_name)
        self.first = self.machine.is_first
        if self.first and not self.title:
            self.title = (
                f"{self.machine.world_size} x {self.device_name}, torch {torch.__version__}, topk {args.topk}, "
                f"window {args.window}, stride {args.stride}, {self.source}"
            )
            print(self.title, flush=True)

    def run_model(self, own: list[Case]) -> None:
        """One model through its contexts, shortest first, until one does not fit or has no loss."""
        trainer = model = None
        config = cases.configuration(self.args, own[-1], self.sparsek)
        for case in own:
            row = self.new_row(case)
            try:
                if trainer is None:
                    torch.manual_seed(config.seed)
                    model_parallel_cuda_manual_seed(config.seed)  # what the models before have drawn from
                    model = build(
                        case.arm, config, self.sparsek, vocabulary=self.args.vocab_size, machine=self.machine,
                        options=self.options,
                    )  # fmt: skip
                    trainer = build_trainer(case.trainer, config, model, self.machine)
                self.measure(row, case, trainer, model)
                row = ranks.agree(row, self.machine)
                reject_without_loss(row)
            except torch.cuda.OutOfMemoryError as error:
                said = describe_memory_error(error)
                print(f"{case}: rank {self.machine.rank}: {said}", file=sys.stderr, flush=True)
                if self.machine.world_size > 1:
                    ranks.end_launch(self.machine, lambda case=case, row=row: self.tell_the_end(case, row))
                row.error = "out of memory"
            except RuntimeError:
                ranks.leave_if_ended(self.machine)
                raise
            self.rows.append(row)
            if self.first:
                self.report()
            ranks.wait_for_all(self.machine)  # whoever ends the launch later finds the table written
            if row.error:
                break
            _release()
        if trainer is not None:
            trainer.close()

    def new_row(self, case: Case) -> Row:
        """What is known of a case before its measurement."""
        tp, cp = cases.layout(self.args, case.arm)
        return Row(
            shape=case.shape_name, layers=case.shape.num_layers, tokens=case.tokens, arm=case.arm,
            trainer=case.trainer, gpus=self.machine.world_size, tp=tp, cp=cp, options=str(self.options),
            **attention_settings(case.arm, self.sparsek), **self.origin,
        )  # fmt: skip

    def report(self) -> None:
        """Print the last row and write all."""
        for row in self.rows:
            compare_with_dense(row, self.rows)
        last = self.rows[-1]
        print(line(last), flush=True)
        for part, kernels in (last.split.slowest if last.split and self.args.slowest else {}).items():
            for name, milliseconds in kernels.most_common(self.args.slowest):
                print(f"      {part:<13} {milliseconds:9.2f} ms  {name[:160]}", flush=True)
        write_csv(self.rows, self.table)

    def tell_the_end(self, case: Case, row: Row) -> None:
        """One rank of several has no memory left: its row, and the cases that do not run any more."""
        row.error = f"out of memory on rank {self.machine.rank}"
        self.rows.append(row)
        self.report()
        rest = self.planned[self.planned.index(case) + 1 :]
        left_out = ", ".join(str(each) for each in rest if each.model != case.model)
        print(
            f"error: {case}: {row.error} of {self.machine.world_size}, which ends the others too; "
            + (f"not run: {left_out}; run them without this case" if left_out else "no other case was left"),
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def measure(self, row: Row, case: Case, trainer: Any, model: Any) -> None:
        """Fill a row: untimed steps, timed ones and one under the profiler, both replays with --cuda-graph."""
        args, machine = self.args, self.machine
        batch = device_batch(self.stream, row.tokens, machine.device)
        seconds, loss = timed_steps(trainer, batch, args.warmup)
        if self.first and seconds > 10:
            print(f"{row.tokens} tokens, {row.arm}: warming up took {seconds:.1f} s a step", flush=True)
        if self.options.cuda_graph:
            trainer.gradients.capture(*batch)
        if machine.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if args.steps:
            seconds, loss = timed_steps(trainer, batch, args.steps)
        if machine.on_gpu and not args.no_profile:
            keep = None
            if args.trace and self.first:
                keep = args.trace / f"{row.shape}_{row.tokens}_{row.arm}_{row.trainer}.json"
            row.split = profile_step(
                lambda: trainer.step(*batch), model, keep, by_part=not self.options.cuda_graph
            )
            seconds = seconds if args.steps else row.split.step_ms / 1e3
        sequences = machine.world_size // (row.tp * row.cp)
        flops = case.shape.step_flops(
            tokens=row.tokens,
            vocabulary=args.vocab_size,
            pairs=attended_pairs(row.arm, row.tokens, self.sparsek),
        )
        row.step_ms, row.loss = 1e3 * seconds, float(loss)
        row.tokens_per_second = sequences * row.tokens / seconds
        row.model_tflops = sequences * flops / seconds / machine.world_size / 1e12
        row.mfu = row.model_tflops / self.peak if self.peak else None
        if machine.on_gpu:
            kept = trainer.gradients.pool_bytes if self.options.cuda_graph else 0
            row.peak_gib = (torch.cuda.max_memory_allocated() + kept) / 2**30
        if args.waits and machine.on_gpu:
            places = places_of_waits(lambda: trainer.step(*batch))  # every rank takes the step
            for place, count in places.most_common() if self.first else ():
                print(f"      wait x{count}: {place}", flush=True)
        if self.options.cuda_graph:
            trainer.gradients.release()
