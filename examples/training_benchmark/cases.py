# SPDX-License-Identifier: Apache-2.0
"""The cases that a command line asks for, and every reason not to start them."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from training_benchmark.arms import ARMS, FLEX_ELEMENTS
from training_benchmark.model import Options, training_config
from training_benchmark.shapes import SHAPES, Shape
from training_benchmark.trainers import TRAINERS

from sparsek_megatron import SparseKConfig
from sparsek_megatron.config import MAX_POOL
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.validate import check_parallelism, check_ranges


@dataclass(frozen=True)
class Case:
    """One row to be. `shape` has the layers that were asked for."""

    shape_name: str
    shape: Shape
    trainer: str
    arm: str
    tokens: int

    @property
    def model(self) -> tuple[str, Shape, str, str]:
        """Equal for cases that the same built model takes."""
        return self.shape_name, self.shape, self.trainer, self.arm

    def __str__(self) -> str:
        return f"{self.shape_name} x{self.shape.num_layers} {self.tokens} {self.arm} {self.trainer}"


def planned(args: argparse.Namespace) -> list[Case]:
    """All cases in the order of their run: those of one model together, short contexts first."""
    cases = []
    for index, name in enumerate(args.shape):
        layers = None if args.num_layers is None else args.num_layers[index % len(args.num_layers)]
        for trainer in args.trainers:
            for arm in args.arms:
                for tokens in sorted(set(args.tokens)):
                    if arm != "dense" or tokens <= args.longest_dense:
                        cases.append(Case(name, SHAPES[name].with_layers(layers), trainer, arm, tokens))
    return cases


def layout(args: argparse.Namespace, arm: str) -> tuple[int, int]:
    """(tensor, context) parallel sizes of an arm."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    return (tp, cp) if arm == "sparsek" else (tp * cp, 1)


def options(args: argparse.Namespace) -> Options:
    """What is switched in every case."""
    return Options(
        recompute=args.recompute_granularity, recompute_layers=args.recompute_num_layers,
        fusions=not args.no_fusions, apply_rope_fusion=args.apply_rope_fusion, chunked_loss=not args.whole_logits,
        cpu_offloading_num_layers=args.cpu_offloading_num_layers, recompute_inputs=args.recompute_inputs,
        mlp_tile_tokens=args.mlp_tile_tokens, async_tensor_parallel=args.async_tensor_parallel,
        cuda_graph=args.cuda_graph,
    )  # fmt: skip


def configuration(args: argparse.Namespace, case: Case, sparsek: SparseKConfig) -> TrainingConfig:
    """The trainer's settings of a case."""
    return training_config(
        case.shape, sparsek, tokens=case.tokens, layout=layout(args, case.arm), options=options(args)
    )


def sparsek_config(args: argparse.Namespace) -> SparseKConfig:
    """The attention's settings.

    Raises:
        UserError: naming the flag of one that is out of range.
    """
    if args.topk > MAX_POOL // 4:
        raise UserError(
            f"--topk {args.topk}: must be at most {MAX_POOL // 4}; a quarter of the pool, exact to {MAX_POOL}"
        )
    try:
        return SparseKConfig(
            topk=args.topk, window=args.window, stride=args.stride, initial_slope=args.initial_slope,
            overflow_warning=None, reference_length=max(args.tokens),
        )  # fmt: skip
    except ValueError as err:
        field, _, problem = str(err).partition("=")  # it says field=value: what is wrong
        raise UserError(f"--{field.replace('_', '-')} {problem}") from None


def check(args: argparse.Namespace, world_size: int, *, on_gpu: bool) -> None:
    """Everything that can be known before a process group or a model exists.

    Raises:
        UserError: naming the flag, its value and the fix.
    """
    _check_names(args)
    _check_recompute(args)
    _check_cuda_graph(args, on_gpu=on_gpu)
    if "mcore" in args.trainers and not on_gpu:
        raise UserError("--trainers mcore: megatron-core's distributed optimizer needs a GPU; use deepspeed")
    if args.async_tensor_parallel and args.tensor_model_parallel_size == 1:
        raise UserError(
            "--async-tensor-parallel with --tensor-model-parallel-size 1: there is nothing to overlap; use a size "
            "above 1, or leave it out"
        )
    _check_numbers(args, measures=args.steps > 0 or (on_gpu and not args.no_profile))
    cases = planned(args)
    if not cases:
        raise UserError(
            f"--longest-dense {args.longest_dense}: leaves no case, for --arms has dense alone and its shortest "
            f"--tokens is {min(args.tokens)}; raise it or add an arm"
        )
    _check_window(args, cases, on_gpu=on_gpu)
    sparsek = sparsek_config(args)
    for case in cases:
        config = dataclasses.replace(configuration(args, case, sparsek), peak_tflops=args.peak_tflops)
        try:
            check_ranges(config)
            check_parallelism(config, world_size)
        except UserError as err:
            raise UserError(_in_these_flags(str(err), args, case)) from None
        if args.vocab_size % config.tensor_model_parallel_size:
            raise UserError(
                f"--vocab-size {args.vocab_size}: not divisible by {config.tensor_model_parallel_size} "
                f"tensor-parallel ranks of the {case.arm} arm"
            )


