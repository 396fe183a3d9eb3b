# SPDX-License-Identifier: Apache-2.0
"""A few training steps on one GPU under one of megatron-core's CUDA graph settings; prints the losses as JSON.

A program of its own, since megatron-core keeps its graphs, its memory pool and the current stream in globals.
Arguments: "none", "local" or "full_iteration", then a folder for the rendezvous.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mcore_harness import VOCAB, build_gpt, tiny_config
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec

STEPS = 6
LENGTH = 256
MICRO_BATCHES = 2


def graph_settings(implementation: str) -> dict[str, Any]:
    """Configuration fields that ask this megatron-core for the implementation."""
    if implementation == "none":
        return {}
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if implementation == "full_iteration" and "cuda_graph_modules" not in known:
        return {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
    if implementation == "full_iteration":
        return {"cuda_graph_impl": implementation, "cuda_graph_modules": []}
    return {"cuda_graph_impl": implementation, "cuda_graph_warmup_steps": 2}


def micro_batches() -> Iterator[dict[str, torch.Tensor]]:
    """Batches whose next token follows from the last two, new ones at every step."""
    generator = torch.Generator().manual_seed(5)
    while True:
        first = torch.randint(0, VOCAB, (2, 1), generator=generator)
        tokens = (first + 7 * torch.arange(LENGTH + 1)) % VOCAB
        yield {"tokens": tokens[:, :-1].cuda(), "labels": tokens[:, 1:].cuda()}


def main(implementation: str, folder: str) -> None:
    torch.cuda.set_device(0)
    if implementation == "full_iteration":
        # Gradients are accumulated on the stream that was current when the model was wrapped, and the default stream
        # cannot take part in a capture.
        torch.cuda.set_stream(torch.cuda.Stream())
    meeting = f"file://{Path(folder).resolve()}/{implementation}"
    torch.distributed.init_process_group("nccl", init_method=meeting, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=True)
    torch.manual_seed(2)
    half = {"bf16": True, "params_dtype": torch.bfloat16}
    config = tiny_config(
        use_cpu_initialization=False,
        hidden_size=256,
        kv_channels=64,
        **half,
        **graph_settings(implementation),
    )
    sparsek = SparseKConfig(topk=32, window=32, stride=16)
    gpt = build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek, transformer_impl="local")).cuda()
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, gpt)
    settings = OptimizerConfig(optimizer="adam", lr=2e-3, use_distributed_optimizer=True, **half)
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func = finalize_model_grads
    positions = torch.arange(LENGTH, device="cuda").expand(2, -1)

    def forward_step(data: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(data)
        losses = chunk(batch["tokens"], positions, None, labels=batch["labels"])
        return losses, lambda out: (out.float().mean(), {"loss": out.float().mean().detach()})

    run = get_forward_backward_func()
    if implementation == "full_iteration":
        run = FullCudaGraphWrapper(run, cuda_graph_warmup_steps=2)
    data, losses, slopes = micro_batches(), [], []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        made = run(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        losses.append(float(torch.stack([x["loss"] for x in made]).mean()))
        slopes.append(float(gpt.decoder.layers[0].self_attention.scorer.weight.main_grad.norm()))
        optimizer.step()
    graphs = [getattr(layer, "cudagraph_manager", None) for layer in gpt.decoder.layers]
    captured = sum(len(g.cudagraph_runners) for g in graphs if g is not None)
    if implementation == "full_iteration":
        captured = int(FullCudaGraphWrapper.cuda_graph["training"] is not None)
    print(json.dumps({"losses": losses, "scorer_gradients": slopes, "captured": captured}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
