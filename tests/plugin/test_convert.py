# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models and dense state dicts become SparseK models that compute the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import te_stubs
import torch
from mcore_harness import batch, build_gpt, tiny_config
from megatron.core.models.gpt import gpt_layer_specs

from sparsek_megatron import SparseKConfig, get_sparsek_block_spec
from sparsek_megatron.convert.dense import dense_state_dict, load_dense_state_dict
from sparsek_megatron.convert.hf import import_config, load_weights

pytestmark = pytest.mark.usefixtures("megatron")

COVERING = SparseKConfig(topk=40, window=24, stride=8, pool=80)
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


def hf_model(kind: str, **changes: Any) -> Any:
    """A tiny random model of the real class."""
    import transformers

    torch.manual_seed(4)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4}),
        ("Qwen2", {"rms_norm_eps": 1e-6, "num_key_value_heads": 1}),
    ],
    ids=["llama", "llama-tied-head-dim", "llama3-rope-mha", "qwen2"],
)
def test_logits_equal_transformers_where_sparsek_covers_the_sequence(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    reference = hf_model(kind, **changes)
    reference.save_pretrained(tmp_path, safe_serialization=True)
    imported = import_config(tmp_path)
    config = tiny_config(**imported.transformer)
    model = build_gpt(config, get_sparsek_block_spec(config, sparsek=COVERING), **imported.gpt)
    left = load_weights(model, tmp_path)
    assert len(left) == 4 and all("scorer" in name for name in left)
    tokens, positions, _ = batch(64)
    with torch.no_grad():
        got, want = model(tokens, positions, None), reference(tokens).logits
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 1e-4


def test_weights_find_the_parameter_names_of_transformer_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    te_stubs.install(monkeypatch)
    reference = hf_model("Qwen2")
    reference.save_pretrained(tmp_path, safe_serialization=True)
    imported = import_config(tmp_path)
    config = tiny_config(**imported.transformer)
    model = build_gpt(config, get_sparsek_block_spec(config, sparsek=COVERING), **imported.gpt)
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in dict(model.named_parameters())
    left = load_weights(model, tmp_path)
    assert len(left) == 6 and all("scorer" in name for name in left)
    tokens, positions, _ = batch(64)
    with torch.no_grad():
        assert (model(tokens, positions, None) - reference(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures='GPT2LMHeadModel'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling='yarn'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 2.0}}, "rope_scaling.high_freq_factor=2.0"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    entry: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = {**TINY, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e4, **entry}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError) as error:
        import_config(tmp_path)
    assert words in str(error.value)


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        import_config(tmp_path)
    reference = hf_model("Llama")
    reference.save_pretrained(tmp_path, safe_serialization=True)
    imported = import_config(tmp_path)
    config = tiny_config(**imported.transformer)
    model = build_gpt(config, get_sparsek_block_spec(config, sparsek=COVERING), **imported.gpt)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_weights(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_weights(model, tmp_path)
    wider = tiny_config(**{**imported.transformer, "ffn_hidden_size": 64})
    reference.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight is \(128, 32\) in the model and \(96, 32\)"):
        load_weights(
            build_gpt(wider, get_sparsek_block_spec(wider, sparsek=COVERING), **imported.gpt), tmp_path
        )


def test_dense_state_dicts_go_in_and_come_out(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config()
    stock = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm"
    )
    dense = build_gpt(config, stock)
    sparse = build_gpt(config, get_sparsek_block_spec(config, sparsek=COVERING))
    before = {name: p.clone() for name, p in sparse.named_parameters() if "scorer" in name}
    with caplog.at_level(logging.INFO):
        initialised = load_dense_state_dict(sparse, dense.state_dict())
    ours = [record for record in caplog.records if record.name.startswith("sparsek_megatron")]
    assert len(ours) == 1 and "6 scorer tensors" in ours[0].getMessage()
    assert len(initialised) == 6
    for name, parameter in sparse.named_parameters():
        assert torch.equal(
            parameter, before[name] if "scorer" in name else dict(dense.named_parameters())[name]
        )
    exported = dense_state_dict(sparse.state_dict())
    dense.load_state_dict(exported, strict=True)
    with pytest.raises(ValueError, match="1 keys missing"):
        load_dense_state_dict(sparse, {k: v for k, v in exported.items() if k != "output_layer.weight"})
    with pytest.raises(ValueError, match="1 unknown"):
        load_dense_state_dict(sparse, {**exported, "decoder.extra": torch.zeros(1)})