def _check_window(args: argparse.Namespace, cases: list[Case], *, on_gpu: bool) -> None:
    """What flex_attention can do: its offsets are int32."""
    for case in cases:
        elements = case.tokens * case.shape.num_attention_heads * case.shape.kv_channels
        if case.arm == "window" and elements > FLEX_ELEMENTS * layout(args, case.arm)[0]:
            raise UserError(
                f"--tokens {case.tokens}: the window arm's flex_attention addresses 2^31 elements of a rank's queries, "
                f"and shape {case.shape_name} has {elements} in all; use more --tensor-model-parallel-size or leave "
                "window out of --arms"
            )
    if "window" in args.arms and not on_gpu:
        raise UserError("--arms window: flex_attention's backward needs a GPU; use --arms dense sparsek")


def _check_names(args: argparse.Namespace) -> None:
    known: tuple[tuple[str, list[str], Any], ...] = (
        ("--shape", args.shape, SHAPES), ("--arms", args.arms, ARMS), ("--trainers", args.trainers, TRAINERS),
    )  # fmt: skip
    for flag, given, names in known:
        for name in given:
            if name not in names:
                raise UserError(f"{flag} {name}: must be among {', '.join(names)}")
    if args.num_layers and len(args.num_layers) not in (1, len(args.shape)):
        raise UserError(
            f"--num-layers: {len(args.num_layers)} numbers for {len(args.shape)} shapes; give one, or one each"
        )


def _check_numbers(args: argparse.Namespace, *, measures: bool) -> None:
    """Numbers of which a training run's settings know nothing. `measures`: whether any step would be timed."""
    if not measures and args.steps == 0:
        raise UserError(
            "--steps 0: must be at least 1 without a profiled step (on CPU, or with --no-profile)"
        )
    least = {
        "steps": 0, "warmup": 1, "vocab_size": 1, "tensor_model_parallel_size": 1, "context_parallel_size": 1,
        "slowest": 0,
    }  # fmt: skip
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {smallest}")
    if min(args.tokens) < 1:
        raise UserError(f"--tokens {min(args.tokens)}: must be at least 1")


def _check_recompute(args: argparse.Namespace) -> None:
    """Layers to recompute without full recompute: `TrainingConfig` has 1 where none were given, and cannot tell."""
    count, granularity = args.recompute_num_layers, args.recompute_granularity
    if count is not None and granularity != "full":
        given = (
            f"with --recompute-granularity {granularity}"
            if granularity
            else "without --recompute-granularity"
        )
        raise UserError(
            f"--recompute-num-layers {count}: has no effect {given}; add --recompute-granularity full or leave it out"
        )


def _check_cuda_graph(args: argparse.Namespace, *, on_gpu: bool) -> None:
    if args.cuda_graph and "deepspeed" in args.trainers:
        raise UserError(
            "--cuda-graph: --trainers deepspeed decides in hooks on the host, which a replay leaves out; use mcore"
        )
    if args.cuda_graph and not on_gpu:
        raise UserError("--cuda-graph: needs a GPU; leave it out")


def _in_these_flags(message: str, args: argparse.Namespace, case: Case) -> str:
    """What a training run's check says, in the words of this program."""
    message = message.replace("--seq-length", "--tokens").replace(
        "--sequence-parallel", "sequence parallelism"
    )
    if layout(args, case.arm)[1] != args.context_parallel_size:
        product = "--tensor-model-parallel-size x --context-parallel-size"
        message = message.replace("--tensor-model-parallel-size", product)
    for field in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        flag = f"--{field.replace('_', '-')}"
        if message.startswith(flag):
            size = message.removeprefix(flag)
            return f"--shape {case.shape_name}: its {field}{size} in the {case.arm} arm; use fewer ranks"
    return message
