# SPDX-License-Identifier: Apache-2.0
"""The Triton backend of the cache, in Triton's interpreter: the bits of the torch backend, and what it refuses.

Sizes are small, since a step takes tens of milliseconds.
"""

import pytest
import torch
from cached_generation import SMALL, generate, largest_error, make_inputs, part
from sparsek_kernels import SparseKCache


def test_the_triton_backend_does_not_run_on_what_it_cannot():
    with pytest.raises(NotImplementedError, match="head_dim is 24; the triton backend has"):
        SparseKCache(1, 2, 24, **SMALL, backend="triton")


@pytest.mark.parametrize(
    ("options", "n", "cut"),
    [
        ({"topk": 4, "window": 6, "stride": 8}, 40, 12),
        ({"topk": 3, "window": 5, "stride": 1, "gate": "value"}, 24, 3),
        ({"topk": 4, "window": 1, "stride": 70, "pool": 9, "gate": "logit"}, 150, 130),
        ({"topk": 4, "window": 6, "stride": 4, "pool": 4}, 30, 10),
    ],
)
def test_triton_steps_give_the_bits_of_the_torch_backend(options, n, cut):
    inputs = make_inputs(n, hq=3, hkv=1, batch=2)
    scores = (4 * inputs[3]).round() / 4  # ties
    scores[1] *= 5  # gaps between 1 and 2 at the edge of the selection: no gate is fractional
    inputs = (*inputs[:3], scores)
    expected, reference = generate(inputs, cut, **options)
    actual, cache = generate(inputs, cut, backend="triton", **options)
    assert largest_error(actual, expected) < 1e-5
    same_bits(cache, reference)
    piece = part(inputs, 0, 13)  # on top of what both hold
    assert largest_error(cache.prefill(*piece), reference.prefill(*piece)) < 1e-5
    same_bits(cache, reference)
    for each in (cache, reference):  # a prompt that leaves places of the ring empty
        each.reset()
        each.prefill(*part(inputs, 0, 2))
    same_bits(cache, reference)


def same_bits(cache, reference):
    for name in ("pool", "threshold", "length", "score", "place", "key", "value"):
        assert torch.equal(getattr(cache._buffers, name), getattr(reference._buffers, name)), name


def test_pieces_of_the_cache_add_up(monkeypatch):
    from sparsek_kernels.cache import triton_backend

    inputs = make_inputs(40, hq=6, hkv=2)
    expected, cache = generate(inputs, 39, backend="triton", topk=40, window=30, stride=20)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 8)
    q = inputs[0][:, -1]
    tiling = triton_backend.DecodeTiling(block=16, num_warps=4, num_stages=2, programs_per_sm=2)
    split = triton_backend.attend_triton(cache._buffers, cache.settings, q, tiling)
    assert largest_error(split, expected[:, -1]) < 1e-5
