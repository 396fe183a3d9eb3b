# SPDX-License-Identifier: Apache-2.0
"""A few training steps through megatron-core's own DDP, distributed optimizer and forward-backward schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mcore_harness import batch, build_gpt, device, tiny_config
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from sparsek_megatron.context_parallel import shard_sequence
from sparsek_megatron.optimizer import scorer_config_overrides

LENGTH = 32
MICRO_BATCHES = 2
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


class Training:
    """Model chunks of this rank, their optimizer, and `step`, which returns the loss on every rank.

    rows: of a micro batch of all data-parallel ranks together, where they share it (split_batch); else each takes all.
    """

    def __init__(
        self,
        spec: Callable[[Any, int | None], Any],
        sparsek: Any,
        *,
        vpp: int | None = None,
        distributed: bool = True,
        overlap: bool = False,
        rows: int = 2,
        split_batch: bool = False,
        weights: Callable[[str, torch.nn.Parameter], torch.Tensor] | None = None,
        **changes: Any,
    ) -> None:
        self.rows, self.split_batch = rows, split_batch
        if torch.cuda.is_available():  # the smallest head of the compiled kernels
            changes = {"kv_channels": 64, **changes}
        self.config = tiny_config(virtual_pipeline_model_parallel_size=vpp, **changes)
        self.chunks = []
        for stage in range(vpp or 1):
            vp_stage = stage if vpp else None
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=vpp is None, vp_stage=vp_stage)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=vpp is None, vp_stage=vp_stage)
            model = build_gpt(
                self.config,
                spec(self.config, vp_stage),
                pre_process=first,
                post_process=last,
                vp_stage=vp_stage,
            ).to(device())
            if weights is not None:
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(weights(self.global_name(name, vp_stage), parameter))
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
            )
            self.chunks.append(DistributedDataParallel(self.config, ddp, model))
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            min_lr=0.0,
            weight_decay=0.1,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
        )
        overrides = scorer_config_overrides(optimizer, sparsek)
        self.optimizer = get_megatron_optimizer(optimizer, self.chunks, config_overrides=overrides)
        self.config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            self.config.no_sync_func = self.chunks[0].no_sync
        self.grad_norm = 0.0

    def global_name(self, name: str, vp_stage: int | None) -> str:
        """A parameter's name with the layer's global index in place of its index in this stage."""
        from sparsek_megatron.compat import stage_layer_indices

        if ".layers." not in name:
            return name
        head, rest = name.split(".layers.")
        index, tail = rest.split(".", 1)
        indices = stage_layer_indices(self.config, vp_stage=vp_stage, pp_rank=None)
        return f"{head}.layers.{indices[int(index)]}.{tail}"

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters of all chunks of this rank by global name."""
        found = []
        for stage, chunk in enumerate(self.chunks):
            vp_stage = stage if len(self.chunks) > 1 else None
            found += [(self.global_name(n, vp_stage), p) for n, p in chunk.module.named_parameters()]
        return found

    def forward_backward(self, step: int) -> float:
        """Gradients of `MICRO_BATCHES` micro batches in main_grad; their mean loss, on every rank."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward_step(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
            tokens, positions, labels = (shard_sequence(x, cp, rank) for x in next(iterators[id(model)]))
            output = model(tokens, positions, None, labels=labels)
            # Megatron multiplies a loss without a token count by the context-parallel size.
            return output, lambda out: (out.float().mean() / cp, {"loss": out.float().mean().detach()})

        cp, rank = (
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        data_parallel = parallel_state.get_data_parallel_group()
        share, mine = self.rows, slice(None)
        if self.split_batch:
            share //= data_parallel.size()
            mine = slice(share * data_parallel.rank(), share * (data_parallel.rank() + 1))
        micro_batches = [
            [x[mine].to(device()) for x in batch(LENGTH, self.rows, seed=100 * step + i)]
            for i in range(MICRO_BATCHES)
        ]
        iterators = {id(chunk): iter(micro_batches) for chunk in self.chunks}
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(self.chunks),
            model=self.chunks,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=share,
            forward_only=False,
        )
        loss = torch.zeros(1, device=device())
        if losses:
            loss[0] = torch.stack([x["loss"] for x in losses]).mean()
            torch.distributed.all_reduce(loss, group=parallel_state.get_context_parallel_group())
            loss /= cp
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.all_reduce(loss, group=group)
        if self.split_batch:
            torch.distributed.all_reduce(loss, group=data_parallel)
            loss /= data_parallel.size()
        return float(loss)

    def step(self, step: int) -> float:
        """One training step; the loss before it."""
        loss = self.forward_backward(step)
        updated, self.grad_norm, _ = self.optimizer.step()
        assert updated
        return loss

    def sharded_state_dict(self, *, optimizer: bool = True, loading: bool = False) -> dict[str, Any]:
        """The model without virtual stages and, where asked for, the optimizer as one sharded state dict.

        To load, the optimizer must have state already: torch's Adam, which stands in for Apex's here, makes it in a
        step.
        """
        metadata = dict(METADATA)  # megatron-core adds the process group of the moment
        model = self.chunks[0].module.sharded_state_dict(metadata=metadata)
        if not optimizer:
            return {"model": model}
        if loading:
            for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                part._init_optimizer_states_with_dummy_values()
        state = self.optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": state}
