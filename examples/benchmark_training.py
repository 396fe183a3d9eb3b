#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Full training steps (forward, backward, optimizer) with dense, sliding-window and SparseK attention in one run.

    python examples/benchmark_training.py --shape 1.3b --num-layers 4 --tokens 32768 131072
    torchrun --nproc-per-node 4 examples/benchmark_training.py --shape 8b --tensor-model-parallel-size 4 --tokens 131072

Random weights, real tokens, one sequence a step on each data-parallel rank. Each case takes `--warmup` steps, then
`--steps` timed ones, then one under the profiler, which gives each kernel to a part of the step. An arm that
runs out of memory says so and skips longer contexts. Writes training.csv and training.png into --out.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

from sparsek_megatron.errors import UserError, report_user_errors
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.quiet import quiet_dependencies
from sparsek_megatron.training.launcher import order_launches


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["1.3b"], help="tiny, 1.3b, 3b, 8b")
    parser.add_argument(
        "--num-layers", type=int, nargs="+", metavar="N",
        help="layers in place of the shapes', where all do not fit: one number for all, or one for each shape",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 524288, 1048576])
    parser.add_argument("--arms", nargs="+", default=["dense", "window", "sparsek"])
    parser.add_argument("--trainers", nargs="+", default=["deepspeed"], help="deepspeed, mcore")
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, help="with sequence parallelism above 1"
    )
    parser.add_argument(
        "--context-parallel-size", type=int, default=1,
        help="of the sparsek arm; the others have none: those ranks shard their heads and MLPs instead",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--recompute-granularity", choices=("full", "selective"), default=None)
    parser.add_argument("--recompute-num-layers", type=int, help="full recompute of the first layers alone")
    parser.add_argument(
        "--cpu-offloading-num-layers", type=int, default=0, metavar="N",
        help="keep the recompute checkpoints of the first N layers in pinned CPU memory",
    )  # fmt: skip
    parser.add_argument("--mlp-tile-tokens", type=int, help="compute MLPs in tiles of this many tokens")
    parser.add_argument(
        "--no-fusions", action="store_true", help="without megatron-core's fused activation and residual"
    )
    parser.add_argument("--apply-rope-fusion", action="store_true", help="RoPE in one compiled kernel")
    parser.add_argument(
        "--whole-logits", action="store_true", help="Megatron's loss in place of the chunked one"
    )
    parser.add_argument("--longest-dense", type=int, default=131072, help="longest context of the dense arm")
    parser.add_argument("--data-path", help="IndexedDataset prefix; default: bytes of Python's source")
    parser.add_argument("--peak-tflops", type=float, help="peak of one GPU, where the device is not known")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps; 0 takes the step time from the profiled one"
    )
    parser.add_argument("--no-profile", action="store_true", help="leave the profiled step out")
    parser.add_argument(
        "--slowest", type=int, default=0, metavar="N", help="print the N longest kernels of each part"
    )
    parser.add_argument(
        "--waits", action="store_true", help="print the lines of a step at which the host waits"
    )
    parser.add_argument("--trace", type=Path, help="keep the profiler's traces in this folder")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


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


