# SPDX-License-Identifier: Apache-2.0
"""SparseK attention beside its alternatives: same inputs, same machine, one run.

    python kernels/benchmarks/attention.py --out results      # needs CUDA; --lengths, --heads, ... change the case

Each side gets fresh random inputs of its own layout; times are medians over repeated calls after warm-up, in
milliseconds. `sparsek` includes selection and the score gradient; the column "select" is selection alone. The dense
sides repeat key and value heads where they cannot group them, outside the timed region. A side that cannot run a case
is listed with its reason. Useful TFLOP/s counts 4 d FLOPs per attended (query, key) pair and head in the forward pass
and 2.5 times that in the backward pass, whatever a kernel recomputes or masks.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from sparsek_kernels import select, sparsek_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    """One measured shape: batch 1, `heads` query heads on `kv_heads`, head dimension `dim`."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    topk: int
    window: int
    stride: int
    dtype: torch.dtype

    def inputs(self, repeat_kv: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kv_heads = self.heads if repeat_kv else self.kv_heads
        q, k, v = (
            torch.randn(1, self.tokens, h, self.dim, device="cuda", dtype=self.dtype).requires_grad_()
            for h in (self.heads, kv_heads, kv_heads)
        )
        return q, k, v

    def scores(self) -> torch.Tensor:
        return torch.randn(1, self.tokens, self.kv_heads, device="cuda").requires_grad_()

    def forward_flops(self, pairs: float) -> float:
        return 4.0 * self.dim * self.heads * pairs

    @property
    def dense_pairs(self) -> float:
        return self.tokens * (self.tokens + 1) / 2

    def window_pairs(self, width: int) -> float:
        width = min(width, self.tokens)
        return width * (width + 1) / 2 + (self.tokens - width) * width


Side = tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...], float]  # forward, leaves, attended pairs


def sparsek_side(case: Case) -> Side:
    leaves = (*case.inputs(), case.scores())
    options = {"topk": case.topk, "window": case.window, "stride": case.stride}
    pairs = case.window_pairs(case.topk + case.window)
    return lambda: sparsek_attention(*leaves, **options), leaves, pairs


def sdpa_side(backend: SDPBackend) -> Callable[[Case], Side]:
    def make(case: Case) -> Side:
        leaves = case.inputs(repeat_kv=True)
        q, k, v = (x.transpose(1, 2) for x in leaves)

        def forward() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        return forward, leaves, case.dense_pairs

    return make


