# SPDX-License-Identifier: Apache-2.0
"""Layers under tensor and context parallelism: tokens/s, exposed communication, memory, bytes by collective.

    torchrun --nproc-per-node 4 examples/benchmark_scaling.py --tokens 32768 131072 --meshes 1x1 2x1 4x1 1x2 1x4 2x2

A mesh is TPxCP; ranks that it leaves over repeat the same work on their own, so that 1x1 is one GPU alone. One step is
forward and backward of `--layers` layers on one sequence; there is no optimizer and no data-parallel reduction. Dense
is megatron-core's layer with cuDNN's attention, tensor parallel only. Rows go to results.csv as they are measured.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.context_parallel.traffic import CollectiveTraffic
from sparsek_megatron.memory import use_tiled_mlp
from sparsek_megatron.specs import to_sparsek
from sparsek_megatron.training.launcher import order_launches

# Flags that every row repeats; mlp_tile_tokens is empty without tiles.
FLAGS = (
    "layers", "recompute", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "head_dim", "topk", "window",
    "stride", "cp_comm_type", "mlp_tile_tokens",
)  # fmt: skip
COLUMNS: tuple[str, ...] = (
    "side", "tp", "cp", "tokens", *FLAGS, "step_ms", "tokens_per_s", "tokens_per_s_per_gpu",
    "exposed_communication_ms", "transfer_ms", "scoring_ms", "peak_gib", "received_mib", "by_collective",
)  # fmt: skip


class DenseAttention(MegatronModule):
    """Causal dense core attention by cuDNN (by torch's choice on CPU): query [s, b, heads, d] -> [s, b, heads * d]."""

    def __init__(self, config: TransformerConfig, *_args: Any, **_unused: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_unused: Any
    ):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        backends = [SDPBackend.CUDNN_ATTENTION] if query.is_cuda else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[32_768, 131_072], help="tokens of the whole sequence"
    )
    parser.add_argument("--per-gpu", action="store_true", help="--tokens counts tokens per GPU: weak scaling")
    parser.add_argument("--meshes", nargs="+", default=["1x1"], metavar="TPxCP")
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
    return parser.parse_args()


def start() -> torch.device:
    """The process group of the launch, NCCL on GPUs and gloo on CPU."""
    order_launches(int(os.environ.get("WORLD_SIZE", "1")))
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    from sparsek_megatron.cpu import enable_cpu

    enable_cpu()
    dist.init_process_group("gloo")
    return torch.device("cpu")


