# SPDX-License-Identifier: Apache-2.0
"""Flags of the benchmark, and the cases that they ask for, checked before processes communicate."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from sparsek_kernels.attention.plan import HEAD_DIMS, MAX_GROUP

from sparsek_megatron import SparseKConfig
from sparsek_megatron.errors import UserError
from sparsek_megatron.flags import FlagParser


@dataclass(frozen=True)
class Case:
    """One row to measure. tokens: of the whole sequence."""

    side: str
    tp: int
    cp: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.side}, TP={self.tp} CP={self.cp}, {self.tokens:,} tokens"


def mesh(text: str) -> tuple[int, int]:
    """TPxCP as (tp, cp)."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: must be TPxCP, like 2x1, both at least 1")
    return int(found[1]), int(found[2])


def build_parser(description: str | None) -> FlagParser:
    parser = FlagParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[32_768, 131_072], help="tokens of the whole sequence"
    )
    parser.add_argument("--per-gpu", action="store_true", help="--tokens counts tokens per GPU: weak scaling")
    parser.add_argument("--meshes", type=mesh, nargs="+", default=[(1, 1)], metavar="TPxCP")
    parser.add_argument("--sides", nargs="+", default=["sparsek"], choices=("sparsek", "dense"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--ffn-hidden-size", type=int, default=14_336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--cp-comm-type", default="p2p", choices=("p2p", "a2a"))
    parser.add_argument("--recompute", action="store_true", help="keep only each layer's input")
    parser.add_argument(
        "--mlp-tile-tokens",
        type=int,
        metavar="N",
        help="compute MLPs in tiles of N tokens, where memory needs it",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument(
        "--no-profile", action="store_true", help="leave the profiled step, and the communication times, out"
    )
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    parser.add_argument(
        "--plot", type=Path, metavar="CSV", help="draw a results.csv into the .png beside it; measure nothing"
    )
    return parser


def sparsek_config(args: argparse.Namespace) -> SparseKConfig:
    """Settings of the sparse side."""
    return SparseKConfig(topk=args.topk, window=args.window, stride=args.stride, overflow_warning=None)


def cases(args: argparse.Namespace, *, world_size: int, on_gpu: bool) -> list[Case]:
    """Every case of a command line, mesh by mesh; dense has no context parallelism and is left out there.

    Raises UserError naming the flag, its value and the fix, for what any of the cases could not run with.
    """
    _check_ranges(args)
    _check_shape(args, on_gpu=on_gpu)
    found = []
    for tp, cp in args.meshes:
        _check_mesh(args, tp, cp, world_size)
        for side in args.sides:
            for tokens in args.tokens:
                case = Case(side, tp, cp, tokens * tp * cp if args.per_gpu else tokens)
                if side == "sparsek" or cp == 1:
                    _check_tokens(case, per_gpu=args.per_gpu)
                    found.append(case)
    if not found:
        raise UserError(
            "--sides dense: it has no context parallelism; add a mesh with CP = 1, like --meshes 2x1"
        )
    return found


def _check_ranges(args: argparse.Namespace) -> None:
    sizes = (
        "tokens", "layers", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "head_dim", "topk", "window",
        "stride", "steps", "mlp_tile_tokens",
    )  # fmt: skip
    for name, least in [*((size, 1) for size in sizes), ("warmup", 0)]:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    try:
        sparsek_config(args)
    except ValueError as err:
        raise UserError(f"--topk {args.topk}: {err}") from None


def _check_shape(args: argparse.Namespace, *, on_gpu: bool) -> None:
    if args.heads % args.kv_heads:
        raise UserError(f"--kv-heads {args.kv_heads}: must divide --heads {args.heads}")
    if on_gpu and args.head_dim not in HEAD_DIMS:
        raise UserError(f"--head-dim {args.head_dim}: the GPU kernels have {', '.join(map(str, HEAD_DIMS))}")
    if on_gpu and args.heads // args.kv_heads > MAX_GROUP:
        raise UserError(
            f"--kv-heads {args.kv_heads}: {args.heads // args.kv_heads} query heads share one; the GPU kernels have "
            f"at most {MAX_GROUP}"
        )
    if args.head_dim % 2:
        raise UserError(f"--head-dim {args.head_dim}: must be even for RoPE")


def _check_mesh(args: argparse.Namespace, tp: int, cp: int, world_size: int) -> None:
    where = f"--meshes {tp}x{cp}"
    if world_size % (tp * cp):
        raise UserError(f"{where}: {world_size} processes are no multiple of {tp * cp}; start more")
    for flag, value in (("--kv-heads", args.kv_heads), ("--ffn-hidden-size", args.ffn_hidden_size)):
        if value % tp:
            raise UserError(f"{where}: {flag} {value} does not divide by TP = {tp}")
    heads = args.kv_heads // tp
    if cp > 1 and args.cp_comm_type == "a2a" and heads % cp and "sparsek" in args.sides:
        raise UserError(
            f"{where} --cp-comm-type a2a: the {heads} KV heads of a tensor-parallel rank do not divide by CP = {cp}; "
            "use p2p"
        )


def _check_tokens(case: Case, *, per_gpu: bool) -> None:
    """Two chunks a context-parallel rank, and equal shards of its tokens for tensor-parallel ranks."""
    unit = math.lcm(2 * case.cp if case.cp > 1 else 1, case.tp * case.cp)
    if case.tokens % unit:
        given = f" ({case.tp * case.cp} times those of one GPU)" if per_gpu else ""
        raise UserError(
            f"--tokens {case.tokens}{given}: --meshes {case.tp}x{case.cp} needs a multiple of {unit}"
        )
