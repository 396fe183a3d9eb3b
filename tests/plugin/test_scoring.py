# SPDX-License-Identifier: Apache-2.0
"""The scoring network: its formula, its initial spread, one optimizer step, and scores independent of the batch."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from mcore_harness import tiny_config
from megatron.core import parallel_state

from sparsek_megatron import ScoringNetwork, SparseKConfig
from sparsek_megatron.linear_score import (
    linear_score,
    linear_score_backward_triton,
    linear_score_torch,
    linear_score_triton,
)

pytestmark = pytest.mark.usefixtures("megatron")


def scorer(own_norm: bool = False, hidden_size: int = 32, **settings: Any) -> ScoringNetwork:
    settings = {"topk": 4, "window": 4, "reference_length": 4096, **settings}
    config = tiny_config(hidden_size=hidden_size)
    group = parallel_state.get_tensor_model_parallel_group()
    return ScoringNetwork(config, SparseKConfig(**settings), tp_group=group, own_norm=own_norm)


def normalised(*shape: int, seed: int = 5) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def test_score_is_the_linear_form_plus_the_relative_slope() -> None:
    network = scorer()
    torch.nn.init.normal_(network.slope)
    x = normalised(7, 2, 32)
    positions = torch.tensor([0, 1, 2, 100, 101, 4095, 4096])
    want = torch.einsum("sbh,hn->bsn", x.double(), network.weight.double())
    want = want + network.slope.double() * (positions.double() / 4096)[None, :, None]
    got = network(x, positions)
    assert got.dtype == torch.float32 and got.shape == (2, 7, 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_positions_may_differ_between_rows() -> None:
    network = scorer()
    torch.nn.init.ones_(network.slope)
    x = normalised(3, 2, 32)
    rows = torch.tensor([[0, 1, 2], [4096, 4097, 4098]])
    got = network(x, rows)
    torch.testing.assert_close(got[0], network(x, rows[0])[0])
    torch.testing.assert_close(got[1], network(x, rows[1])[1])


# (KV heads, tensor-parallel size, rank): all heads on one rank, several or one a rank, one that two ranks use
LAYOUTS = [(2, 1, 0), (1, 1, 0), (4, 2, 1), (2, 2, 1), (2, 4, 3), (1, 2, 1)]


def own_heads(groups: int, tp: int, rank: int) -> list[int]:
    """KV heads that Megatron gives a rank."""
    per_rank = groups / tp
    return sorted({int(per_rank * rank + k * min(1, per_rank)) for k in range(max(1, groups // tp))})


@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("positions", ["counted", "shared", "by row"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_all_gradients_match_double_precision(
    layout: tuple[int, int, int],
    batch: int,
    positions: str,
    kind: str,
    slope: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one rank of a group whose sum over ranks is left out: tests/distributed has it."""
    monkeypatch.setattr(ScoringNetwork, "_summed_in_backward", lambda self, weight: weight)
    groups, tp, rank = layout
    config = tiny_config(num_query_groups=groups)
    settings = SparseKConfig(topk=4, window=4, reference_length=16, scorer=kind, position_slope=slope)
    group: Any = types.SimpleNamespace(size=lambda: tp, rank=lambda: rank)
    network = ScoringNetwork(config, settings, tp_group=group)
    if network.slope is not None:
        torch.nn.init.normal_(network.slope)
    tokens = 111
    x = normalised(tokens, batch, 32).requires_grad_()
    places = {
        "counted": torch.arange(tokens),
        "shared": torch.arange(tokens) % 40,
        "by row": torch.arange(tokens) + 7 * torch.arange(batch)[:, None],
    }[positions]
    leaves = {"x": x, **dict(network.named_parameters())}
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    inside = exact["x"]
    if kind == "mlp":
        inside = inside @ exact["hidden_weight"]
        inside = inside * torch.sigmoid(inside)
    want = torch.einsum("sbh,hn->bsn", inside, exact["weight"])
    if slope:
        want = want + exact["slope"] * (places.double() / 16).expand(batch, tokens)[..., None]
    want = want[..., own_heads(*layout)]
    got = network(x, None if positions == "counted" else places)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    d_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(got, list(leaves.values()), d_out)
    exact_gradients = torch.autograd.grad(want, list(exact.values()), d_out.double())
    for name, gradient, wanted in zip(leaves, gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32, name
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def nodes(tensor: torch.Tensor) -> list[str]:
    """Names of the autograd nodes behind a tensor, parameters' left out."""
    found, waiting = [], [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node.name() != "torch::autograd::AccumulateGrad":
            found.append(node.name())
            waiting += [following for following, _ in node.next_functions]
    return found


def test_a_rank_on_its_own_scores_in_two_autograd_nodes() -> None:
    x = normalised(7, 1, 32)
    assert nodes(scorer()(x, None)) == ["_PositionScoresBackward", "_LinearScoreBackward"]
    plain = scorer(position_slope=False)(x, None)
    assert nodes(plain)[-1] == "_LinearScoreBackward" and plain._is_view() and plain.is_contiguous()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_initial_scores_have_the_configured_spread(kind: str, spread: float) -> None:
    torch.manual_seed(0)
    network = scorer(hidden_size=256, scorer=kind, score_spread=spread)
    scores = network(normalised(4096, 1, 256), torch.zeros(4096))
    assert scores.std(1).mean().item() == pytest.approx(spread, rel=0.25)


def test_own_norm_makes_the_score_independent_of_the_input_scale() -> None:
    network = scorer(own_norm=True)
    x = normalised(16, 1, 32)
    torch.testing.assert_close(
        network(x, torch.arange(16)), network(100 * x, torch.arange(16)), rtol=1e-4, atol=1e-5
    )
    assert "norm.weight" in dict(network.named_parameters())
    assert "norm.weight" not in dict(scorer().named_parameters())


def test_one_adam_step_on_the_slope_moves_no_score_by_more_than_a_hundredth_of_a_gate() -> None:
    length = 131_072
    network = scorer(reference_length=length)
    x = normalised(64, 1, 32)
    positions = torch.linspace(0, length - 1, 64).round()
    before = network(x, positions)
    optimizer = torch.optim.Adam([network.slope], lr=1e-3)
    network(x, positions).sum().backward()
    optimizer.step()
    moved = (network(x, positions) - before).abs().max()
    assert 1e-4 < moved <= 0.01


def test_slope_starts_where_asked_and_the_reference_length_is_saved_with_the_model() -> None:
    network = scorer(reference_length=1000)
    assert (network.slope == 1000 / 4).all()  # topk 4: a score falls by 1 in topk tokens
    assert not scorer(initial_slope=0.0).slope.any() and (scorer(initial_slope=16.0).slope == 16).all()
    other = scorer(reference_length=77)
    with pytest.warns(UserWarning, match="reference_length=77 in the configuration, 1000 in the checkpoint"):
        other.load_state_dict(network.state_dict())
    assert other.reference_length == 1000
    with pytest.warns(UserWarning, match="reference_length=77 in the configuration, 1000 in the checkpoint"):
        other.load_state_dict(other.state_dict())  # loaded in place before, as dist_checkpointing does
    assert scorer(position_slope=False).slope is None


def test_reference_length_follows_max_position_embeddings_and_never_the_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config()
    group = parallel_state.get_tensor_model_parallel_group()
    assert ScoringNetwork(config, SparseKConfig(), tp_group=group).reference_length == 131_072
    running = types.ModuleType("megatron.training.global_vars")
    running._GLOBAL_ARGS = types.SimpleNamespace(max_position_embeddings=4096)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", running)
    assert ScoringNetwork(config, SparseKConfig(), tp_group=group).reference_length == 4096
    config.max_position_embeddings = 2048
    assert ScoringNetwork(config, SparseKConfig(), tp_group=group).reference_length == 2048


def test_detached_scores_send_no_gradient_into_the_hidden_states() -> None:
    for detach in (True, False):
        x = normalised(8, 1, 32).requires_grad_()
        network = scorer(detach_hidden=detach)
        network(x, torch.arange(8)).sum().backward()
        assert network.weight.grad is not None and network.weight.grad.any()
        assert (x.grad is None) == detach


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_score_does_not_depend_on_the_tokens_beside_it(dtype: torch.dtype) -> None:
    """Bitwise: alone, in shards of any size, and in the whole sequence."""
    x = normalised(1500, 1, 200).to(dtype)
    w = normalised(200, 3, seed=6).to(dtype)
    whole = linear_score(x, w)
    for size in (1, 3, 64, 375, 1024):
        assert torch.equal(torch.cat([linear_score(part, w) for part in x.split(size)]), whole), size
    assert torch.equal(linear_score(x.flip(0), w).flip(0), whole)


@pytest.mark.parametrize("shape", [(1, 5, 1), (70, 200, 3), (130, 64, 17)])
def test_triton_and_torch_scores_agree_and_match_double_precision(shape: tuple[int, int, int]) -> None:
    rows, hidden, columns = shape
    x = normalised(rows, hidden)
    w = normalised(hidden, columns, seed=8).contiguous()
    want = x.double() @ w.double()
    torch.testing.assert_close(linear_score_torch(x, w).double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear_score_triton(x, w).double(), want, rtol=1e-5, atol=1e-4)


def test_linear_score_gradients() -> None:
    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_score, (x, w))
    assert torch.autograd.gradgradcheck(linear_score, (x, w))


def test_linear_score_of_strided_inputs() -> None:
    x = torch.randn(9, 4, 6, dtype=torch.float64).transpose(0, 2)[..., :5].requires_grad_()
    w = torch.randn(3, 5, dtype=torch.float64).t().requires_grad_()
    assert torch.equal(linear_score(x, w), linear_score(x.detach().contiguous(), w.detach().contiguous()))
    assert torch.autograd.gradcheck(linear_score, (x, w))


@pytest.mark.parametrize("shape", [(1, 5, 1), (1100, 70, 3), (130, 200, 17)])
def test_the_kernels_gradients_match_double_precision(shape: tuple[int, int, int]) -> None:
    rows, hidden, columns = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden + 3, generator=generator)[:, :hidden]  # rows with a stride
    w, du = (torch.randn(n, columns, generator=generator) for n in (hidden, rows))
    dx, dw = linear_score_backward_triton(x, w, du)
    assert dx is not None and dw is not None
    torch.testing.assert_close(dx.double(), du.double() @ w.double().t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dw.double(), x.double().t() @ du.double(), rtol=1e-5, atol=1e-3)
    assert torch.equal(linear_score_backward_triton(x, w, du, needs_dw=False)[0], dx)
    assert torch.equal(linear_score_backward_triton(x, w, du, needs_dx=False)[1], dw)
