# SPDX-License-Identifier: Apache-2.0
"""The benchmark's model and its tokens: the trainer's configuration with an arm's attention and the memory options."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from training_benchmark.arms import block_spec
from training_benchmark.shapes import Shape

from sparsek_megatron import SparseKConfig
from sparsek_megatron.async_tensor_parallel import use_async_tensor_parallel
from sparsek_megatron.data.whole import require_whole
from sparsek_megatron.errors import UserError, refusals_for_the_user
from sparsek_megatron.memory import use_checkpoint_offload, use_chunked_loss, use_tiled_mlp
from sparsek_megatron.rope import use_fused_rope
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.model import transformer_config
from sparsek_megatron.training.parallel import Machine


@dataclass(frozen=True)
class Options:
    """What a run may switch; in words, a column of the table."""

    recompute: str | None = None
    recompute_layers: int | None = None  # the first ones alone; None recomputes every layer
    fusions: bool = True
    apply_rope_fusion: bool = False
    chunked_loss: bool = True
    cpu_offloading_num_layers: int = 0
    recompute_inputs: int = 0
    mlp_tile_tokens: int | None = None
    async_tensor_parallel: bool = False
    cuda_graph: bool = False

    def __str__(self) -> str:
        which = "" if self.recompute_layers is None else f" of {self.recompute_layers} layers"
        words = [f"recompute {self.recompute}{which}"] if self.recompute else []
        words += [] if self.fusions else ["no fusions"]
        words += ["fused RoPE"] if self.apply_rope_fusion else []
        words += [] if self.chunked_loss else ["whole logits"]
        words += [f"offload {self.cpu_offloading_num_layers}"] if self.cpu_offloading_num_layers else []
        words += [f"{self.recompute_inputs} inputs recomputed"] if self.recompute_inputs else []
        words += [f"MLP tiles {self.mlp_tile_tokens}"] if self.mlp_tile_tokens is not None else []
        words += ["async TP"] if self.async_tensor_parallel else []
        words += ["CUDA graph"] if self.cuda_graph else []
        return ", ".join(words)


def training_config(
    shape: Shape, sparsek: SparseKConfig, *, tokens: int, layout: tuple[int, int], options: Options
) -> TrainingConfig:
    """The trainer's settings for one shape and context; one sequence of `tokens` a step on each data-parallel rank.

    layout: tensor and context parallel sizes
    """
    tp, cp = layout
    return TrainingConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        seq_length=tokens,
        untie_embeddings_and_output_weights=True,
        rotary_base=500_000,
        sparsek_topk=sparsek.topk,
        sparsek_window=sparsek.window,
        sparsek_stride=sparsek.stride,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        async_tensor_parallel=options.async_tensor_parallel and tp > 1,
        context_parallel_size=cp,
        recompute_granularity=options.recompute,
        recompute_method="uniform" if options.recompute_layers is None else "block",
        recompute_num_layers=1 if options.recompute_layers is None else options.recompute_layers,
        cpu_offloading_num_layers=options.cpu_offloading_num_layers,
        recompute_inputs=options.recompute_inputs,
        mlp_tile_tokens=options.mlp_tile_tokens,
        zero_stage=1,
        lr=1e-4,
        train_iters=1,
    )


def build(
    arm: str,
    config: TrainingConfig,
    sparsek: SparseKConfig,
    *,
    vocabulary: int,
    machine: Machine,
    options: Options,
) -> GPTModel:
    """A model with random weights, on this rank's device."""
    megatron = transformer_config(config, on_gpu=machine.on_gpu)
    if not options.fusions:
        megatron.bias_activation_fusion = megatron.bias_dropout_fusion = False
    if options.apply_rope_fusion and machine.on_gpu:
        use_fused_rope(megatron)
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=block_spec(arm, megatron, sparsek),
        vocab_size=vocabulary,
        max_sequence_length=config.seq_length,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=False,
    )
    if options.chunked_loss:
        use_chunked_loss(model)
    if options.cpu_offloading_num_layers:
        offloaded, recomputed = options.cpu_offloading_num_layers, options.recompute_inputs
        use_checkpoint_offload(model, num_layers=offloaded, recompute_inputs=recomputed)
    if options.mlp_tile_tokens is not None:
        use_tiled_mlp(model, tile_tokens=options.mlp_tile_tokens)
    if config.async_tensor_parallel:
        with refusals_for_the_user():
            use_async_tensor_parallel(model)
    return model.cuda() if machine.on_gpu else model


def read_tokens(prefix: str | None, count: int) -> tuple[np.ndarray, str]:
    """(`count` consecutive token ids, where they come from), repeated from the start where the source is shorter.

    prefix: an IndexedDataset; None reads the bytes of the Python standard library's source as ids.
    """
    if prefix is not None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        if not IndexedDataset.exists(prefix):
            raise UserError(f"--data-path {prefix}: no dataset of that name (.bin and .idx)")
        require_whole("--data-path", prefix)
        dataset: Any = IndexedDataset(prefix)
        documents: Any = (np.asarray(dataset[i], dtype=np.int64) for i in range(len(dataset)))
        source = prefix
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        documents = (np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64) for path in files)
        source = "bytes of the standard library's source"
    parts, held = [], 0
    for document in documents:
        parts.append(document)
        held += len(document)
        if held >= count:
            break
    if not held:
        raise UserError(f"--data-path {prefix}: holds no tokens")
    return np.resize(np.concatenate(parts), count), source


def device_batch(stream: np.ndarray, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels), both [1, tokens], from a stream of at least tokens + 1 ids."""
    ids = torch.from_numpy(stream[: tokens + 1]).to(device)
    return ids[None, :-1], ids[None, 1:]
