# SPDX-License-Identifier: Apache-2.0
"""The compiled Triton kernels on a GPU, against the torch backend in float64, and what torch does with custom ops.

`test_attention.py` checks the torch backend itself against brute force.
"""

import pytest
import torch
from sparsek_kernels import select, sparsek_attention
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
NAMES = ("out", "dq", "dk", "dv", "du")


def make_inputs(n, hq, hkv, d, dtype, batch=1, spread=1.0):
    """Fresh random inputs: no two runs see the same."""
    q = torch.randn(batch, n, hq, d, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, n, hkv, d, device="cuda", dtype=dtype) for _ in range(2))
    return [q, k, v, torch.randn(batch, n, hkv, device="cuda") * spread]


def run(inputs, d_out, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    # What the allocator hands out next is NaN: an element that no kernel writes shows.
    poison = [torch.full_like(x, float("nan")) for x in inputs for _ in range(3)]
    del poison
    out = sparsek_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12 if expected.norm() else 1.0)).item()


def check(inputs, **options):
    d_out = torch.randn(inputs[0].shape, device="cuda", dtype=inputs[0].dtype)
    actual = run(inputs, d_out, **options)
    expected = run([x.double() for x in inputs], d_out.double(), **{**options, "backend": "torch"})
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < TOLERANCE[inputs[0].dtype], f"{name}: {error(a, e):.2e}"


@pytest.mark.parametrize("gate", ["key_value", "value", "logit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("stride", "n"), [(64, 2111), (1, 777), (16, 1501), (100, 1300), (128, 1999)])
def test_gates_dtypes_strides(gate, dtype, stride, n):
    check(make_inputs(n, 4, 2, 64, dtype, batch=2), topk=64, window=96, stride=stride, gate=gate)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dimensions(d, dtype):
    check(make_inputs(1301, 4, 2, d, dtype), topk=64, window=64, stride=64)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32])
@pytest.mark.parametrize("stride", [64, 16])
def test_group_sizes(group, stride):
    check(make_inputs(1301, 2 * group, 2, 128, torch.bfloat16), topk=64, window=64, stride=stride)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 129, 1023, 1025])
def test_odd_lengths(n):
    check(make_inputs(n, 4, 1, 128, torch.bfloat16), topk=32, window=48, stride=64)


@pytest.mark.parametrize("shape", ["equal", "rising", "falling", "immortal", "offset", "huge", "tiny"])
def test_hard_scores(shape):
    inputs = make_inputs(4500, 4, 2, 64, torch.bfloat16)
    u = inputs[3]
    ramp = torch.arange(4500, device="cuda")[None, :, None].expand_as(u) / 100
    changed = {
        "equal": torch.zeros_like(u),
        "rising": ramp + u / 10,
        "falling": u / 10 - ramp,
        "immortal": u.clone().index_fill_(1, torch.tensor([7], device="cuda"), 1e3),
        "offset": u + 1e4,
        "huge": u * 1e6,
        "tiny": u * 1e-6,
    }
    check([*inputs[:3], changed[shape]], topk=128, window=64, stride=64)


def test_short_sequences_are_dense_attention():
    q, k, v, u = make_inputs(700, 8, 2, 128, torch.bfloat16)
    out = sparsek_attention(q, k, v, u, topk=400, window=300)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert error(out, dense.transpose(1, 2)) < 1e-2


@pytest.mark.parametrize("stride", [64, 8])
def test_packed_sequences_equal_each_alone(stride):
    lengths = (1200, 0, 1, 333, 2048)
    total = sum(lengths)
    inputs = make_inputs(total + 77, 4, 2, 64, torch.bfloat16)
    for x in inputs:
        x[:, total:] = float("nan")
    bounds = torch.tensor([0, 1200, 1200, 1201, 1534, total], dtype=torch.int32, device="cuda")
    d_out = torch.randn_like(inputs[0]).nan_to_num()
    options = {"topk": 64, "window": 64, "stride": stride}
    packed = run(inputs, d_out, cu_seqlens=bounds, **options)
    for a, b in ((0, 1200), (1200, 1201), (1201, 1534), (1534, total)):
        alone = run([x[:, a:b].contiguous() for x in inputs], d_out[:, a:b], **options)
        for name, x, y in zip(NAMES, packed, alone, strict=True):
            assert error(x[:, a:b], y) < 1e-2, name
    for x in packed:
        assert (x[:, total:] == 0).all()


