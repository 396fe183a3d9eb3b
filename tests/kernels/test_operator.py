# SPDX-License-Identifier: Apache-2.0
"""The SparseK operator: values against an independent projection, gradients, dtypes, layouts, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import project
from sparsek_kernels import sparsek
from sparsek_kernels.operator import _gates_torch
from sparsek_kernels.operator_kernel import gates_triton


@st.composite
def rows(draw, max_size: int = 40) -> tuple[np.ndarray, int]:
    """A row of float32 scores and a mass: any scale, often with ties, sometimes sorted or constant."""
    n = draw(st.integers(1, max_size))
    scale = draw(st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0, 1e6]))
    kind = draw(st.sampled_from(["normal", "grid", "constant", "rising", "falling", "uniform"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    z = rng.standard_normal(n)
    if kind == "grid":
        z = np.round(2 * z) / 2
    elif kind == "constant":
        z = np.full(n, z[0])
    elif kind == "rising":
        z = np.sort(z)
    elif kind == "falling":
        z = np.sort(z)[::-1]
    elif kind == "uniform":
        z = rng.random(n)
    k = draw(st.one_of(st.integers(1, n + 2), st.just(1), st.just(n)))
    return (z * scale).astype(np.float32), k


@given(rows())
@settings(max_examples=150, deadline=None)
def test_matches_projection(case):
    z, k = case
    gates = sparsek(torch.from_numpy(z.copy()), k)
    assert gates.dtype == torch.float32
    np.testing.assert_allclose(gates.numpy(), project(z, k), atol=2e-7)
    if k < len(z):
        assert abs(gates.double().sum().item() - k) < 1e-6 * len(z)


@given(rows(24))
@settings(max_examples=20, deadline=None)
def test_kernel_matches_projection(case):
    z, k = case
    if k >= len(z):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gates, fractional = (x.cpu() for x in gates_triton(torch.from_numpy(z.copy())[None].to(device), k))
    expected, members = _gates_torch(torch.from_numpy(z.copy())[None], k)
    np.testing.assert_allclose(gates[0].numpy(), project(z, k), atol=2e-7)
    torch.testing.assert_close(gates, expected, atol=1e-7, rtol=0)
    inner = (expected > 1e-6) & (expected < 1 - 1e-6)
    assert torch.equal(fractional[inner], members[inner])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 31, 4096, 5000, 65_536, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_on_gpu(n, dtype):
    generator = torch.Generator("cuda").manual_seed(n)
    for scale, offset in ((1.0, 0.0), (1e-4, 0.0), (1e3, 0.0), (1.0, 64.0), (0.0, 1.0)):
        z = (torch.randn(3, n, device="cuda", generator=generator) * scale + offset).to(dtype)
        for k in {1, n // 3 + 1, n - 1}:
            expected, _ = _gates_torch(z.cpu().double(), k)
            tolerance = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
            torch.testing.assert_close(sparsek(z, k).cpu().double(), expected, atol=tolerance, rtol=0)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    for n, k in ((5, 2), (7, 6), (4, 1), (3, 3)):
        z = (torch.randn(3, n, dtype=torch.float64) * 0.7).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, k=k: sparsek(x, k), z)
        assert torch.autograd.gradgradcheck(lambda x, k=k: sparsek(x, k), z)


def test_vjp_is_centred_on_fractional_entries():
    torch.manual_seed(0)
    z = torch.randn(16, 64).requires_grad_()
    gates = sparsek(z, 9)
    grad = torch.randn_like(gates)
    gates.backward(grad)
    inside = (gates > 0) & (gates < 1)
    mean = (grad * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
    torch.testing.assert_close(z.grad, torch.where(inside, grad - mean, 0.0), atol=1e-6, rtol=0)
    assert z.grad.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("k", [4, 9])
def test_mass_at_least_the_length_gives_ones_and_zero_gradient(k):
    z = torch.randn(2, 4, requires_grad=True)
    gates = sparsek(z, k)
    assert torch.equal(gates, torch.ones(2, 4))
    gates.sum().backward()
    assert torch.equal(z.grad, torch.zeros(2, 4))


def test_hard_row_is_exact_and_has_zero_gradient():
    z = torch.tensor([5.0, 0.0, 3.0, -7.0], requires_grad=True)
    gates = sparsek(z, 2)
    assert torch.equal(gates, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    (gates * torch.arange(4.0)).sum().backward()
    assert torch.equal(z.grad, torch.zeros(4))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_dimension_and_strides(dim):
    z = torch.randn(4, 5, 6).transpose(0, 2)
    gates = sparsek(z, 2, dim=dim)
    rows_ = z.movedim(dim, -1).reshape(-1, z.shape[dim])
    expected = np.stack([project(row, 2) for row in rows_.numpy()])
    np.testing.assert_allclose(gates.movedim(dim, -1).reshape(rows_.shape).numpy(), expected, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float64(dtype):
    z = torch.randn(3, 200).to(dtype)
    gates = sparsek(z, 20)
    assert gates.dtype == dtype
    expected = torch.tensor(np.stack([project(row, 20) for row in z.double().numpy()]))
    assert torch.equal(gates, expected.to(dtype))


def test_shift_and_signed_zero():
    z = torch.randn(8, 100)
    torch.testing.assert_close(sparsek(z + 1e4, 7), sparsek((z + 1e4) - 1e4, 7), atol=1e-3, rtol=0)
    z = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert torch.equal(sparsek(z, 2), torch.full((4,), 0.5))


def test_empty_rows_and_batches():
    assert sparsek(torch.empty(0, 5), 2).shape == (0, 5)
    assert sparsek(torch.empty(3, 0), 2).shape == (3, 0)


def test_custom_op_is_well_formed():
    torch.library.opcheck(torch.ops.sparsek.gates.default, (torch.randn(3, 8), 2))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(lambda x: sparsek(x, 3).square().sum(), backend="aot_eager", fullgraph=True)
    z = torch.randn(4, 9, requires_grad=True)
    compiled(z).backward()
    expected = torch.autograd.grad(sparsek(z, 3).square().sum(), z)[0]
    torch.testing.assert_close(z.grad, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.arange(4), 2), "scores must be a floating point tensor, got torch.int64"),
        ((torch.randn(4), 0), "k must be an int >= 1, got 0"),
        ((torch.randn(4), 2.0), "k must be an int >= 1, got 2.0"),
        ((torch.randn(4), True), "k must be an int >= 1, got True"),
        ((torch.randn(4), 2, 1), r"dim must be in \[-1, 0\], got 1"),
        ((torch.tensor(1.0), 1), "at least one dimension"),
    ],
)
def test_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        sparsek(*args)
