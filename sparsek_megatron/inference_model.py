# SPDX-License-Identifier: Apache-2.0
"""A GPT model continuing sequences from SparseK's caches: prompts of any lengths, then one token per row and step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from sparsek_megatron import compat
from sparsek_megatron.inference import SparseKInferenceContext, cache_bytes, layer_caches

PREFILL_TOKENS = 16_384
EAGER_STEPS = 2  # steps before the capture: they compile kernels and let libraries allocate their workspaces


class ModelDecoder:
    """Logits of the next token of `batch_size` sequences, with memory that does not depend on their lengths.

    model                megatron-core's GPTModel (this rank's tensor-parallel shard) with SparseK layers, wrapped for
                         training (`Float16Module`, DDP) or not
    batch_size           sequences
    max_sequence_length  tokens that a row may come to hold; RoPE tables and learned positions reach this far
    prefill_tokens       tokens (over all rows) of one forward of a prompt: bounds the activations
    cuda_graph           on one GPU, run steps after the first ones as a CUDA graph; with tensor parallelism steps run
                         kernel by kernel. Every operation of the model must then be capturable (token-dropless
                         mixtures of experts are not)

    Call every method on all tensor-parallel ranks with the same arguments. Raises NotImplementedError for sequence and
    pipeline parallelism, ValueError for lengths, prompts or tokens that do not fit; the caches stay usable.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        max_sequence_length: int,
        prefill_tokens: int = PREFILL_TOKENS,
        cuda_graph: bool = True,
    ) -> None:
        if model.config.sequence_parallel or model.config.pipeline_model_parallel_size > 1:
            raise NotImplementedError(
                "generation shards heads only: build the model with sequence_parallel=False and "
                "pipeline_model_parallel_size=1; the weights are the same"
            )
        gpt: Any = unwrap_model(model)
        learned = getattr(gpt.embedding, "position_embeddings", None)
        if learned is not None and max_sequence_length > learned.num_embeddings:
            raise ValueError(
                f"max_sequence_length={max_sequence_length}: the model has learned positions for "
                f"{learned.num_embeddings} tokens"
            )
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.batch_size, self.max_sequence_length = batch_size, max_sequence_length
        self.prefill_tokens = prefill_tokens
        self.captures = (
            cuda_graph and self.device.type == "cuda" and model.config.tensor_model_parallel_size == 1
        )
        self.context = SparseKInferenceContext(batch_size, max_sequence_length)
        self._longest = 0
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        self._logits: Tensor | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of all layers' caches on this rank."""
        return cache_bytes(self.context)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start over with one prompt per row; logits [batch_size, vocabulary] fp32 of the token after each."""
        lengths = [len(prompt) for prompt in prompts]
        if len(prompts) != self.batch_size:
            raise ValueError(f"{len(prompts)} prompts for a batch of {self.batch_size}")
        if min(lengths) == 0:
            raise ValueError(f"prompt {lengths.index(0)} is empty: give at least one token")
        if max(lengths) > self.max_sequence_length:
            raise ValueError(
                f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, more than max_sequence_length="
                f"{self.max_sequence_length}"
            )
        self._longest, first, logits = max(lengths), 0, []
        for length, rows in itertools.groupby(prompts, key=len):  # neighbours of one length go together
            tokens = torch.tensor([list(row) for row in rows], dtype=torch.int64)
            logits.append(self._prefill_rows(tokens.to(self.device), first, length))
            first += len(tokens)
        self.context.batch_size_offset = 0
        self.context.enable_decode_mode()
        return torch.cat(logits)

    def _prefill_rows(self, tokens: Tensor, first: int, length: int) -> Tensor:
        self.context.reset()
        self.context.batch_size_offset = first
        piece = max(self.prefill_tokens // len(tokens), 1)
        logits = None
        for start in range(0, length, piece):
            part = tokens[:, start : start + piece]
            positions = torch.arange(start, start + part.shape[1], device=self.device).expand_as(part)
            self.context.sequence_len_offset = start
            logits = self._forward(part, positions)
        assert logits is not None
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [batch_size], one to each row; logits [batch_size, vocabulary] fp32 of those after them.

        The result is overwritten by the next step.
        """
        if self._longest == 0:
            raise ValueError("step() before prefill(): give the prompts first")
        if self._longest >= self.max_sequence_length:
            raise ValueError(
                f"a row already holds max_sequence_length={self.max_sequence_length} tokens: no position is left"
            )
        self._token.copy_(tokens.view(-1, 1))
        if self._graph is not None:
            self._graph.replay()
        elif self.captures and self._eager_steps >= EAGER_STEPS:
            graph = torch.cuda.CUDAGraph()
            # Threads beside this one, such as NCCL's watchdog, may call CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._forward_step()
            self._graph = graph
            graph.replay()
        else:
            self._logits = self._forward_step()
            self._eager_steps += 1
        self._longest += 1
        assert self._logits is not None
        return self._logits

    def _forward_step(self) -> Tensor:
        caches = layer_caches(self.context)
        positions = caches[min(caches)].lengths.long()[:, None]
        return self._forward(self._token, positions)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [b, vocabulary] fp32 after the last of tokens [b, s]."""
        with compat.inference_mode():
            logits = self.model(
                tokens, positions, None, inference_context=self.context, runtime_gather_output=True
            )
        return logits[:, -1].float()
