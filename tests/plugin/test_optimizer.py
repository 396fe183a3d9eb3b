# SPDX-License-Identifier: Apache-2.0
"""What Megatron's optimizer and gradient reduction read from parameters."""

from __future__ import annotations

import pytest
import torch
from mcore_harness import build_gpt, tiny_config
from megatron.core.optimizer import OptimizerConfig, _get_param_groups

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.optimizer import scorer_config_overrides

pytestmark = pytest.mark.usefixtures("megatron")


def groups(**settings: float) -> dict[str, dict]:
    """The parameter group of each parameter, by name."""
    sparsek = SparseKConfig(topk=4, window=4, scorer_norm=True, **settings)  # pyright: ignore[reportArgumentType]
    config = tiny_config(qk_layernorm=True, sequence_parallel=False)
    model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek))
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    made = _get_param_groups([model], optimizer, scorer_config_overrides(optimizer, sparsek))
    return {names[id(p)]: group for group in made for p in group["params"]}


def test_slope_and_norms_are_left_out_of_weight_decay() -> None:
    for name, group in groups().items():
        decayed = not ("norm" in name or name.endswith("slope"))
        assert group["wd_mult"] == (1.0 if decayed else 0.0), name


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_the_scorers_learning_rate_is_multiplied_and_no_other(factor: float) -> None:
    found = groups(scorer_lr_mult=factor)
    assert sum("scorer" in name for name in found) == 6
    for name, group in found.items():
        mine = factor if "scorer" in name else 1.0
        assert group["max_lr"] == pytest.approx(1e-3 * mine), name
        assert group["min_lr"] == pytest.approx(1e-4 * mine), name


def test_nothing_asks_megatron_to_sum_a_complete_gradient_again() -> None:
    config = tiny_config(qk_layernorm=True, sequence_parallel=True, tensor_model_parallel_size=2)
    model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=4, window=4)))
    for name, parameter in model.named_parameters():
        if "scorer" in name or "norm" in name:
            assert not getattr(parameter, "sequence_parallel", False), name
            assert not getattr(parameter, "tensor_model_parallel", False), name
            averaged = getattr(parameter, "average_gradients_across_tp_domain", False)
            assert averaged == ("q_layernorm" in name or "k_layernorm" in name), name


def test_attributes_survive_conversion_to_half_precision() -> None:
    config = tiny_config()
    model = build_gpt(
        config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=4, window=4))
    ).bfloat16()
    scorer = model.decoder.layers[0].self_attention.scorer
    assert all(getattr(p, "sparsek_scorer", False) and p.dtype == torch.bfloat16 for p in scorer.parameters())
    assert scorer.reference_length.dtype == torch.int64
