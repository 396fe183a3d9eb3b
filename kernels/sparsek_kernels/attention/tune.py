# SPDX-License-Identifier: Apache-2.0
"""Opt-in search for tile shapes on the GPU at hand. Nothing calls it on its own.

    python -m sparsek_kernels.attention.tune --query-heads 32 --kv-heads 8 --head-dim 128

tries the candidates of each attention kernel in turn on random inputs (nearly all of the time it takes is compiling),
prints every time and the fastest `Tilings`. `tune_tilings` does the same from Python and installs the result for the
process. Nothing is written to disk: put what it prints into the table of `plan.py`, or call `install_tilings` with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from sparsek_kernels.attention.backward_key import attention_backward_key
from sparsek_kernels.attention.backward_query import attention_backward_query
from sparsek_kernels.attention.forward import attention_forward
from sparsek_kernels.attention.plan import (
    AttentionPlan,
    Tiling,
    Tilings,
    install_tilings,
    padded_dim,
    plan_for,
    tilings_for,
)
from sparsek_kernels.selection import select

KEY_MAJOR = (
    Tiling(32, 64, 4, 2),
    Tiling(64, 64, 4, 2),
    Tiling(32, 64, 4, 1),
    Tiling(32, 128, 8, 2),
    Tiling(16, 64, 4, 2),
)
CANDIDATES = {
    "forward": (
        Tiling(128, 32, 4, 4, band=(64, 2)),
        Tiling(128, 32, 4, 3),
        Tiling(128, 32, 8, 3, maxnreg=128),
        Tiling(128, 64, 8, 2),
        Tiling(128, 64, 4, 2),
        Tiling(64, 64, 4, 2),
        Tiling(64, 32, 4, 3),
    ),
    "backward_query": (
        Tiling(64, 32, 4, 3),
        Tiling(64, 64, 4, 2),
        Tiling(64, 32, 4, 2),
        Tiling(64, 64, 8, 1),
        Tiling(32, 32, 4, 2),
    ),
    "backward_survivors": KEY_MAJOR,
    "backward_band": KEY_MAJOR,
}
"""Tile shapes to try besides those in use, per kernel. What does not fit the GPU is reported and passed over."""


def median_ms(call: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune_tilings(
    *,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    topk: int = 512,
    window: int = 512,
    stride: int = 64,
    tokens: int = 16_384,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    candidates: dict[str, tuple[Tiling, ...]] = CANDIDATES,
    timer: Callable[[Callable[[], object]], float] = median_ms,
    report: Callable[[str], None] = print,
    install: bool = True,
) -> Tilings:
    """The fastest tile shapes for a model's attention: one `Tiling` per kernel, searched one kernel after the other.

    The sizes are those of one rank (heads after tensor parallelism) at `tokens` tokens; times scale with the
    tokens, so that one length serves. `report` gets a line per candidate. `install` makes the result the choice
    of this process for this device, dtype and (padded) head dimension.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name theirs
    shapes = ((1, tokens, heads, head_dim) for heads in (query_heads, kv_heads, kv_heads, query_heads))
    query, key, value, d_out = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    scores = torch.randn(1, tokens, kv_heads, device=device)
    selection = select(scores, topk=topk, window=window, stride=stride)
    row_scores = scores.transpose(1, 2).contiguous()
    inputs = (query, key, value, row_scores, selection)
    best = tilings_for(device, dtype, padded_dim(head_dim))

    def plan_of(tilings: Tilings) -> AttentionPlan:
        return plan_for(
            query, key, selection, gate="key_value", softmax_scale=head_dim**-0.5, tilings=tilings
        )

    out, lse = attention_forward(plan_of(best), *inputs)
    _, delta, _ = attention_backward_query(plan_of(best), *inputs, out, d_out, lse)
    calls: dict[str, Callable[[AttentionPlan], object]] = {
        "forward": lambda plan: attention_forward(plan, *inputs),
        "backward_query": lambda plan: attention_backward_query(plan, *inputs, out, d_out, lse),
        "backward_survivors": lambda plan: attention_backward_key(plan, *inputs, d_out, lse, delta),
        "backward_band": lambda plan: attention_backward_key(plan, *inputs, d_out, lse, delta),
    }
    for kernel, tried in candidates.items():
        times: dict[Tiling, float] = {}
        for tiling in dict.fromkeys((getattr(best, kernel), *tried)):
            plan = plan_of(replace(best, **{kernel: tiling}))
            try:
                times[tiling] = timer(lambda plan=plan, call=calls[kernel]: call(plan))
            except triton.runtime.errors.OutOfResources as error:
                report(f"{kernel:20} {tiling} does not fit: {error}")
                continue
            report(f"{kernel:20} {times[tiling]:8.3f} ms  {tiling}")
        best = replace(best, **{kernel: min(times, key=times.__getitem__)})
    if install:
        install_tilings(device, dtype, padded_dim(head_dim), best)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--query-heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = vars(parser.parse_args())
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    dtype = getattr(torch, arguments.pop("dtype"))
    print(tune_tilings(**arguments, dtype=dtype, install=False))


if __name__ == "__main__":
    main()
