# SPDX-License-Identifier: Apache-2.0
"""Layer inputs that leave the GPU, or are computed again, come back bit by bit, and so does their memory."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from mcore_harness import RECOMPUTE, batch, build_small_gpt, loss_and_gradients, randomise
from megatron.core.transformer.transformer_layer import TransformerLayer

from sparsek_megatron.memory import use_checkpoint_offload
from sparsek_megatron.memory.checkpoint_offload import CheckpointOffload


def test_offload_takes_the_first_layers_inputs_and_uses_its_buffers_again(megatron: None, monkeypatch) -> None:
    taken, returned, addresses = [], [], []
    take, bring_back = CheckpointOffload.take, CheckpointOffload.bring_back

    def spy(self: CheckpointOffload, tensor: torch.Tensor) -> Any:
        taken.append(take(self, tensor))
        addresses.append(taken[-1].host.data_ptr())
        return taken[-1]

    monkeypatch.setattr(CheckpointOffload, "take", spy)
    monkeypatch.setattr(
        CheckpointOffload, "bring_back", lambda self, s: (returned.append(s), bring_back(self, s))[1]
    )
    model = use_checkpoint_offload(build_small_gpt(**RECOMPUTE), num_layers=2)
    for _ in range(2):
        loss_and_gradients(model, batch())
    assert len(taken) == 4
    assert returned == [taken[1], taken[0], taken[3], taken[2]]
    assert set(addresses[:2]) == set(addresses[2:]) and len(set(addresses)) == 2


def test_every_second_of_the_first_inputs_is_computed_again_and_not_kept(megatron: None, monkeypatch) -> None:
    def gradients(**options: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = build_small_gpt(num_layers=6, **RECOMPUTE)
        randomise(model)
        if options:
            use_checkpoint_offload(model, **options)
        return loss_and_gradients(model, batch())[1]

    want = gradients()
    taken, calls = [], []
    take, call = CheckpointOffload.take, TransformerLayer.forward
    monkeypatch.setattr(CheckpointOffload, "take", lambda self, x: (taken.append(take(self, x)), taken[-1])[1])
    monkeypatch.setattr(
        TransformerLayer,
        "forward",
        lambda self, *args, **kwargs: (calls.append(self.layer_number), call(self, *args, **kwargs))[1],
    )
    got = gradients(num_layers=5, recompute_inputs=2)
    assert all(torch.equal(got[name], x) for name, x in want.items())
    assert [type(x).__name__ for x in taken] == ["_Saved", "_Dropped", "_Saved", "_Dropped", "_Saved"]
    assert calls[:6] == [1, 2, 3, 4, 5, 6]
    assert calls[6:] == [6, 5, 3, 4, 3, 1, 2, 1]  # the input of 4 by 3, that of 2 by 1


@pytest.mark.parametrize(
    "changes",
    [{"hidden_dropout": 0.1}, {"num_moe_experts": 4, "moe_input_jitter_eps": 0.05}],
    ids=["dropout", "jitter"],
)
def test_a_layer_that_draws_random_numbers_draws_the_same_again(megatron: None, changes: dict[str, Any]) -> None:
    def gradients(**options: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        model = build_small_gpt(num_layers=4, **RECOMPUTE, **changes)
        randomise(model)
        use_checkpoint_offload(model, num_layers=4, **options)
        torch.manual_seed(4)
        return loss_and_gradients(model, batch())[1], torch.get_rng_state()

    (want, state), (got, after) = gradients(), gradients(recompute_inputs=2)
    assert all(torch.equal(got[name], x) for name, x in want.items()) and torch.equal(state, after)


def test_what_is_no_checkpointed_layers_input_is_kept(megatron: None) -> None:
    """With a frozen embedding the first layers save nothing; in eval mode none is checkpointed."""

    def gradients(*, frozen: bool, **options: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        block = RECOMPUTE | {"recompute_method": "block", "recompute_num_layers": 4}
        model = build_small_gpt(num_layers=6, **(block if frozen else RECOMPUTE)).train(frozen)
        randomise(model)
        model.embedding.word_embeddings.weight.requires_grad_(not frozen)
        use_checkpoint_offload(model, num_layers=6 if frozen else 4, **options)
        tokens, positions, labels = batch()
        model(tokens, positions, None, labels=labels).mean().backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    for frozen in (True, False):
        want, got = gradients(frozen=frozen), gradients(frozen=frozen, recompute_inputs=2)
        assert want.keys() == got.keys() and all(torch.equal(got[name], x) for name, x in want.items())


def test_memory_comes_back_from_a_forward_without_backward_and_a_backward_that_failed(megatron: None) -> None:
    model = use_checkpoint_offload(build_small_gpt(num_layers=4, **RECOMPUTE), num_layers=3)
    (offload,) = {hook.__self__ for hook in model.decoder.layers[0].self_attention._forward_hooks.values()}
    tokens, positions, labels = batch()

    def free() -> int:
        return sum(len(buffers) for buffers in offload.free.values())

    model(tokens, positions, None, labels=labels)
    gc.collect()
    assert free() == 3
    mlp = model.decoder.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda *_: 1 / 0 if torch.is_grad_enabled() else None)
    with pytest.raises(ZeroDivisionError):
        model(tokens, positions, None, labels=labels).mean().backward()
    handle.remove()
    loss_and_gradients(model, batch())
    gc.collect()
    assert offload.next is None and free() == 3


def test_a_host_without_memory_names_the_flag(monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("6.0 GiB of host memory could not be pinned: no")

    monkeypatch.setattr("sparsek_megatron.memory.checkpoint_offload.pinned_empty", refuse)
    on_gpu: Any = SimpleNamespace(shape=(2,), dtype=torch.float32, is_cuda=True)
    with pytest.raises(RuntimeError, match=r"^--cpu-offloading-num-layers 5.*6\.0 GiB .* raise --recompute-inputs 2$"):
        CheckpointOffload(5, dropped=2)._host_buffer(on_gpu)


def test_the_next_input_returns_when_a_layers_backward_is_through_its_mlp(megatron: None, monkeypatch) -> None:
    seen: list[str] = []
    model = use_checkpoint_offload(build_small_gpt(**RECOMPUTE), num_layers=3)
    for number, layer in enumerate(model.decoder.layers):

        def through(_module: Any, inputs: Any, number: int = number) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: seen.append(f"MLP {number} done"))

        layer.mlp.register_forward_pre_hook(through)
    copied, bring_back = torch.empty_like, CheckpointOffload.bring_back
    monkeypatch.setattr(
        CheckpointOffload, "bring_back", lambda self, x: (seen.append("asked for"), bring_back(self, x))[1]
    )
    monkeypatch.setattr(
        "sparsek_megatron.memory.checkpoint_offload.torch.empty_like",
        lambda x, **kwargs: (kwargs == {"device": "cpu"} and seen.append("fetched"), copied(x, **kwargs))[1],
    )
    loss_and_gradients(model, batch())
    first, following = ["asked for", "fetched", "MLP 2 done"], ["fetched", "asked for"]
    assert seen == [*first, *following, "MLP 1 done", *following, "MLP 0 done"]


def test_a_hidden_state_of_any_layout_returns_whole() -> None:
    offload = CheckpointOffload(1)
    hidden = torch.randn(5, 3, 2, dtype=torch.float64).transpose(0, 1)
    saved = offload.take(hidden)
    want = hidden.clone()
    hidden.zero_()
    assert torch.equal(offload.bring_back(saved), want)


@pytest.mark.gpu
@pytest.mark.parametrize("again", [0, 3])
def test_offload_on_a_gpu_is_bitwise_and_frees_memory(again: int) -> None:
    """Hidden states of 8 MiB pass through pinned memory while a stand-in for layers computes."""

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Sequential(
                    torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16), torch.nn.Tanh()
                )
                for _ in range(8)
            )

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden_states = torch.utils.checkpoint.checkpoint(
                    lambda x, f=layer: f(x), hidden_states, use_reentrant=True
                )
            return hidden_states

    torch.manual_seed(0)
    model: Any = torch.nn.Module()
    model.decoder = Decoder()
    model.config = tiny_config_without_groups()
    x = torch.randn(4096, 1, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> tuple[list[torch.Tensor], int]:
        model.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = model.decoder(x)
        held = torch.cuda.memory_allocated() - before
        out.float().square().sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in model.parameters())], held  # pyright: ignore

    want, all_held = step()
    use_checkpoint_offload(model, num_layers=6, recompute_inputs=again)
    for _ in range(3):
        got, held = step()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert held <= all_held - 5 * x.numel() * 2


def tiny_config_without_groups() -> Any:
    """What `use_checkpoint_offload` reads of a configuration."""
    return SimpleNamespace(num_layers=8, fp8=None, **RECOMPUTE)