def build(args: argparse.Namespace, side: str, tp: int, cp: int, device: torch.device) -> TransformerBlock:
    """The layers of one mesh, in bf16 on GPUs and fp32 on CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    recompute: dict[str, Any] = {}
    if args.recompute:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.heads,
        num_query_groups=args.kv_heads,
        kv_channels=args.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=tp > 1,
        cp_comm_type=args.cp_comm_type if cp > 1 else None,
        bf16=on_gpu,
        params_dtype=dtype,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        **recompute,
    )
    settings = SparseKConfig(topk=args.topk, window=args.window, stride=args.stride, overflow_warning=None)
    if side == "sparsek":
        spec = get_sparsek_layer_spec(config, sparsek=settings, transformer_impl="local")
    else:
        spec = to_sparsek(get_gpt_layer_local_spec(normalization="RMSNorm"), settings, local=True, dense=True)
        attention = spec.submodules.self_attention
        core: Any = ModuleSpec(module=DenseAttention)
        inner = dataclasses.replace(attention.submodules, core_attention=core)
        attention = dataclasses.replace(attention, submodules=inner)
        spec = dataclasses.replace(
            spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention)
        )
    block = TransformerBlock(config, spec, post_layer_norm=False).to(device)
    return block if args.mlp_tile_tokens is None else use_tiled_mlp(block, tile_tokens=args.mlp_tile_tokens)


def elapsed(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a step on this rank."""
    if device.type == "cpu":
        import time

        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def communication(step: Callable[[], None], device: torch.device) -> tuple[float | None, float | None]:
    """Milliseconds of one profiled step: (an NCCL kernel runs and no other, the collectives themselves).

    None on CPU, and for the second where the profiler did not see the same collectives on all ranks.

    A collective's kernel waits for the last rank to come. The shortest of all ranks' is the last one's, which waits
    for nobody: the sum of these is what the collectives take themselves.
    """
    if device.type == "cpu":
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    exposed = _covered(spans[True] + spans[False]) - _covered(spans[False])
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [end - start for start, end in sorted(spans[True])])
    if len({len(lengths) for lengths in every}) > 1:
        return exposed / 1e3, None
    return exposed / 1e3, sum(min(lengths) for lengths in zip(*every, strict=True)) / 1e3


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def measure(
    args: argparse.Namespace, side: str, tp: int, cp: int, tokens: int, device: torch.device
) -> dict[str, Any]:
    """One row: the slowest rank's times and the largest memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    block = build(args, side, tp, cp, device)
    local = tokens // cp
    x = torch.randn(
        local // tp, 1, args.hidden_size, device=device, dtype=block.config.params_dtype
    ).requires_grad_()
    gradient = torch.randn_like(x)
    rotary = RotaryEmbedding(args.head_dim, rotary_percent=1.0, use_cpu_initialization=device.type == "cpu")(
        tokens
    )
    rotary = rotary.to(device)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary).backward(gradient)

    def score() -> None:
        attention: Any = block.layers[0].self_attention
        attention.scores(x).sum().backward()

    for _ in range(args.warmup):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    milliseconds = elapsed(step, device, args.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    scoring = 0.0
    if side == "sparsek":
        score()
        scoring = elapsed(score, device, args.steps) * args.layers
    exposed, transfer = (None, None) if args.no_profile else communication(step, device)
    with CollectiveTraffic() as traffic:
        step()
    largest = torch.tensor([milliseconds, scoring, exposed or 0.0, peak], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    milliseconds, scoring, slowest, peak = largest.tolist()
    rate = tokens / milliseconds * 1e3
    by_collective = " ".join(f"{op}/{group}={size}" for (op, group), size in sorted(traffic.received.items()))
    return {
        "side": side,
        "tp": tp,
        "cp": cp,
        "tokens": tokens,
        **{name: getattr(args, name) for name in FLAGS},
        "step_ms": round(milliseconds, 2),
        "tokens_per_s": round(rate),
        "tokens_per_s_per_gpu": round(rate / (tp * cp)),
        "exposed_communication_ms": "not measured" if exposed is None else round(slowest, 2),
        "transfer_ms": "not measured" if transfer is None else round(transfer, 2),
        "scoring_ms": round(scoring, 3),
        "peak_gib": round(peak, 2),
        "received_mib": round(traffic.total / 2**20, 2),
        "by_collective": by_collective,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s per GPU against the length of the sequence, a line per mesh."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for mesh in sorted({(r["side"], r["tp"], r["cp"]) for r in rows}):
        line = [r for r in rows if (r["side"], r["tp"], r["cp"]) == mesh]
        label = f"{mesh[0]}, TP={mesh[1]} CP={mesh[2]}"
        axes.plot(
            [r["tokens"] for r in line], [r["tokens_per_s_per_gpu"] for r in line], marker="o", label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens in the sequence", ylabel="tokens / s / GPU")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    args = parse()
    device = start()
    meshes = [tuple(int(n) for n in mesh.split("x")) for mesh in args.meshes]
    world = dist.get_world_size()
    for tp, cp in meshes:
        if world % (tp * cp):
            raise SystemExit(
                f"--meshes {tp}x{cp}: {world} processes are no multiple of {tp * cp}; start more"
            )
    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for tp, cp in meshes:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
        for side in [s for s in args.sides if s == "sparsek" or cp == 1]:
            for tokens in args.tokens:
                whole = tokens * tp * cp if args.per_gpu else tokens
                try:
                    row = measure(args, side, tp, cp, whole, device)
                except torch.OutOfMemoryError:
                    row = {**dict.fromkeys(COLUMNS, ""), "side": side, "tp": tp, "cp": cp, "tokens": whole}
                    row |= {name: getattr(args, name) for name in FLAGS}
                    row["step_ms"] = "out of memory"
                if row["step_ms"] != "out of memory":
                    rows.append(row)
                if dist.get_rank() == 0:
                    print(" ".join(f"{name}={row[name]}" for name in COLUMNS), flush=True)
                    new = not (args.out / "results.csv").exists()
                    with (args.out / "results.csv").open("a", newline="") as file:
                        writer = csv.DictWriter(file, list(COLUMNS))
                        if new:
                            writer.writeheader()
                        writer.writerow(row)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0 and rows:
        plot(rows, args.out / "scaling.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
