# SPDX-License-Identifier: Apache-2.0
"""Run megatron-core on CPU with gloo: the places that assume CUDA, replaced by one explicit call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
from megatron.core.tensor_parallel import random as mcore_random

from sparsek_megatron.context_parallel.layout import shard_sequence


class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
    """Megatron's tracker of named RNG states, over torch's CPU generator."""

    def __init__(self, use_cudagraphable_rng: bool = False, is_inference_rng_tracker: bool = False) -> None:
        if use_cudagraphable_rng:
            raise ValueError("use_cudagraphable_rng=True needs CUDA: leave it off on CPU")
        super().__init__(is_inference_rng_tracker=is_inference_rng_tracker)

    def add(self, name: str, seed: int) -> None:
        self._is_initialized = True
        if seed in self.seeds_:
            raise ValueError(f"seed {seed} already exists in the RNG tracker")
        if name in self.states_:
            raise ValueError(f"RNG state {name!r} already exists in the RNG tracker")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"RNG state {name!r} was never added: call model_parallel_cuda_manual_seed first")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def _get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _causal_mask(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _rotary_shard(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    return shard_sequence(pos_emb, cp_group.size(), cp_group.rank(), dim=seq_dim)


def _current_device() -> torch.device:
    return torch.device("cpu")


def enable_cpu() -> None:
    """Let megatron-core build and run models on CPU in this process, with gloo as the collective backend.

    Replaces five things: `torch.cuda.current_device`, which megatron-core uses to place buffers; the two
    functions that read and set the CUDA RNG state; the RNG tracker; the default causal mask of stock dense
    attention; and the choice of a context-parallel rank's rotary angles, which goes through CUDA. Call it before
    `tensor_parallel.model_parallel_cuda_manual_seed`, and build models with `use_cpu_initialization=True`.
    Calling it twice is harmless. Raises RuntimeError where CUDA is available: there it would misplace
    tensors.
    """
    if torch.cuda.is_available():
        raise RuntimeError("enable_cpu() on a machine with CUDA: hide the GPUs first (CUDA_VISIBLE_DEVICES=)")
    torch.cuda.current_device = _current_device  # pyright: ignore[reportAttributeAccessIssue]
    mcore_random._get_cuda_rng_state = _get_rng_state
    mcore_random._set_cuda_rng_state = _set_rng_state
    fused_softmax.get_default_causal_mask = _causal_mask  # pyright: ignore[reportAttributeAccessIssue]
    for rotary in (rotary_pos_embedding, yarn_rotary_pos_embedding):
        rotary.get_pos_emb_on_this_cp_rank = _rotary_shard  # pyright: ignore[reportAttributeAccessIssue]
    mcore_random.CudaRNGStatesTracker = CpuRNGStatesTracker  # pyright: ignore[reportAttributeAccessIssue]
