# SPDX-License-Identifier: Apache-2.0
"""Random inputs of generation, and what it gives from a cache: a prefill, then one token after another."""

import torch
from sparsek_kernels import SparseKCache

SMALL = {"topk": 4, "window": 6, "stride": 8}


def make_inputs(n, hq=4, hkv=2, d=64, batch=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, h, d, generator=g).to(dtype) for h in (hq, hkv, hkv))
    return q, k, v, torch.randn(batch, n, hkv, generator=g)


def make_cache(inputs, backend="torch", **options):
    q, k, _, _ = inputs
    return SparseKCache(
        q.shape[0], k.shape[2], q.shape[3], dtype=q.dtype, device=q.device, backend=backend, **options
    )


def part(inputs, start, stop):
    return [x[:, start:stop] for x in inputs]


def decode(cache, inputs, start, stop):
    return torch.cat([cache.decode(*part(inputs, i, i + 1)) for i in range(start, stop)], dim=1)


def generate(inputs, cut, backend="torch", **options):
    """Outputs of `cut` tokens in one prefill and the rest one at a time."""
    cache = make_cache(inputs, backend, **options)
    first = [cache.prefill(*part(inputs, 0, cut))] if cut else []
    return torch.cat([*first, decode(cache, inputs, cut, inputs[0].shape[1])], dim=1), cache


def largest_error(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()
