# SPDX-License-Identifier: Apache-2.0
"""`sparsek_attention`, both backends, against brute force in float64: outputs and every gradient.

The Triton kernels run here in Triton's interpreter at small sizes (`test_attention_gpu.py` runs them compiled).
"""

from itertools import pairwise

import attention_oracle
import pytest
import torch
from sparsek_kernels import select, sparsek_attention
from sparsek_kernels.attention import plan


def make_inputs(n, hq=2, hkv=1, d=16, batch=1, spread=0.5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, n, hq, d), (batch, n, hkv, d), (batch, n, hkv, d))
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    u = torch.randn(batch, n, hkv, generator=g, dtype=torch.float32) * spread
    return q, k, v, u.to(torch.float64 if dtype == torch.float64 else torch.float32)


def run(function, inputs, d_out, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def error(actual, expected):
    """Relative Frobenius error; absolute where the expected tensor is zero."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12 if expected.norm() else 1.0)).item()


def check(inputs, tolerance, backend, seed=1, **options):
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = [x.double() for x in inputs]
    options.setdefault("pool", 4 * options["topk"])
    expected = run(attention_oracle.attention, exact, d_out, **options)
    actual = run(sparsek_attention, inputs, d_out, backend=backend, **options)
    for name, a, e in zip(("out", "dq", "dk", "dv", "du"), actual, expected, strict=True):
        assert torch.isfinite(a).all(), name
        assert error(a, e) < tolerance, f"{name}: {error(a, e):.2e}"


GATES = ("key_value", "value", "logit")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("n", "topk", "window", "stride", "pool"),
    [
        (61, 4, 5, 1, 9),
        (97, 6, 8, 8, 24),
        (70, 3, 7, 5, 12),
        (40, 8, 4, 16, 8),
        (1, 1, 1, 1, 4),
        (33, 50, 4, 4, 60),
    ],
)
def test_torch_backend_is_exact(gate, n, topk, window, stride, pool):
    inputs = make_inputs(n, hq=4, hkv=2, batch=2)
    check(inputs, 1e-10, "torch", topk=topk, window=window, stride=stride, pool=pool, gate=gate)


@pytest.mark.parametrize("gate", GATES)
def test_short_sequences_are_dense_causal_attention(gate):
    inputs = make_inputs(48, hq=4, hkv=2)
    q, k, v, _ = inputs
    out = sparsek_attention(*inputs, topk=30, window=18, stride=4, gate=gate, backend="torch")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert error(out, dense.transpose(1, 2)) < 1e-12


def packed_inputs(lengths, **shape):
    """Inputs of sequences packed along s, with five rows of NaN behind them, and their boundaries."""
    inputs = make_inputs(sum(lengths) + 5, **shape)
    for x in inputs:
        x[:, sum(lengths) :] = float("nan")
    return inputs, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def check_packed(inputs, bounds, same, **options):
    """Packed outputs and gradients against each sequence alone; zeros behind the last sequence."""
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    packed = run(sparsek_attention, inputs, d_out, cu_seqlens=bounds, **options)
    for a, b in pairwise(bounds.tolist()):
        if a < b:
            alone = run(sparsek_attention, [x[:, a:b] for x in inputs], d_out[:, a:b], **options)
            for x, y in zip(packed, alone, strict=True):
                assert same(x[:, a:b], y)
    for x in packed:
        assert (x[:, bounds[-1] :] == 0).all()


def test_packed_sequences_equal_each_alone():
    inputs, bounds = packed_inputs((37, 0, 1, 64, 20), hq=2, hkv=2)
    check_packed(inputs, bounds, torch.equal, topk=4, window=6, stride=4, backend="torch")


def test_a_packing_of_empty_sequences_has_gradients():
    inputs, bounds = packed_inputs((0, 0), hq=4, hkv=2)
    check_packed(inputs, bounds, torch.equal, topk=4, window=6, stride=4, backend="torch")


@pytest.mark.parametrize(
    ("bounds", "dtype", "message"),
    [
        ([5, 20], torch.int32, r"cu_seqlens must start at 0, .* got \[5, 20\]"),
        ([0, 12, 8, 20], torch.int32, "cu_seqlens must start at 0, never decrease"),
        ([0, 30], torch.int32, "end at or before s = 20"),
        ([0, 20], torch.int64, "cu_seqlens must be int32"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_boundaries_that_pack_nothing_are_refused(backend, bounds, dtype, message):
    inputs = make_inputs(20, d=64, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        sparsek_attention(*inputs, topk=4, window=4, backend=backend, cu_seqlens=torch.tensor(bounds, dtype=dtype))
    with pytest.raises(ValueError, match="cu_seqlens must be an int32 tensor, got list"):
        sparsek_attention(*inputs, topk=4, window=4, backend=backend, cu_seqlens=bounds)


def test_autocast_changes_nothing():
    inputs = make_inputs(40, dtype=torch.float32)
    plain = sparsek_attention(*inputs, topk=4, window=4, stride=4, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparsek_attention(*inputs, topk=4, window=4, stride=4, backend="torch"), plain)


def test_scores_stay_connected_where_nothing_is_fractional():
    q, k, v, u = make_inputs(12)
    u.requires_grad_()
    sparsek_attention(q, k, v, u, topk=8, window=8, stride=2).sum().backward()
    assert u.grad is not None and (u.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk must be an int of at least 1, got 0"),
        ({"window": -1}, "window must be an int of at least 1, got -1"),
        ({"stride": 0}, "stride must be an int of at least 1, got 0"),
        ({"pool": 3}, "pool must be at least topk = 4, got 3"),
        ({"gate": "key"}, "gate must be one of key_value, value, logit, got 'key'"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, got 'cuda'"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens must be int32"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sparsek_attention(*make_inputs(8), **{"topk": 4, "window": 4, **change})


def test_bad_shapes_are_named():
    q, k, v, u = make_inputs(8, hq=3, hkv=2)
    with pytest.raises(ValueError, match="query has 3 heads, not a multiple of key's 2"):
        sparsek_attention(q, k, v, u, topk=4, window=4)
    q, k, v, u = make_inputs(8)
    with pytest.raises(ValueError, match="scores has dtype torch\\.float32"):
        sparsek_attention(q, k, v, u.float(), topk=4, window=4)
    with pytest.raises(ValueError, match=r"value has shape \(1, 7, 1, 16\)"):
        sparsek_attention(q, k, v[:, :7], u, topk=4, window=4)


@pytest.fixture
def short_segments(monkeypatch):
    """Segments short enough that a few hundred tokens cross several of them."""
    monkeypatch.setattr(plan, "SEGMENT_QUERIES", 128)


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiled where CUDA is: test_attention_gpu.py"
)


@interpreted
@pytest.mark.parametrize(
    ("n", "hq", "hkv", "d", "topk", "window", "stride", "pool", "gate"),
    [
        # One refresh point a tile, full blocks of the list and a rest.
        (200, 2, 1, 64, 40, 20, 64, 100, "key_value"),
        # Several refresh points a tile, surplus head rows, padded d.
        (200, 3, 1, 80, 16, 20, 8, 40, "logit"),
        (200, 2, 2, 64, 8, 5, 1, 32, "value"),
        (200, 7, 1, 64, 8, 130, 64, 32, "logit"),
        # Groups in two parts: three heads of one refresh point a tile, six of several.
        (150, 6, 2, 64, 16, 20, 64, 40, "key_value"),
        (150, 6, 1, 64, 8, 20, 8, 40, "value"),
        # A part whose tiles have one refresh point each, and one whose tiles do not.
        (150, 3, 1, 64, 8, 20, 72, 24, "key_value"),
    ],
)
def test_interpreted_kernels(short_segments, n, hq, hkv, d, topk, window, stride, pool, gate):
    inputs = make_inputs(n, hq=hq, hkv=hkv, d=d, dtype=torch.float32)
    check(inputs, 2e-6, "triton", topk=topk, window=window, stride=stride, pool=pool, gate=gate)


def test_parts_of_a_group_cover_it_and_leave_at_most_an_eighth_of_their_rows_empty():
    for group in range(1, plan.MAX_GROUP + 1):
        parts = plan.cut_group(group)
        assert [head for first, heads in parts for head in range(first, first + heads)] == list(range(group))
        assert all(plan.power_of_2(heads) - heads <= plan.power_of_2(heads) / 8 for _, heads in parts)
    assert [len(plan.cut_group(group)) for group in (1, 2, 3, 4, 5, 6, 7, 8)] == [1, 1, 2, 1, 2, 2, 1, 1]


@interpreted
@pytest.mark.parametrize("gate", ["key_value", "value"])
@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0])
def test_interpreted_forward_at_scales_that_reverse_or_ignore_the_logits(gate, softmax_scale):
    inputs = make_inputs(150, hq=2, hkv=1, d=64, dtype=torch.float32)
    kw = {"topk": 12, "window": 40, "stride": 64, "pool": 30, "gate": gate, "softmax_scale": softmax_scale}
    expected = sparsek_attention(*(x.double() for x in inputs), backend="torch", **kw)
    assert error(sparsek_attention(*inputs, backend="triton", **kw), expected) < 2e-6


@interpreted
@pytest.mark.parametrize("shape", ["equal", "rising", "falling", "immortal", "huge"])
def test_interpreted_kernels_on_hard_scores(short_segments, shape):
    n = 270
    inputs = list(make_inputs(n, hq=1, hkv=1, d=64, dtype=torch.float32))
    ramp = torch.arange(n, dtype=torch.float32)[None, :, None]
    if shape == "equal":
        inputs[3] = torch.zeros(1, n, 1)
    elif shape == "rising":
        inputs[3] = ramp / 20  # every key is selected for a while: segments with more entrants than they keep
    elif shape == "falling":
        inputs[3] = -ramp / 20
    elif shape == "immortal":
        inputs[3][:, 3] = 100.0
    else:
        inputs[3] = inputs[3] * 1e6
    check(tuple(inputs), 2e-6, "triton", topk=8, window=16, stride=64, gate="key_value")


@interpreted
def test_a_second_derivative_is_refused_where_it_would_be_zero():
    leaves = [x.requires_grad_() for x in make_inputs(20, d=64, dtype=torch.float32)]
    out = sparsek_attention(*leaves, topk=4, window=4, stride=4, backend="triton")
    (d_query,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    assert d_query.any()
    with pytest.raises(NotImplementedError, match="differentiable once; use backend='torch'"):
        (out.sum() + d_query.square().sum()).backward()


@interpreted
def test_interpreted_kernels_packed_and_strided(short_segments):
    inputs, bounds = packed_inputs((140, 0, 1, 90), hq=3, hkv=1, d=64, dtype=torch.float32)
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 4 else x for x in inputs]
    options = {"topk": 8, "window": 12, "stride": 64, "gate": "key_value", "backend": "triton"}
    check_packed(inputs, bounds, lambda x, y: error(x, y) < 2e-6, **options)


@interpreted
def test_interpreted_kernels_in_half_precision(short_segments):
    inputs = make_inputs(150, hq=2, hkv=1, d=64, dtype=torch.float16)
    check(inputs, 2e-3, "triton", topk=8, window=12, stride=64, gate="key_value")


@interpreted
def test_custom_op_schema_autograd_and_fake_kernels():
    q, k, v, u = make_inputs(70, d=64, dtype=torch.float32)
    selection = select(u, topk=4, window=6)
    fields = (
        "threshold",
        "threshold_low",
        "evict",
        "lists",
        "fraction_start",
        "fraction_end",
        "fraction_size",
    )
    args = (*(x.requires_grad_() for x in (q, k, v, u)), *(getattr(selection, f) for f in fields))
    settings = (None, 4, 6, 64, 16, 0, "key_value", 0.125)
    torch.library.opcheck(torch.ops.sparsek.attention.default, (*args, *settings))


def test_triton_backend_names_what_it_lacks():
    q, k, v, u = make_inputs(8, d=48, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="query has head dimension 48"):
        sparsek_attention(q, k, v, u, topk=4, window=4, backend="triton")
    q, k, v, u = make_inputs(8, d=64)
    with pytest.raises(NotImplementedError, match="query is float64"):
        sparsek_attention(q, k, v, u, topk=4, window=4, backend="triton")
