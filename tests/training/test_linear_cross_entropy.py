# SPDX-License-Identifier: Apache-2.0
"""The chunked linear cross entropy against whole logits in float64: losses, both gradients, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from sparsek_megatron.memory import linear_cross_entropy as module
from sparsek_megatron.memory.linear_cross_entropy import linear_cross_entropy

LENGTH, BATCH, HIDDEN, VOCABULARY = 13, 3, 8, 37


def inputs(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    hidden = scale * torch.randn(LENGTH, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    d_loss = torch.randn(BATCH, LENGTH, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, d_loss


def whole(hidden, weight, labels):
    logits = hidden.double() @ weight.double().t()
    return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 36, 39, 1000, None])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_losses_and_gradients_are_those_of_whole_logits(chunk_tokens, dtype, tolerance):
    hidden, weight, labels, d_loss = inputs(dtype)
    want = whole(hidden, weight, labels)
    want_grads = torch.autograd.grad(want, (hidden, weight), d_loss)
    got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    got_grads = torch.autograd.grad(got, (hidden, weight), d_loss.to(dtype))
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_large_logits_do_not_overflow():
    hidden, weight, labels, d_loss = inputs(torch.float32, scale=1e4)
    got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    assert torch.allclose(got.double(), whole(hidden, weight, labels), rtol=1e-5)
    grads = torch.autograd.grad(got, (hidden, weight), d_loss.float())
    assert all(torch.isfinite(g).all() for g in grads)


def test_bfloat16_weight_gradients_do_not_lose_small_chunks():
    """Each chunk adds the same small amount: summed in bfloat16, all but the first few would be lost."""
    hidden = torch.full((512, 1, 1), 0.01, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 512, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=1).sum().backward()
    assert weight.grad is not None
    want = 512 * 0.5 * float(hidden[0])
    assert abs(float(weight.grad[1]) - want) < 0.01 * want


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    seen = []
    for name in ("_row_statistics", "_row_gradient"):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda x, *rest, f=function: (seen.append(tuple(x.shape)), f(x, *rest))[1]
        )
    hidden, weight, labels, _ = inputs()
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=12).sum().backward()
    assert seen == 2 * (3 * [(12, VOCABULARY)] + [(3, VOCABULARY)])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen):
    hidden, weight, labels, _ = inputs()
    (hidden, weight)[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=5).sum().backward()
    assert (hidden, weight)[frozen].grad is None
    assert (hidden, weight)[1 - frozen].grad is not None


def test_what_does_not_fit_is_named():
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match=r"labels \(13, 3\)"):
        linear_cross_entropy(hidden, weight, labels.t())
    with pytest.raises(ValueError, match=r"weight \(37, 7\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 1000])
def test_on_a_gpu_in_bfloat16(tokens):
    generator = torch.Generator(device="cuda").manual_seed(1)
    hidden = torch.randn(tokens, 1, 512, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(8000, 512, generator=generator, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(0, 8000, (1, tokens), generator=generator, device="cuda")
    d_loss = torch.rand(1, tokens, generator=generator, device="cuda")
    want = whole(hidden, weight, labels)
    want_grads = torch.autograd.grad(want, (hidden, weight), d_loss.double())
    got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=768)
    got_grads = torch.autograd.grad(got, (hidden, weight), d_loss)
    assert (got - want).abs().max() < 2e-2  # logits are rounded to bfloat16, as in the ordinary path
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a - b).abs().max() <= 1e-2 * b.abs().max()
