# SPDX-License-Identifier: Apache-2.0
"""The flags of the training benchmark."""

from __future__ import annotations

from pathlib import Path

from sparsek_megatron.flags import FlagParser


def build_parser(description: str) -> FlagParser:
    """What to measure, then the model's settings, then how to measure it."""
    parser = FlagParser(description=description)
    parser.add_argument("--shape", nargs="+", default=["1.3b"], help="tiny, 1.3b, 3b, 8b")
    parser.add_argument(
        "--num-layers", type=int, nargs="+", metavar="N",
        help="layers in place of the shapes', where all do not fit: one number for all, or one for each shape",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 524288, 1048576])
    parser.add_argument("--arms", nargs="+", default=["dense", "window", "sparsek"])
    parser.add_argument("--trainers", nargs="+", default=["deepspeed"], help="deepspeed, mcore")
    parser.add_argument("--longest-dense", type=int, default=131072, help="longest context of the dense arm")
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, help="with sequence parallelism above 1"
    )
    parser.add_argument(
        "--context-parallel-size", type=int, default=1,
        help="of the sparsek arm; the others have none: those ranks shard their heads and MLPs instead",
    )  # fmt: skip
    parser.add_argument(
        "--async-tensor-parallel", action="store_true",
        help="tensor parallelism's collectives in pieces beside the matrix products",
    )  # fmt: skip

    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument(
        "--initial-slope",
        type=float,
        help="of the scores over all positions; default: a fall by 1 in topk tokens",
    )
    parser.add_argument("--recompute-granularity", choices=("full", "selective"), default=None)
    parser.add_argument("--recompute-num-layers", type=int, help="full recompute of the first layers alone")
    parser.add_argument(
        "--cpu-offloading-num-layers", type=int, default=0, metavar="N",
        help="keep the recompute checkpoints of the first N layers in pinned CPU memory",
    )  # fmt: skip
    parser.add_argument(
        "--recompute-inputs", type=int, default=0, metavar="N",
        help="of these layers, N keep no checkpoint: the layer before computes it again",
    )  # fmt: skip
    parser.add_argument("--mlp-tile-tokens", type=int, help="compute MLPs in tiles of this many tokens")
    parser.add_argument(
        "--no-fusions", action="store_true", help="without megatron-core's fused activation and residual"
    )
    parser.add_argument("--apply-rope-fusion", action="store_true", help="RoPE in one compiled kernel")
    parser.add_argument(
        "--whole-logits", action="store_true", help="Megatron's loss in place of the chunked one"
    )

    parser.add_argument(
        "--cuda-graph", action="store_true",
        help="forward and backward as one CUDA graph, with the optimizer outside (--trainers mcore)",
    )  # fmt: skip

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
    parser.add_argument(
        "--plot", type=Path, metavar="CSV",
        help="measure nothing: draw a training.csv (training.png beside it) without the rows marked as replaced",
    )  # fmt: skip
    return parser
