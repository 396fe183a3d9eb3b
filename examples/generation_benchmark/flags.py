# SPDX-License-Identifier: Apache-2.0
"""The flags of the generation benchmark."""

import argparse

import torch

from sparsek_megatron.errors import UserError


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """Flags with their defaults. Raises UserError where there is no GPU to measure on."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": int, "nargs": "+"}
    parser.add_argument("--contexts", default=[2**i for i in range(12, 21)], **numbers)
    parser.add_argument("--batch-sizes", default=[1, 32], **numbers)
    parser.add_argument("--prefill-lengths", default=[2**i for i in range(15, 21)], **numbers)
    parser.add_argument("--prefill-piece", type=int, default=32_768, help="tokens of one prefill call")
    parser.add_argument(
        "--prefill-layers", type=int, default=8, help="layers that each piece goes through; times are those of one"
    )
    for name, value in (("layers", 32), ("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("topk", 512), ("window", 512), ("stride", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--short", action="store_true", help="contexts 4k, 128k and 1M; prefill 32k, 256k and 1M"
    )
    parser.add_argument("--no-dense", action="store_true", help="leave the dense side out")
    parser.add_argument("--from-csv", help="measure nothing: plot this file")
    parser.add_argument("--no-plot", action="store_true", help="write the CSV file only")
    parser.add_argument("--output", required=True, help="path of the results without .csv and .png")
    args = parser.parse_args(argv)
    if args.short:
        args.contexts, args.prefill_lengths = [4096, 131_072, 1_048_576], [32_768, 262_144, 1_048_576]
    if args.from_csv is None and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device: this benchmark times GPU kernels; --from-csv FILE plots a file of results"
        )
    return args
