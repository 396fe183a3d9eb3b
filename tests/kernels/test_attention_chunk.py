# SPDX-License-Identifier: Apache-2.0
"""A sequence attended chunk by chunk gets the outputs of the whole, wherever it is cut; the state never grows."""

import pytest
import torch
from sparsek_kernels import AttentionState, sparsek_attention, sparsek_attention_chunk

CUTS = {
    "one token at a time": [1] * 12,
    "not at refresh points": [37, 1, 90, 5, 64],
    "at refresh points": [64, 128, 8],
    "short of the window": [3, 4, 60],
}


def make_inputs(n, hq=2, hkv=1, d=64, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, h, d, generator=g) for h in (hq, hkv, hkv))
    return q, k, v, torch.randn(batch, n, hkv, generator=g)


def in_chunks(inputs, sizes, **options):
    state, outputs, start = None, [], 0
    for size in sizes:
        piece = [x[:, start : start + size] for x in inputs]
        out, state = sparsek_attention_chunk(*piece, state=state, **options)
        outputs.append(out)
        start += size
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize(("topk", "window", "stride"), [(4, 6, 8), (8, 12, 64), (3, 5, 1)])
def test_chunks_equal_the_whole(backend, cut, topk, window, stride):
    sizes = CUTS[cut]
    inputs = make_inputs(sum(sizes), hq=4, hkv=2, batch=2)
    options = {"topk": topk, "window": window, "stride": stride, "gate": "key_value"}
    whole = sparsek_attention(*inputs, backend="torch", **options)
    pieces, _ = in_chunks(inputs, sizes, backend=backend, **options)
    assert ((pieces - whole).norm() / whole.norm()).item() < 1e-6


def test_state_has_one_size_and_the_rows_of_its_positions():
    inputs = make_inputs(200)
    options = {"topk": 4, "window": 6, "stride": 8, "backend": "torch"}
    shapes = set()
    for n in (1, 5, 70, 200):
        _, state = in_chunks([x[:, :n] for x in inputs], [n], **options)
        shapes.add((state.key.shape, state.value.shape, state.selection.pool_scores.shape))
    assert shapes == {((1, 17, 1, 64), (1, 17, 1, 64), (1, 1, 16))}
    positions = state.selection.pool_index[0, 0, :4].long()
    assert torch.equal(state.key[0, :4, 0], inputs[1][0, positions, 0])
    assert torch.equal(state.value[0, 4:, 0], inputs[2][0, 200 - 13 :, 0])


def test_what_does_not_fit_the_state_is_named():
    q, k, v, u = make_inputs(20)
    options = {"topk": 4, "window": 6, "stride": 8}
    _, state = sparsek_attention_chunk(q, k, v, u, **options)
    assert isinstance(state, AttentionState)
    with pytest.raises(
        ValueError, match=r"state.key is torch.float32 \(1, 17, 1, 64\) on cpu; this call needs"
    ):
        sparsek_attention_chunk(q, k, v, u, **{**options, "window": 7}, state=state)
    with pytest.raises(NotImplementedError, match="has no gradient: call it under"):
        sparsek_attention_chunk(q.requires_grad_(), k, v, u, **options)


def test_float64_inputs_are_computed_in_float64():
    inputs = [x.double() for x in make_inputs(90)]
    options = {"topk": 4, "window": 6, "stride": 8}
    pieces, _ = in_chunks(inputs, [40, 50], **options)
    whole = sparsek_attention(*inputs, **options)
    assert ((pieces - whole).norm() / whole.norm()).item() < 1e-12
