# SPDX-License-Identifier: Apache-2.0
"""Every kernel once at small sizes, for compute-sanitizer.

    PYTHONPATH=kernels compute-sanitizer --tool memcheck python kernels/benchmarks/sanitizer.py
    PYTHONPATH=kernels compute-sanitizer --tool racecheck python kernels/benchmarks/sanitizer.py

Run it once without the tool first, so that the kernels are compiled. PYTORCH_NO_CUDA_MEMORY_CACHING=1 lets memcheck see
the end of each tensor instead of the end of the allocator's block.
"""

from __future__ import annotations

import argparse

import torch
from sparsek_kernels import select, sparsek, sparsek_attention
from timing import parse_with_cuda

CASES = (  # tokens, query heads, KV heads, head dimension, topk, window, stride, packed lengths
    (300, 4, 1, 128, 64, 64, 64, None),
    (300, 2, 2, 64, 32, 40, 1, None),
    (300, 3, 1, 80, 16, 40, 16, (130, 0, 1, 160)),
)


def main() -> None:
    parse_with_cuda(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    for n, heads, kv_heads, dim, topk, window, stride, lengths in CASES:
        shapes = ((1, n, h, dim) for h in (heads, kv_heads, kv_heads))
        leaves = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes
        ]
        leaves.append(torch.randn(1, n, kv_heads, device="cuda").requires_grad_())
        cu_seqlens = None
        if lengths is not None:
            cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        out = sparsek_attention(*leaves, topk=topk, window=window, stride=stride, cu_seqlens=cu_seqlens)
        torch.autograd.grad(out, leaves, torch.randn_like(out))
        torch.cuda.synchronize()
        print(f"{n} tokens, d {dim}, stride {stride}: done", flush=True)
    scores = torch.randn(1, 5_000, 2, device="cuda")  # blocks of 256: a scan of three groups of lists
    for lengths in (None, (0, 4_500, 1, 400)):
        bounds = None if lengths is None else torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        select(scores, topk=16, window=40, stride=64, cu_seqlens=bounds)
    state = select(scores[:, :700], topk=16, window=40, stride=16, return_state=True).state
    select(scores[:, 700:], topk=16, window=40, stride=16, state=state)
    torch.cuda.synchronize()
    print("selection of 5,000 tokens: done", flush=True)
    gates = sparsek(torch.randn(3, 500, device="cuda").requires_grad_(), 20)
    gates.square().sum().backward()
    torch.cuda.synchronize()
    print("operator: done")


if __name__ == "__main__":
    main()
