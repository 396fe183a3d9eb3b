# SPDX-License-Identifier: Apache-2.0
"""A sequence attended chunk by chunk gets the outputs and gradients of the whole, wherever it is cut; the state never
grows.
"""

import attention_oracle
import pytest
import torch
from sparsek_kernels import AttentionState, sparsek_attention, sparsek_attention_chunk
from sparsek_kernels.attention import plan

CUTS = {
    "one token at a time": [1] * 12,
    "not at refresh points": [37, 1, 90, 5, 64],
    "at refresh points": [64, 128, 8],
    "short of the window": [3, 4, 60],
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run: compiled or interpreted


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
    if backend == "triton":
        inputs = [x.to(DEVICE) for x in inputs]
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


def test_float64_inputs_are_computed_in_float64():
    inputs = [x.double() for x in make_inputs(90)]
    options = {"topk": 4, "window": 6, "stride": 8}
    pieces, _ = in_chunks(inputs, [40, 50], **options)
    whole = sparsek_attention(*inputs, **options)
    assert ((pieces - whole).norm() / whole.norm()).item() < 1e-12


NAMES = ("out", "dq", "dk", "dv", "du")


def gradients(function, inputs, seed=5):
    """Output, and gradients of a random linear functional of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out))]


def check_gradients(inputs, sizes, expected, tolerance, **options):
    actual = gradients(lambda leaves: in_chunks(leaves, sizes, **options)[0], inputs)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.isfinite(a).all(), name
        difference = ((a.double() - e.double()).norm() / (e.norm() or 1.0)).item()
        assert difference < tolerance, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("gate", ["key_value", "value", "logit"])
@pytest.mark.parametrize(
    ("sizes", "topk", "window", "stride", "pool"),
    [
        ([13, 1, 30, 7, 24], 4, 5, 1, 9),
        ([16, 32, 8, 40], 6, 8, 8, 24),
        ([3, 2, 40, 21], 3, 7, 5, 12),
        ([20, 20, 20], 8, 4, 16, 8),
    ],
)
def test_gradients_through_the_state_equal_brute_force(gate, sizes, topk, window, stride, pool):
    """Members of F outside the top-k included: their scores get a gradient across chunks, never attended."""
    inputs = [x.double() for x in make_inputs(sum(sizes), hq=4, hkv=2, d=8, batch=2)]
    inputs[3] *= 0.5
    settings = {"topk": topk, "window": window, "stride": stride, "pool": pool, "gate": gate}
    expected = gradients(lambda leaves: attention_oracle.attention(*leaves, **settings), inputs)
    check_gradients(inputs, sizes, expected, 1e-10, backend="torch", **settings)


HARD = {
    "rising": lambda u, ramp: ramp + u / 10,  # segments with more entrants than they keep
    "falling": lambda u, ramp: u / 10 - ramp,
    "equal": lambda u, ramp: u * 0,
    "immortal": lambda u, ramp: u.index_fill(1, torch.tensor([7]), 100.0),
    "random": lambda u, ramp: u,
}


AT_REFRESH_POINTS = ([64, 128, 40], 8, 16, 64, 2, 1)  # and then not
LONG_WINDOW = ([37, 101, 60], 8, 90, 64, 1, 1)  # longer than a chunk


@pytest.mark.parametrize(
    ("shape", "sizes", "topk", "window", "stride", "hq", "hkv"),
    [
        *((shape, *AT_REFRESH_POINTS) for shape in HARD),
        ("random", *LONG_WINDOW),
        ("rising", *LONG_WINDOW),
        ("random", [45, 1, 100], 8, 12, 8, 3, 1),
        ("rising", [45, 1, 100], 8, 12, 8, 2, 2),
        ("random", [70, 31], 5, 6, 1, 2, 1),
    ],
)
def test_triton_gradients_through_the_state(monkeypatch, shape, sizes, topk, window, stride, hq, hkv):
    monkeypatch.setattr(plan, "SEGMENT_QUERIES", 64)
    inputs = list(make_inputs(sum(sizes), hq=hq, hkv=hkv, d=64))
    ramp = torch.arange(sum(sizes))[None, :, None].expand_as(inputs[3]) / 20
    inputs[3] = HARD[shape](inputs[3], ramp)
    inputs = [x.to(DEVICE) for x in inputs]
    settings = {"topk": topk, "window": window, "stride": stride, "gate": "key_value"}
    expected = gradients(
        lambda leaves: sparsek_attention(*leaves, backend="torch", **settings), [x.double() for x in inputs]
    )
    check_gradients(inputs, sizes, expected, 3e-6, backend="triton", **settings)


@pytest.mark.parametrize("gate", ["value", "logit"])
def test_triton_gradients_of_every_gate(monkeypatch, gate):
    monkeypatch.setattr(plan, "SEGMENT_QUERIES", 64)
    inputs = [x.to(DEVICE) for x in make_inputs(150, hq=2, hkv=1, d=64)]
    settings = {"topk": 6, "window": 10, "stride": 16, "gate": gate}
    expected = gradients(
        lambda leaves: sparsek_attention(*leaves, backend="torch", **settings), [x.double() for x in inputs]
    )
    check_gradients(inputs, [70, 50, 30], expected, 3e-6, backend="triton", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[4096, 8192, 4096], [5000, 3001, 2999]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_compiled_gradients_through_the_state(sizes, dtype, tolerance):
    inputs = [x.cuda() for x in make_inputs(sum(sizes), hq=8, hkv=2, d=128)]
    inputs = [*(x.to(dtype) for x in inputs[:3]), inputs[3]]
    settings = {"topk": 256, "window": 300, "stride": 64}
    expected = gradients(lambda leaves: sparsek_attention(*leaves, **settings), inputs)
    check_gradients(inputs, sizes, expected, tolerance, **settings)