def flex_side(equivalent: bool) -> Callable[[Case], Side]:
    """flex_attention: the contiguous window of our budget, or our own mask `j <= i < evict[j]` as a block mask."""

    def make(case: Case) -> Side:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        leaves = case.inputs()
        q, k, v = (x.transpose(1, 2) for x in leaves)
        width, group = case.topk + case.window, case.heads // case.kv_heads
        if equivalent:
            scores = case.scores().detach()
            evict = select(scores, topk=case.topk, window=case.window, stride=case.stride).evict[0]

            def mask(b, h, i, j):
                return (j <= i) & (i < evict[h // group, j])
        else:

            def mask(b, h, i, j):
                return (j <= i) & (i - j < width)

        heads = case.heads if equivalent else None
        block_mask = create_block_mask(
            mask, None, heads, case.tokens, case.tokens, device="cuda", _compile=True
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        return (
            lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=group > 1),
            leaves,
            case.window_pairs(width),
        )

    return make


def nsa_side(case: Case) -> Side:
    """NSA's selected branch with our budget: (topk + window) / 64 blocks of 64. It needs 16 query heads per group."""
    from fla.ops.nsa import parallel_nsa

    kv_heads = max(1, case.heads // 16)
    q, _, _ = case.inputs()
    k, v = (
        torch.randn(1, case.tokens, kv_heads, case.dim, device="cuda", dtype=case.dtype).requires_grad_()
        for _ in range(2)
    )
    gates = torch.rand(1, case.tokens, case.heads, device="cuda", dtype=case.dtype).requires_grad_()
    blocks = (case.topk + case.window) // 64
    options = {"block_counts": blocks, "block_size": 64, "window_size": 0}

    def forward() -> torch.Tensor:
        return parallel_nsa(q, k, v, g_cmp=gates, g_slc=gates, **options)

    return forward, (q, k, v, gates), case.window_pairs(case.topk + case.window)


SIDES: dict[str, tuple[Callable[[Case], Side], int]] = {  # name: (maker, longest sequence measured)
    "cudnn": (sdpa_side(SDPBackend.CUDNN_ATTENTION), 1 << 17),
    "sparsek": (sparsek_side, 1 << 20),
    "flash2": (sdpa_side(SDPBackend.FLASH_ATTENTION), 1 << 17),
    "flex window": (flex_side(False), 1 << 17),
    "flex same mask": (flex_side(True), 1 << 15),
    "nsa": (nsa_side, 1 << 17),
}


def median_ms(function: Callable[[], object], budget_ms: float, graph: bool) -> float:
    """Median milliseconds of one call, or of one replay of a CUDA graph of it."""
    if graph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    return float(triton.testing.do_bench(function, warmup=budget_ms / 4, rep=budget_ms, return_mode="median"))


def measure(
    name: str, make: Callable[[Case], Side], case: Case, budget_ms: float, graph: bool
) -> dict[str, object]:
    forward, leaves, pairs = make(case)
    out = forward()
    d_out = torch.randn_like(out)

    def both() -> None:
        torch.autograd.grad(forward(), leaves, d_out, allow_unused=True)

    both()
    torch.cuda.synchronize()
    del out
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    forward_ms, both_ms = median_ms(forward, budget_ms, graph), median_ms(both, budget_ms, graph)
    flops = case.forward_flops(pairs)
    row: dict[str, object] = {
        "tokens": case.tokens,
        "side": name,
        "graph": graph,
        "forward_ms": round(forward_ms, 4),
        "forward_backward_ms": round(both_ms, 4),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "backward_tflops": round(2.5 * flops / (both_ms - forward_ms) / 1e9, 1),
        "peak_gib": round(peak / 2**30, 3),
    }
    if name == "sparsek":
        scores = case.scores().detach()
        options = {"topk": case.topk, "window": case.window, "stride": case.stride}
        row["select_ms"] = round(median_ms(lambda: select(scores, **options), budget_ms, graph), 4)
    return row


HEADER = "  tokens side              fwd ms   f+b ms  TF/s f  TF/s b     GiB  (x: cudnn time / this time, fwd and f+b)"


def line(row: dict[str, object], rows: list[dict[str, object]]) -> str:
    """One row of the table; gains against the cuDNN row of the same length once there is one."""
    text = f"{row['tokens']:>8} {row['side']:<15}"
    if "error" in row:
        return f"{text} {row['error']}"
    for key, width in (
        ("forward_ms", 9),
        ("forward_backward_ms", 9),
        ("forward_tflops", 8),
        ("backward_tflops", 8),
        ("peak_gib", 8),
    ):
        text += f"{row[key]:>{width}}"
    for other in rows:
        if other["side"] == "cudnn" and other["tokens"] == row["tokens"] and "error" not in other:
            for key in ("forward_ms", "forward_backward_ms"):
                text += f"  x{float(str(other[key])) / float(str(row[key])):.2f}"
    return text + (f"  select {row['select_ms']} ms" if "select_ms" in row else "")


def plot(rows: list[dict[str, object]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, label in zip(
        axes, ("forward_ms", "forward_backward_ms"), ("forward", "forward + backward"), strict=True
    ):
        for side in SIDES:
            points = [(r["tokens"], r[key]) for r in rows if r["side"] == side and "error" not in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=side)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << p for p in range(11, 21)])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--graph", action="store_true", help="time replays of CUDA graphs: no launch overhead on any side"
    )
    parser.add_argument("--budget-ms", type=float, default=100, help="measuring time per number")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()

    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False  # flex_attention's backward otherwise refuses repeated calls
    title = (
        f"{torch.cuda.get_device_name()}, {args.dtype}, {args.heads}/{args.kv_heads} heads, d {args.dim}, "
        f"topk {args.topk}, window {args.window}, stride {args.stride}; torch {torch.__version__}, "
        f"triton {triton.__version__}, {datetime.date.today()}"
    )
    print(title, flush=True)
    rows: list[dict[str, object]] = []
    for tokens in args.lengths:
        case = Case(
            tokens,
            args.heads,
            args.kv_heads,
            args.dim,
            args.topk,
            args.window,
            args.stride,
            getattr(torch, args.dtype),
        )
        for name in args.sides:
            make, longest = SIDES[name]
            if tokens > longest:
                continue
            try:
                rows.append(measure(name, make, case, args.budget_ms, args.graph))
            except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
                reason = str(error).strip().splitlines()[0][:100] if str(error) else type(error).__name__
                rows.append({"tokens": tokens, "side": name, "error": f"{type(error).__name__}: {reason}"})
            print(line(rows[-1], rows), flush=True)  # a long run shows what it has
            gc.collect()
            torch.cuda.empty_cache()
    print(HEADER)
    for row in rows:
        print(line(row, rows))
    args.out.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (args.out / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / "attention.png", title)


if __name__ == "__main__":
    main()
