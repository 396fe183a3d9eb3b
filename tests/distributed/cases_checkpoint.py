# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints across tensor and pipeline splits, dense models into SparseK and back, HF weights."""

from __future__ import annotations

import argparse
import json
import queue
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_to_cpu import cuda_to_cpu
from mcore_harness import build_gpt, parallel, randomise, tiny_config, unshard
from mcore_training import Training
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import gpt_layer_specs
from safetensors.torch import save_file
from worker import case

from sparsek_megatron import SparseKConfig, get_sparsek_block_spec
from sparsek_megatron.compat import stage_layer_indices
from sparsek_megatron.convert.dense import load_dense_checkpoint, save_dense_checkpoint
from sparsek_megatron.convert.hf import import_config, load_weights

# Saving writes and reads this queue in one process. megatron-core's own lives in a process that each rank would start
# for it, and that imports PyTorch first.
filesystem_async._results_queue = queue.Queue()  # pyright: ignore[reportAttributeAccessIssue]

SPARSEK: dict[str, Any] = {"topk": 5, "window": 4, "stride": 4, "pool": 12}


def shared_folder() -> Path:
    """A new folder that all ranks see."""
    name = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(name, src=0)
    assert name[0] is not None
    return Path(name[0])


def stock_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Layers of the dense model."""
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )


def stage_models(
    vpp: int | None = None, dense: bool = False, sparsek: dict[str, Any] | None = None, **changes: Any
) -> list[Any]:
    """The chunks of this pipeline stage's model, dense or with SparseK."""
    config = tiny_config(
        **{"num_layers": 4, **changes}, **({"virtual_pipeline_model_parallel_size": vpp} if vpp else {})
    )
    settings = SparseKConfig(**{**SPARSEK, **(sparsek or {})})
    chunks = []
    for stage in range(vpp or 1):
        virtual = {"vp_stage": stage if vpp else None}
        spec = (
            stock_spec(config, **virtual)
            if dense
            else get_sparsek_block_spec(config, sparsek=settings, **virtual)
        )
        edges = {"ignore_virtual": vpp is None, **virtual}
        chunks.append(
            build_gpt(
                config,
                spec,
                pre_process=parallel_state.is_pipeline_first_stage(**edges),
                post_process=parallel_state.is_pipeline_last_stage(**edges),
                **virtual,
            )
        )
    return chunks


def stage_model(**changes: Any) -> Any:
    """This pipeline stage's model where it has one chunk."""
    (model,) = stage_models(**changes)
    return model