def test_strided_inputs_and_batches():
    sbhd = [x.transpose(0, 1).contiguous() for x in make_inputs(900, 4, 2, 128, torch.bfloat16, batch=3)]
    check([x.transpose(0, 1) for x in sbhd], topk=64, window=64, stride=64)


def test_misaligned_inputs_after_aligned_ones():
    """Remembered launches belong to one alignment of the pointers."""
    inputs = make_inputs(700, 4, 2, 64, torch.bfloat16)
    kw = {"topk": 32, "window": 48}
    aligned = [sparsek_attention(*inputs, **kw) for _ in range(2)][1]
    shifted = [x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in inputs]
    assert all(x.data_ptr() % 16 for x in shifted)
    for _ in range(2):
        assert error(sparsek_attention(*shifted, **kw), aligned) < 1e-2


def test_bitwise_deterministic():
    inputs = make_inputs(5000, 8, 2, 128, torch.bfloat16)
    d_out = torch.randn_like(inputs[0])
    first, second = (run(inputs, d_out, topk=128, window=128) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_score_gradient_sums_to_zero():
    inputs = make_inputs(4000, 4, 2, 64, torch.float32)
    du = run(inputs, torch.randn_like(inputs[0]), topk=64, window=64)[-1]
    assert (du.sum(1).abs() < 1e-4 * du.abs().sum(1)).all()


def test_opcheck():
    inputs = make_inputs(300, 4, 2, 64, torch.float32)
    selection = select(inputs[3], topk=16, window=16)
    fields = (
        "threshold",
        "threshold_low",
        "evict",
        "lists",
        "fraction_start",
        "fraction_end",
        "fraction_size",
    )
    args = (*(x.requires_grad_() for x in inputs), *(getattr(selection, f) for f in fields))
    settings = (None, 16, 16, 64, 64, 0, "key_value", 0.125)
    torch.library.opcheck(torch.ops.sparsek.attention.default, (*args, *settings))


def test_compiles_without_graph_breaks():
    inputs = make_inputs(1000, 4, 2, 64, torch.bfloat16)
    function = torch.compile(lambda *x: sparsek_attention(*x, topk=64, window=64) * 2, fullgraph=True)
    assert torch.equal(function(*inputs), sparsek_attention(*inputs, topk=64, window=64) * 2)


def test_activation_checkpointing_gives_the_same_bits():
    inputs = make_inputs(1500, 4, 2, 64, torch.bfloat16)
    d_out = torch.randn_like(inputs[0])
    plain = run(inputs, d_out, topk=64, window=64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = checkpoint(lambda *x: sparsek_attention(*x, topk=64, window=64), *leaves, use_reentrant=False)
    recomputed = [out, *torch.autograd.grad(out, leaves, d_out)]
    for x, y in zip(plain, recomputed, strict=True):
        assert torch.equal(x, y)


def test_cuda_graph_replays_on_new_inputs():
    inputs = [x.requires_grad_() for x in make_inputs(3000, 4, 2, 64, torch.bfloat16)]
    d_out = torch.randn_like(inputs[0])

    def step():
        out = sparsek_attention(*inputs, topk=64, window=64)
        return (out, *torch.autograd.grad(out, inputs, d_out))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = make_inputs(3000, 4, 2, 64, torch.bfloat16)
    with torch.no_grad():
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


def test_no_host_synchronisation():
    inputs = [x.requires_grad_() for x in make_inputs(3000, 4, 2, 64, torch.bfloat16)]
    d_out = torch.randn_like(inputs[0])
    for _ in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            out = sparsek_attention(*inputs, topk=64, window=64)
            torch.autograd.grad(out, inputs, d_out)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_extra_memory_is_bounded():
    n, hq, hkv, d = 32768, 32, 8, 128
    inputs = [x.requires_grad_() for x in make_inputs(n, hq, hkv, d, torch.bfloat16)]
    d_out = torch.randn_like(inputs[0])
    run_once = lambda: torch.autograd.grad(sparsek_attention(*inputs, topk=512, window=512), inputs, d_out)  # noqa: E731
    run_once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = run_once()
    peak = torch.cuda.max_memory_allocated() - before
    owed = inputs[0].nbytes + sum(x.nbytes for x in gradients)  # out and the gradients themselves
    essential = 2 * (2 * inputs[0].nbytes + inputs[1].nbytes + inputs[2].nbytes)
    assert peak - owed <= 0.25 * essential, f"{(peak - owed) / essential:.2%}"
