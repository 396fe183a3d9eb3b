# SPDX-License-Identifier: Apache-2.0
"""Inputs whose elements lie further apart than int32 counts: no kernel's offset wraps around.

A view of a fused QKV product of the 8B shape has 6,144 elements a token, and leaves int32 at 349,526 tokens. Here few
tokens, or heads, lie that far apart in one large storage, of which only what is used is ever touched.
"""

import pytest
import torch
from sparsek_kernels import sparsek_attention

ELEMENTS = 2**32 + 2**20
HEADS, KV_HEADS, DIM = 8, 1, 64
ON = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def views(tokens, layout, device):
    """q, k, v, d_out and scores as views that do not overlap, of an untouched storage for each dtype."""
    half = torch.empty(ELEMENTS, dtype=torch.float16, device=device)
    single = torch.empty(2**31 + 2**20, dtype=torch.float32, device=device)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    if layout == "tokens":
        stride, begin = 2**32 // tokens // 64 * 64, [0, 8, 9, 10]
        tensors = [
            half.as_strided((1, tokens, h, DIM), (0, stride, DIM, 1), first * DIM)
            for h, first in zip(heads, begin, strict=True)
        ]
        assert (tokens - 1) * stride >= 2**31
        return [*tensors, single.as_strided((1, tokens, KV_HEADS), (0, 2**31 // (tokens - 1) + 1, 1))]
    stride = 2**32 // HEADS
    assert stride >= 4 * tokens * DIM and (HEADS - 1) * stride >= 2**31
    tensors = [
        half.as_strided((1, tokens, h, DIM), (0, DIM, stride, 1), n * tokens * DIM)
        for n, h in enumerate(heads)
    ]
    return [*tensors, single.as_strided((1, tokens, KV_HEADS), (0, 1, 1))]


def results(q, k, v, d_out, u, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, u)]
    out = sparsek_attention(*leaves, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("stride", [64, 8])
@pytest.mark.parametrize("device", ON)
def test_far_elements_give_the_bits_of_near_ones(device, stride, layout):
    tokens = 110 if device == "cpu" else 1300
    generator = torch.Generator(device).manual_seed(5)
    far = views(tokens, layout, device)
    for x in far:
        x.copy_(torch.randn(x.shape, generator=generator, device=device))
    near = [x.contiguous() for x in far]
    options = {"topk": 12, "window": 20, "stride": stride}
    found, wanted = (results(*inputs, **options) for inputs in (far, near))
    for name, a, b in zip(("out", "dq", "dk", "dv", "du"), found, wanted, strict=True):
        assert a.isfinite().all() and a.any(), name
        assert torch.equal(a, b), name