def whole(*chunks: Any) -> dict[str, torch.Tensor]:
    """Whole weights of all pipeline stages by global name, and the reference lengths."""
    mine = {}
    for stage, model in enumerate(chunks):
        vp_stage = stage if len(chunks) > 1 else None
        indices = stage_layer_indices(model.config, vp_stage=vp_stage, pp_rank=None)
        tensors = [(name, p, p.data) for name, p in model.named_parameters()]
        tensors += [(name, torch.nn.Parameter(b.double()), b.double()) for name, b in model.named_buffers()]
        for name, parameter, tensor in tensors:
            if ".layers." in name:
                head, rest = name.split(".layers.")
                local, tail = rest.split(".", 1)
                name = f"{head}.layers.{indices[int(local)]}.{tail}"
            mine[name] = unshard(name, parameter, tensor)
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_gather_object(stages, mine, group=group)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def different(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing from one of the two or not bitwise equal."""
    return sorted(got.keys() ^ want.keys()) + [
        n for n in want if n in got and not torch.equal(got[n], want[n])
    ]


def save_and_load(sparsek: dict[str, Any]) -> dict[str, list[str]]:
    """Save at TP2; names that differ after loading under other splits."""
    folder = shared_folder()
    with parallel(tp=2), cuda_to_cpu():
        model = stage_model(sparsek={**sparsek, "reference_length": 512})
        randomise(model)
        want = whole(model)
        dist_checkpointing.save(model.sharded_state_dict(), str(folder))
    answer = {}
    for name, sizes in {"tp1": {"tp": 1}, "tp4": {"tp": 4}, "tp2_pp2": {"tp": 2, "pp": 2}}.items():
        with parallel(**sizes, seed=99), cuda_to_cpu():
            model = stage_model(sparsek=sparsek)
            state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
            model.load_state_dict(state)
            answer[name] = different(whole(model), want)
    answer["saved"] = sorted(want)
    return answer


@case
def checkpoint_saved_at_tp2() -> dict[str, list[str]]:
    return save_and_load({})


@case
def checkpoint_of_a_layer_pattern() -> dict[str, list[str]]:
    return save_and_load({"dense_layers": (0, -1)})


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """The message of the ValueError that the call raises on this rank."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "not refused"


@case
def dense_checkpoint_into_sparsek_and_back() -> dict[str, Any]:
    """A dense model saved as Megatron-LM does, with its optimizer; loaded with and without a virtual pipeline."""
    answer: dict[str, Any] = {}
    for stacked, vpp in ((True, 2), (False, None)):
        folder, exported = shared_folder(), shared_folder() / "dense" / "iter_0000001"
        per_layer = {"hetereogenous_dist_checkpoint": not stacked}
        with parallel(tp=2), cuda_to_cpu():
            training = Training(stock_spec, SparseKConfig(**SPARSEK), num_layers=4, **per_layer)
            dense = training.chunks[0].module
            randomise(dense)
            training.optimizer.reload_model_params()
            training.step(0)
            want = whole(dense)
            common = {"args": argparse.Namespace(iteration=1), "checkpoint_version": 3.0, "iteration": 1}
            state = training.sharded_state_dict()
            optimizer_first = {"optimizer": state["optimizer"], **common, "model": state["model"]}
            dist_checkpointing.save(optimizer_first, str(folder))
        with parallel(tp=2, pp=2, vpp=vpp, seed=5), cuda_to_cpu():
            chunks = stage_models(vpp, sequence_parallel=True, sparsek={"dense_layers": (1,)})
            before = whole(*chunks)
            initialised = load_dense_checkpoint(chunks, folder)
            stage_scorers = [n for chunk in chunks for n in chunk.state_dict() if "scorer" in n]
            got = whole(*chunks)
            scorers = {n: t for n, t in got.items() if "scorer" in n}
            other = stage_models(vpp, sequence_parallel=True, ffn_hidden_size=64)
            answer[f"stacked={stacked}"] = {
                "dense": different({n: t for n, t in got.items() if n not in scorers}, want),
                "scorers": different(scorers, {n: t for n, t in before.items() if "scorer" in n}),
                "initialised": sorted(initialised) == sorted(stage_scorers) != [],
                # mcore 0.19 names a layer of the rank's own stage
                "another_model": re.sub(r"layers\.\d+", "layers.*", refusal(load_dense_checkpoint, other, folder)),
                "some_chunks": refusal(save_dense_checkpoint, chunks[0], exported) if vpp else "",
            }
            save_dense_checkpoint(chunks, exported, stacked=stacked)
        with parallel(tp=1, seed=6), cuda_to_cpu():
            again = stage_model(dense=True, **per_layer)
            again.load_state_dict(dist_checkpointing.load(again.sharded_state_dict(), str(exported)))
            answer[f"stacked={stacked}"]["exported"] = different(whole(again), want)
    return answer


def write_hf_folder(folder: Path) -> None:
    """A Qwen2-like checkpoint of random weights whose vocabulary needs padding, in two files with an index."""
    h, f, heads, groups, hn, vocab, layers = 32, 48, 4, 2, 8, 90, 4
    config = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": h, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
        "vocab_size": vocab, "max_position_embeddings": 128, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, h),
        "lm_head.weight": (vocab, h),
        "model.norm.weight": (h,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", heads * hn), ("k", groups * hn), ("v", groups * hn)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (h, heads * hn)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (h, f)
        shapes |= {f"{layer}{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


@case
def hf_weights_under_tp2_pp2() -> dict[str, Any]:
    folder = shared_folder()
    if torch.distributed.get_rank() == 0:
        write_hf_folder(folder)
    torch.distributed.barrier()

    def build() -> Any:
        imported = import_config(folder)
        config = tiny_config(**imported.transformer)
        spec = get_sparsek_block_spec(config, sparsek=SparseKConfig(**SPARSEK))
        edges = {
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
        }
        return build_gpt(config, spec, **{**imported.gpt, "vocab_size": 96}, **edges)

    with parallel():
        single = build()
        left = load_weights(single, folder)
        want = whole(single)
    with parallel(tp=2, pp=2):
        split = build()
        load_weights(split, folder)
        got = whole(split)
    weights = {n: t for n, t in want.items() if "scorer" not in n}
    return {"different": different({n: t for n, t in got.items() if "scorer" not in n}, weights), "left": left,
            "padding": bool(want["output_layer.weight"][90:].any())}  # fmt: skip
