# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Llama and Qwen2 checkpoints (config.json and safetensors) into Megatron GPT models.

Legend: np query heads, ng KV heads, hn head dimension, h hidden size, f MLP width, tp tensor-parallel ranks.

Megatron's linear_qkv holds, for each KV group, its np / ng query heads, its key and its value; linear_fc1
holds the gate and the up projection, on each tensor-parallel rank its own part of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import Tensor

from sparsek_megatron import compat

ARCHITECTURES = {"LlamaForCausalLM": False, "Qwen2ForCausalLM": True}  # name -> bias on q, k and v


@dataclass(frozen=True)
class ImportedConfig:
    """Keyword arguments for `TransformerConfig` and `GPTModel` that make the Hugging Face model's
    architecture.
    """

    transformer: dict[str, Any]
    gpt: dict[str, Any]


def _refuse(name: str, value: object, fix: str) -> None:
    raise NotImplementedError(f"config.json: {name}={value!r} is not supported: {fix}")


def import_config(folder: str | Path) -> ImportedConfig:
    """Read `config.json` of a Llama or Qwen2 model.

    Dropouts are 0, and `max_position_embeddings` becomes `GPTModel`'s max_sequence_length; give it to
    `SparseKConfig.reference_length` too. Raises NotImplementedError naming the entry that cannot be
    represented.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a Hugging Face model")
    hf = json.loads(path.read_text())
    architecture = (hf.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        _refuse("architectures", architecture, f"use one of {', '.join(ARCHITECTURES)}")
    if hf.get("hidden_act", "silu") != "silu":
        _refuse("hidden_act", hf["hidden_act"], "use a model with silu")
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            _refuse(name, hf[name], "use a model without these biases")
    if hf.get("use_sliding_window"):
        _refuse("use_sliding_window", True, "SparseK has its own window; use a model without one")
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    gpt: dict[str, Any] = {
        "vocab_size": hf["vocab_size"],
        "max_sequence_length": hf["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": hf.get("rope_theta") or rope.get("rope_theta", 10_000.0),
        "share_embeddings_and_output_weights": hf.get("tie_word_embeddings", False),
    }
    if kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        for name, value in fixed.items():
            if scaling.get(name, value) != value:
                _refuse(f"rope_scaling.{name}", scaling[name], f"megatron-core has {value} built in")
        gpt |= {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    elif kind != "default":
        _refuse("rope_scaling", kind, "use default or llama3")
    heads = hf["num_attention_heads"]
    return ImportedConfig(
        transformer={
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": hf["hidden_size"],
            "ffn_hidden_size": hf["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": hf.get("num_key_value_heads") or heads,
            "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf["rms_norm_eps"],
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": ARCHITECTURES[architecture],
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
        gpt=gpt,
    )


class _Weights:
    """Tensors of a folder's safetensors files, by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = {k: folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"the Hugging Face checkpoint lacks {name}")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def _grouped_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """[np hn, ...], [ng hn, ...] twice -> [(np + 2 ng) hn, ...], a group's query heads, key and value
    together.
    """
    parts = [x.unflatten(0, (groups, x.shape[0] // groups)) for x in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _whole_weights(weights: _Weights, index: int, groups: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """(Megatron's possible names within the layer, whole tensor) of one layer."""
    layer = f"model.layers.{index}."
    kinds = ("weight", "bias") if f"{layer}self_attn.q_proj.bias" in weights else ("weight",)
    for kind in kinds:
        qkv = [weights[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"]
        yield (f"self_attention.linear_qkv.{kind}",), _grouped_qkv(*qkv, groups=groups)
    yield ("self_attention.linear_proj.weight",), weights[f"{layer}self_attn.o_proj.weight"]
    gate, up = (weights[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    yield ("mlp.linear_fc1.weight",), torch.cat([gate, up])
    yield ("mlp.linear_fc2.weight",), weights[f"{layer}mlp.down_proj.weight"]
    names = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    yield names, weights[f"{layer}input_layernorm.weight"]
    names = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    yield names, weights[f"{layer}post_attention_layernorm.weight"]


def _copy_shard(name: str, parameter: torch.nn.Parameter, whole: Tensor, tp: int, rank: int) -> None:
    """Copy this rank's part of a whole tensor; a vocabulary padded for tensor parallelism is filled with
    zeros.
    """
    if getattr(parameter, "tensor_model_parallel", False):
        dimension: int = parameter.partition_dim  # pyright: ignore[reportAttributeAccessIssue]
        padding = parameter.shape[0] * tp - whole.shape[0]
        if padding > 0 and ("embedding" in name or "output_layer" in name):
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        parts = whole.chunk(2, dimension) if "linear_fc1" in name else (whole,)
        whole = torch.cat([part.chunk(tp, dimension)[rank] for part in parts], dimension)
    if whole.shape != parameter.shape:
        raise ValueError(
            f"{name} is {tuple(parameter.shape)} in the model and {tuple(whole.shape)} in the Hugging "
            "Face checkpoint; build the model from import_config"
        )
    parameter.copy_(whole)


@torch.no_grad()
def load_weights(model: GPTModel, folder: str | Path) -> list[str]:
    """Copy a Hugging Face model's weights into this rank's part of a GPT model, whatever its parallel split.

    model: built from `import_config(folder)` with a SparseK or a stock spec, unwrapped, on one pipeline (or
    virtual) stage. Returns the names of the parameters that the checkpoint does not have: the scorers'.
    Raises ValueError naming a tensor that is missing or has another shape.
    """
    weights = _Weights(Path(folder))
    config = model.config
    tp, rank = model.pg_collection.tp.size(), model.pg_collection.tp.rank()
    parameters = dict(model.named_parameters())
    pp_rank = model.pg_collection.pp.rank()
    left = set(parameters)

    def copy(names: tuple[str, ...], whole: Tensor) -> None:
        name = next((n for n in names if n in parameters), None)
        if name is None:
            raise ValueError(f"the model has no parameter {' or '.join(names)}; build it from import_config")
        _copy_shard(name, parameters[name], whole, tp, rank)
        left.discard(name)

    indices = compat.stage_layer_indices(config, vp_stage=model.vp_stage, pp_rank=pp_rank)
    for local, index in enumerate(indices):
        assert config.num_query_groups is not None
        for names, whole in _whole_weights(weights, index, config.num_query_groups):
            copy(tuple(f"decoder.layers.{local}.{name}" for name in names), whole)
    embedding = "model.embed_tokens.weight"
    if "embedding.word_embeddings.weight" in parameters:
        copy(("embedding.word_embeddings.weight",), weights[embedding])
    if "decoder.final_layernorm.weight" in parameters:
        copy(("decoder.final_layernorm.weight",), weights["model.norm.weight"])
    if "output_layer.weight" in parameters:
        head = embedding if model.share_embeddings_and_output_weights else "lm_head.weight"
        copy(("output_layer.weight",), weights[head])
    strange = [name for name in left if ".self_attention.scorer." not in name]
    if strange:
        raise ValueError(f"the Hugging Face checkpoint has no {', '.join(sorted(strange)[:3])}")
    return sorted(left)
