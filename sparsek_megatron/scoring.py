# SPDX-License-Identifier: Apache-2.0
"""The scoring network: one fp32 score per token and KV head, laid out over ranks like the KV heads.

    u_j = x_j . w_score + slope * pos_j / L_ref        (x_j: normalised hidden state of token j)

Legend: s sequence length, b batch, h hidden size, m width of the "mlp" scorer, n = num_query_groups (KV heads),
tp = tensor_model_parallel_size.

The weights are replicated over tensor-parallel ranks. Under sequence parallelism a rank holds s / tp tokens,
scores them for all n KV heads, and the scores (n / h of the bytes of x) change layout from sequence-sharded
to head-sharded. The weight's gradient is then a partial sum per rank and is summed over the group in
backward; without sequence parallelism the gradient of the scores is summed instead. Either way every rank
ends backward with the complete gradient of every parameter, so neither Megatron nor DeepSpeed has anything
left to reduce.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from sparsek_megatron import compat
from sparsek_megatron.config import DEFAULT_REFERENCE_LENGTH, SparseKConfig
from sparsek_megatron.linear_score import linear_score
from sparsek_megatron.norm import Norm
from sparsek_megatron.position_scores import position_scores

# Standard deviation of silu(z) for z ~ N(0, 1).
SILU_STD = 0.5595


def reference_length(config: TransformerConfig, sparsek: SparseKConfig) -> int:
    """L_ref in tokens: the setting, else max_position_embeddings, else 131,072.

    max_position_embeddings is the model configuration's where it has one, else Megatron-LM's flag of that name.
    """
    return (
        sparsek.reference_length
        or getattr(config, "max_position_embeddings", None)
        or getattr(compat.running_script_arguments(), "max_position_embeddings", None)
        or DEFAULT_REFERENCE_LENGTH
    )


def initial_slope(config: TransformerConfig, sparsek: SparseKConfig) -> float:
    """The slope's start: the setting, else L_ref / topk, with which a score falls by 1 in topk tokens."""
    if sparsek.initial_slope is not None:
        return sparsek.initial_slope
    return reference_length(config, sparsek) / sparsek.topk