def release() -> None:
    """Give back what a finished case held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Benchmark:
    """Every case of one command line, on this rank."""

    def __init__(self, args: argparse.Namespace) -> None:
        from training_benchmark.arms import ARMS
        from training_benchmark.model import Options, read_tokens
        from training_benchmark.shapes import SHAPES
        from training_benchmark.trainers import TRAINERS

        from sparsek_megatron import SparseKConfig
        from sparsek_megatron.training.flops import peak_tflops

        self.args = args
        known: tuple[tuple[str, list[str], Any], ...] = (
            ("--shape", args.shape, SHAPES), ("--arms", args.arms, ARMS), ("--trainers", args.trainers, TRAINERS),
        )  # fmt: skip
        for flag, given, names in known:
            for name in given:
                if name not in names:
                    raise UserError(f"{flag} {name}: must be among {', '.join(names)}")
        profiles = torch.cuda.is_available() and not args.no_profile
        least = {
            "steps": int(not profiles), "warmup": 1, "vocab_size": 1, "tensor_model_parallel_size": 1,
            "context_parallel_size": 1,
        }  # fmt: skip
        for flag, smallest in least.items():
            if getattr(args, flag) < smallest:
                raise UserError(
                    f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {smallest}"
                )
        if args.num_layers and len(args.num_layers) not in (1, len(args.shape)):
            raise UserError(f"--num-layers: {len(args.num_layers)} numbers for {len(args.shape)} shapes")
        tp = max(self.layout(arm)[0] for arm in args.arms)
        if args.vocab_size % tp:
            raise UserError(f"--vocab-size {args.vocab_size}: not divisible by {tp} tensor-parallel ranks")
        self.sparsek = SparseKConfig(
            topk=args.topk, window=args.window, stride=args.stride, overflow_warning=None,
            reference_length=max(args.tokens),
        )  # fmt: skip
        self.options = Options(
            recompute=args.recompute_granularity,
            recompute_layers=args.recompute_num_layers, fusions=not args.no_fusions,
            apply_rope_fusion=args.apply_rope_fusion, chunked_loss=not args.whole_logits,
            cpu_offloading_num_layers=args.cpu_offloading_num_layers, mlp_tile_tokens=args.mlp_tile_tokens,
        )  # fmt: skip
        self.stream, self.source = read_tokens(args.data_path, max(args.tokens) + 1)
        if int(self.stream.max()) >= args.vocab_size:
            raise UserError(f"--vocab-size {args.vocab_size}: the data has token id {int(self.stream.max())}")
        if "window" in args.arms and not torch.cuda.is_available():
            raise UserError("--arms window: flex_attention's backward needs a GPU; use --arms dense sparsek")
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self.device_name, self.peak = name, args.peak_tflops or peak_tflops(name)
        self.rows: list[Any] = []
        self.title = ""

    def layout(self, arm: str) -> tuple[int, int]:
        """(tensor, context) parallel sizes of an arm."""
        tp, cp = self.args.tensor_model_parallel_size, self.args.context_parallel_size
        return (tp, cp) if arm == "sparsek" else (tp * cp, 1)

    def configuration(self, shape: Any, layout: tuple[int, int]) -> Any:
        """The trainer's settings of a shape."""
        from training_benchmark.model import training_config

        longest = max(self.args.tokens)
        return training_config(shape, self.sparsek, tokens=longest, layout=layout, options=self.options)

    def run(self) -> None:
        """All cases; prints each as it ends."""
        from training_benchmark.report import plot
        from training_benchmark.shapes import SHAPES

        from sparsek_megatron.training import parallel

        args = self.args
        layout = None
        for index, name in enumerate(args.shape):
            torch.compiler.reset()  # else another shape's widths become variables of slower compiled kernels
            layers = args.num_layers and args.num_layers[index % len(args.num_layers)]
            for trainer in args.trainers:
                for arm in args.arms:
                    if layout != self.layout(arm):
                        if layout is not None:
                            parallel.shutdown()
                        layout = self.layout(arm)
                        self.start(SHAPES[name], layout)
                    self.run_arm(name, SHAPES[name].with_layers(layers), arm, trainer)
                    release()
        if self.first:
            plot(self.rows, args.out / "training.png", self.title)
        parallel.shutdown()

    def start(self, shape: Any, layout: tuple[int, int]) -> None:
        """The process groups of a layout; the title is printed with the first."""
        from sparsek_megatron.training import parallel

        args = self.args
        self.machine = parallel.initialize(self.configuration(shape, layout))
        self.first = self.machine.is_first
        if self.first and not self.title:
            self.title = (
                f"{self.machine.world_size} x {self.device_name}, torch {torch.__version__}, topk {args.topk}, "
                f"window {args.window}, stride {args.stride}, {self.source}"
            )
            print(self.title, flush=True)
            args.out.mkdir(parents=True, exist_ok=True)

    def run_arm(self, shape_name: str, shape: Any, arm: str, trainer_name: str) -> None:
        """One model through every context, shortest first, until one does not fit."""
        from training_benchmark.model import build
        from training_benchmark.report import Row, compare_with_dense, line, write_csv
        from training_benchmark.trainers import build_trainer

        args = self.args
        tp, cp = self.layout(arm)
        config = self.configuration(shape, (tp, cp))
        contexts = [n for n in sorted(args.tokens) if arm != "dense" or n <= args.longest_dense]
        trainer = model = None
        for tokens in contexts:
            row = Row(
                shape=shape_name, layers=shape.num_layers, tokens=tokens, arm=arm, trainer=trainer_name,
                gpus=self.machine.world_size, tp=tp, cp=cp, options=str(self.options),
            )  # fmt: skip
            self.rows.append(row)
            try:
                if trainer is None:
                    torch.manual_seed(1234)
                    model = build(
                        arm, config, self.sparsek, vocabulary=args.vocab_size, machine=self.machine,
                        options=self.options,
                    )  # fmt: skip
                    trainer = build_trainer(trainer_name, config, model, self.machine)
                self.measure(row, shape, trainer, model)
            except torch.cuda.OutOfMemoryError:
                row.error = "out of memory"
            compare_with_dense(row, self.rows)
            if self.first:
                print(line(row), flush=True)
                self.print_slowest(row)
                write_csv(self.rows, args.out / "training.csv")
            if row.error:
                break
            release()

    def measure(self, row: Any, shape: Any, trainer: Any, model: Any) -> None:
        from training_benchmark.arms import attended_pairs
        from training_benchmark.model import device_batch
        from training_benchmark.trace import places_of_waits, profile_step

        args, machine = self.args, self.machine
        batch = device_batch(self.stream, row.tokens, machine.device)
        seconds, loss = timed_steps(trainer, batch, args.warmup)
        if self.first and seconds > 10:
            print(f"{row.tokens} tokens, {row.arm}: warming up took {seconds:.1f} s a step", flush=True)
        if machine.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if args.steps:
            seconds, loss = timed_steps(trainer, batch, args.steps)
        if machine.on_gpu and not args.no_profile:
            keep = None
            if args.trace and self.first:
                args.trace.mkdir(parents=True, exist_ok=True)
                keep = args.trace / f"{row.shape}_{row.tokens}_{row.arm}_{row.trainer}.json"
            row.split = profile_step(lambda: trainer.step(*batch), model, keep)
            seconds = seconds if args.steps else row.split.step_ms / 1e3
        sequences = machine.world_size // (row.tp * row.cp)
        flops = shape.step_flops(
            tokens=row.tokens,
            vocabulary=args.vocab_size,
            pairs=attended_pairs(row.arm, row.tokens, self.sparsek),
        )
        row.step_ms, row.loss = 1e3 * seconds, float(loss)
        row.tokens_per_second = sequences * row.tokens / seconds
        row.model_tflops = sequences * flops / seconds / machine.world_size / 1e12
        row.mfu = row.model_tflops / self.peak if self.peak else None
        if machine.on_gpu:
            row.peak_gib = torch.cuda.max_memory_allocated() / 2**30

        if args.waits and machine.on_gpu:
            places = places_of_waits(lambda: trainer.step(*batch))  # every rank takes the step
            for place, count in places.most_common() if self.first else ():
                print(f"      wait x{count}: {place}", flush=True)

    def print_slowest(self, row: Any) -> None:
        for part, kernels in (row.split.slowest if row.split and self.args.slowest else {}).items():
            for name, milliseconds in kernels.most_common(self.args.slowest):
                print(f"      {part:<13} {milliseconds:9.2f} ms  {name[:160]}", flush=True)


if __name__ == "__main__":
    quiet_dependencies()
    with report_user_errors():
        arguments = build_parser().parse_args()
        order_launches(arguments.tensor_model_parallel_size * arguments.context_parallel_size)
        Benchmark(arguments).run()
