# SPDX-License-Identifier: Apache-2.0
"""The plug-in on one GPU: Triton kernels inside a GPT, recompute, and CUDA graph capture of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu


def gpt(**changes: Any) -> Any:
    from mcore_harness import build_gpt, tiny_config

    from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec

    torch.manual_seed(2)
    config = tiny_config(
        use_cpu_initialization=False,
        hidden_size=256,
        kv_channels=64,
        bf16=True,
        params_dtype=torch.bfloat16,
        **changes,
    )
    sparsek = SparseKConfig(topk=32, window=32, stride=16)
    return build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek, transformer_impl="local")).cuda()


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from mcore_harness import batch

    tokens, positions, labels = (x.cuda() for x in batch(256))
    loss = model(tokens, positions, None, labels=labels).float().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.usefixtures("megatron_on_cuda")
def test_recompute_changes_no_bit_on_gpu() -> None:
    plain = gpt()
    loss, wanted = step(plain)
    assert torch.isfinite(loss) and all(g is not None and torch.isfinite(g).all() for g in wanted.values())
    for changes in (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ):
        model = gpt(**changes)
        model.load_state_dict(plain.state_dict())
        again, got = step(model)
        assert torch.equal(loss, again)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.usefixtures("megatron_on_cuda")
def test_a_layer_is_captured_in_a_cuda_graph() -> None:
    layer = gpt().decoder.layers[0]
    x = torch.randn(512, 1, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run() -> torch.Tensor:
        y, _ = layer(x, attention_mask=None)
        y.float().square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer.zero_grad()
            x.grad = None
            eager = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert x.grad is not None
    want = [eager.detach().clone(), x.grad.clone(), layer.self_attention.scorer.weight.grad.clone()]
    layer.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        graph.replay()
    got = [captured, x.grad, layer.self_attention.scorer.weight.grad]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("megatron_on_cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_score_does_not_depend_on_the_tokens_beside_it_on_gpu(dtype: torch.dtype) -> None:
    from sparsek_megatron.linear_score import linear_score

    x = torch.randn(5000, 768, device="cuda", dtype=dtype)
    w = torch.randn(768, 8, device="cuda", dtype=dtype)
    whole = linear_score(x, w)
    torch.testing.assert_close(whole.double(), x.double() @ w.double(), rtol=1e-4, atol=1e-3)
    for size in (1, 100, 1250, 2500):
        assert torch.equal(torch.cat([linear_score(part, w) for part in x.split(size)]), whole), size