class ScoringNetwork(MegatronModule):
    """Scores of one layer's tokens for the KV heads of this tensor-parallel rank.

    weight            [h, n], or [m, n] behind `hidden_weight` [h, m] for the "mlp" scorer; initialised so
                      that the scores of a normalised input have standard deviation `sparsek.score_spread`
    slope             [n], starts at `initial_slope(config, sparsek)`, outside weight decay; absent without
                      `position_slope`
    reference_length  L_ref, int64 scalar buffer: saved with the model, and the saved value wins on load
    norm              the scorer's own norm, where `own_norm`

    All are replicated over the tensor-parallel group, which `tp_group` gives.
    """

    def __init__(
        self,
        config: TransformerConfig,
        sparsek: SparseKConfig,
        *,
        tp_group: torch.distributed.ProcessGroup,
        own_norm: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.reference_length: Tensor
        assert config.num_query_groups is not None
        self.sparsek = sparsek
        self.tp_group = tp_group
        groups, tp, rank = config.num_query_groups, tp_group.size(), tp_group.rank()
        if groups >= tp:
            self.head_start, self.num_heads = rank * (groups // tp), groups // tp
        else:
            self.head_start, self.num_heads = rank // (tp // groups), 1

        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon) if own_norm else None
        on_cpu = config.use_cpu_initialization or not torch.cuda.is_available()
        factory = {"dtype": config.params_dtype, "device": "cpu" if on_cpu else "cuda"}
        inputs = config.hidden_size
        self.hidden_weight = None
        if sparsek.scorer == "mlp":
            inputs = sparsek.scorer_hidden_size or max(1, config.hidden_size // 4)
            self.hidden_weight = torch.nn.Parameter(torch.empty(config.hidden_size, inputs, **factory))
        self.weight = torch.nn.Parameter(torch.empty(inputs, groups, **factory))
        self.slope = torch.nn.Parameter(torch.empty(groups, **factory)) if sparsek.position_slope else None
        self.register_buffer("reference_length", torch.empty((), dtype=torch.int64, device=factory["device"]))
        self.reset_parameters()
        for parameter in self.parameters():
            parameter.sparsek_scorer = True  # pyright: ignore[reportAttributeAccessIssue]

    def reset_parameters(self) -> None:
        """Initialise in place from torch's default generator, which is in step on all tensor-parallel ranks."""
        self.reference_length.fill_(reference_length(self.config, self.sparsek))
        if self.slope is not None:
            torch.nn.init.constant_(self.slope, initial_slope(self.config, self.sparsek))
        if not self.config.perform_initialization:
            return
        spread = self.sparsek.score_spread
        if self.hidden_weight is not None:
            torch.nn.init.normal_(self.hidden_weight, std=1 / math.sqrt(self.config.hidden_size))
            spread = spread / SILU_STD
        torch.nn.init.normal_(self.weight, std=spread / math.sqrt(self.weight.shape[0]))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load, and say so where the saved model has another L_ref than this configuration.

        The buffer cannot tell: `dist_checkpointing.load` has filled it with the saved value by now.
        """
        saved = state_dict.get(f"{prefix}reference_length")
        configured = reference_length(self.config, self.sparsek)
        if saved is not None and int(saved) != configured:
            warnings.warn(
                f"reference_length={configured} in the configuration, {int(saved)} in the "
                "checkpoint: the checkpoint's is kept, since the slopes were trained with it",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _summed_in_backward(self, weight: Tensor) -> Tensor:
        """Identity whose gradient is summed over the tensor-parallel group."""
        if self.tp_group.size() == 1:
            return weight
        return copy_to_tensor_model_parallel_region(weight, group=self.tp_group)

    def forward(self, hidden_states: Tensor, positions: Tensor | None) -> Tensor:
        """Scores of the whole sequence for this rank's KV heads.

        hidden_states [s, b, h], or this rank's [s / tp, b, h] under sequence parallelism; positions [s] or
        [b, s], the position of each token of the whole sequence within its (packed) sequence, None for
        0 ... s - 1. Returns [b, s, n / tp] (one head where n < tp) in fp32, or fp64 for fp64 input.
        """
        x = hidden_states.detach() if self.sparsek.detach_hidden else hidden_states
        if self.norm is not None:
            x = self.norm(x)
        sequence_parallel = self.config.sequence_parallel and self.tp_group.size() > 1
        weight, hidden_weight = self.weight, self.hidden_weight
        if sequence_parallel:
            weight = self._summed_in_backward(weight)
            hidden_weight = None if hidden_weight is None else self._summed_in_backward(hidden_weight)
        if hidden_weight is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            x = F.silu(x.to(dtype) @ hidden_weight.to(dtype))
        scores = linear_score(x, weight)
        if sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, group=self.tp_group)
        else:
            scores = self._summed_in_backward(scores)
        if self.slope is None:
            return scores[..., self._own_heads].transpose(0, 1).contiguous()
        return self._with_positions(scores, positions)

    def position_term(self, length: int) -> Tensor:
        """slope * position / L_ref of this rank's KV heads for positions 0 ... length - 1: [1, length, n / tp] fp32.

        For a scorer with `position_slope`.
        """
        assert self.slope is not None
        nothing = torch.zeros(length, 1, self.slope.shape[0], device=self.slope.device)
        return self._with_positions(nothing, None)

    def _with_positions(self, scores: Tensor, positions: Tensor | None) -> Tensor:
        """This rank's heads of scores [s, b, n] and the position term: [b, s, n / tp]."""
        assert self.slope is not None
        return position_scores(
            scores,
            self._summed_in_backward(self.slope),
            self.reference_length,
            positions,
            head_start=self.head_start,
            num_heads=self.num_heads,
        )

    @property
    def _own_heads(self) -> slice:
        return slice(self.head_start, self.head_start + self.num_heads)
