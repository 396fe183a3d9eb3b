# SPDX-License-Identifier: Apache-2.0
"""Chunked loss, checkpoint offload and tiled MLP change where numbers are, not what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mcore_harness import (
    RECOMPUTE,
    batch,
    build_gpt,
    build_small_gpt,
    full_weights,
    load_full,
    loss_and_gradients,
    randomise,
    relative_errors,
    tiny_config,
)
from megatron.core.transformer.mlp import MLP

from sparsek_megatron import (
    SparseKConfig,
    get_sparsek_block_spec,
    get_sparsek_layer_spec,
    get_sparsek_mtp_block_spec,
)
from sparsek_megatron.memory import (
    use_checkpoint_offload,
    use_chunked_loss,
    use_tiled_mlp,
)

SPARSEK = SparseKConfig(topk=32, window=32, stride=4, reference_length=64)


@pytest.fixture
def ordinary(megatron: None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, gradients) without recompute or any option, in float64."""
    model = build_small_gpt(params_dtype=torch.float64)
    randomise(model)
    return full_weights(model), loss_and_gradients(model, batch())[1]


@pytest.mark.parametrize(
    ("recompute", "layers", "again", "tile"),
    [(RECOMPUTE, 2, 0, None), (RECOMPUTE, 2, 1, None), (RECOMPUTE, 3, 1, 24),
     (RECOMPUTE | {"recompute_num_layers": 3}, 1, 0, 24), (RECOMPUTE | {"recompute_method": "block"}, 2, 0, 40),
     (RECOMPUTE | {"recompute_method": "block", "recompute_num_layers": 2}, 2, 1, 40), ({}, 0, 0, 24),
     ({}, 0, 0, 1000)],
)  # fmt: skip
def test_gradients_are_those_of_the_ordinary_model(ordinary, recompute, layers, again, tile) -> None:
    weights, want = ordinary
    model = build_small_gpt(params_dtype=torch.float64, **recompute)
    load_full(model, weights)
    if layers:
        use_checkpoint_offload(model, num_layers=layers, recompute_inputs=again)
    if tile:
        use_tiled_mlp(model, tile_tokens=tile)
    for _ in range(2):
        errors = relative_errors(loss_and_gradients(model, batch())[1], want)
        assert max(errors.values()) < 1e-12, errors


def test_tiles_of_multi_token_prediction_layers_are_computed_again_in_their_recompute(megatron: None) -> None:
    """There the norm behind the MLP is recomputed with it, and reads its output."""

    def gradients(*, tile: int | None = None, **recompute: Any) -> dict[str, torch.Tensor]:
        config = tiny_config(mtp_num_layers=1, params_dtype=torch.float64, **recompute)
        torch.manual_seed(1)
        spec = get_sparsek_block_spec(config, sparsek=SPARSEK)
        prediction = get_sparsek_mtp_block_spec(config, spec)
        model = build_gpt(config, spec, mtp_block_spec=prediction)
        randomise(model)
        if tile:
            use_tiled_mlp(model, tile_tokens=tile)
        return loss_and_gradients(model, batch())[1]

    errors = relative_errors(gradients(tile=24, **RECOMPUTE), gradients())
    assert max(errors.values()) < 1e-12, errors


def test_a_recomputed_layers_output_takes_no_memory(ordinary, monkeypatch) -> None:
    sizes: list[int] = []
    backward = torch.autograd.backward

    def spy(outputs: Any, *args: Any, **kwargs: Any) -> None:
        if not kwargs:  # a checkpoint's, not the loss's
            sizes.append(outputs[0].untyped_storage().size() // outputs[0].itemsize)
        backward(outputs, *args, **kwargs)

    monkeypatch.setattr("megatron.core.tensor_parallel.random.torch.autograd.backward", spy)
    model = build_small_gpt(**RECOMPUTE)
    loss_and_gradients(model, batch())
    assert sizes == 3 * [batch()[0].numel() * model.config.hidden_size]
    sizes.clear()
    loss_and_gradients(use_tiled_mlp(model, tile_tokens=24), batch())
    assert sizes == 3 * [1]


@pytest.mark.parametrize("changes", [{}, {"recompute_granularity": "selective"}, {"qk_layernorm": True}])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_backward_keeps_keys_and_values_without_the_projection_they_are_views_of(
    megatron: None, positions: str, changes: dict[str, Any]
) -> None:
    config = tiny_config(num_layers=1, **changes)
    spec = get_sparsek_layer_spec(config, sparsek=SPARSEK)
    model = build_gpt(config, spec, position_embedding_type=positions)
    kept: dict[int, torch.Tensor] = {}
    projections: list[torch.Tensor] = []
    attention: Any = model.decoder.layers[0].self_attention
    attention.linear_qkv.register_forward_hook(
        lambda _module, _inputs, output: projections.append(output[0])  # alive: nothing else lies there
    )

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens, where, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, where, None, labels=labels)
    assert len(projections) == 1 and projections[0].untyped_storage().data_ptr() not in kept


def test_tiles_bound_what_the_mlp_sees_and_recompute_runs_each_once_more(ordinary, monkeypatch) -> None:
    seen: list[int] = []
    whole = MLP.forward
    monkeypatch.setattr(
        MLP, "forward", lambda self, x, *a, **k: (seen.append(x.shape[0]), whole(self, x, *a, **k))[1]
    )
    model = use_tiled_mlp(build_small_gpt(**RECOMPUTE), tile_tokens=32)
    loss_and_gradients(model, batch())
    assert seen == 3 * 2 * [16, 16, 16, 16]


def test_an_unweighted_parameter_gets_no_gradient(ordinary) -> None:
    model = use_tiled_mlp(build_small_gpt(), tile_tokens=32)
    frozen = model.decoder.layers[1].mlp.linear_fc1.weight
    frozen.requires_grad_(False)
    tokens, positions, labels = batch()
    model(tokens, positions, None, labels=labels).mean().backward()
    assert frozen.grad is None
    assert model.decoder.layers[1].mlp.linear_fc2.weight.grad is not None


def test_refusals_name_the_flag(megatron: None) -> None:
    with pytest.raises(NotImplementedError, match="--recompute-granularity full"):
        use_checkpoint_offload(build_small_gpt(), num_layers=1)
    with pytest.raises(ValueError, match="--cpu-offloading-num-layers 4: must be between 0 and the 3 layers"):
        use_checkpoint_offload(build_small_gpt(**RECOMPUTE), num_layers=4)
    with pytest.raises(ValueError, match="--recompute-inputs 2: must be between 0 and 1, half of the layers"):
        use_checkpoint_offload(build_small_gpt(**RECOMPUTE), num_layers=3, recompute_inputs=2)
    with pytest.raises(NotImplementedError, match=r"--recompute-inputs 1: .*--recompute-num-layers is 3; use 1"):
        model = build_small_gpt(**RECOMPUTE | {"recompute_num_layers": 3})
        use_checkpoint_offload(model, num_layers=2, recompute_inputs=1)
    with pytest.raises(ValueError, match="--mlp-tile-tokens 0"):
        use_tiled_mlp(build_small_gpt(), tile_tokens=0)
    model = build_small_gpt()
    model.config.gradient_accumulation_fusion = True
    with pytest.raises(NotImplementedError, match="--no-gradient-accumulation-fusion"):
        use_tiled_mlp(model, tile_tokens=8)
    model.config.mtp_num_layers = 1
    with pytest.raises(NotImplementedError, match="--mtp-num-layers 1"):
        use_chunked_loss(model)
