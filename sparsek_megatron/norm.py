# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm for every norm slot of a spec, right under sequence parallelism.

Under sequence parallelism each tensor-parallel rank normalises its own part of the sequence, so the gradient
of the replicated weight is a partial sum. Here the weight enters the computation through
`copy_to_tensor_model_parallel_region` (identity forward, all-reduce backward): its gradient is complete as
soon as backward has run, under Megatron's optimizer, DeepSpeed, plain autograd and recompute alike. The
`sequence_parallel` attribute is therefore not set on the weight: with it, Megatron would sum a second time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from sparsek_megatron import compat


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `config.normalization` says.

    Input [..., hidden_size], sharded along the sequence where `config.sequence_parallel`; output of the same
    shape and dtype (of `params_dtype` with `fp32_residual_connection`, whose residual is fp32).
    `layernorm_zero_centered_gamma` stores weight - 1. Apex's fused kernels run where NVIDIA Apex is
    installed and the input is on CUDA, torch's otherwise; both reduce in fp32.

    Raises NotImplementedError for another `config.normalization`.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise NotImplementedError(
                f"--normalization {config.normalization} is not supported here: use RMSNorm or LayerNorm"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.reduce_weight_gradient = config.sequence_parallel
        self.apex = compat.apex_fused_norms()
        self.output_dtype = config.params_dtype if config.fp32_residual_connection else None
        device = "cpu" if config.use_cpu_initialization or not torch.cuda.is_available() else "cuda"
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None
        if not self.rms:
            self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight such that the norm starts as the plain normalisation, bias 0."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _affine(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.weight, self.bias
        if self.reduce_weight_gradient:
            weight = copy_to_tensor_model_parallel_region(weight)
            bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
        return (weight + 1 if self.zero_centered else weight), bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._affine()
        bias = None if bias is None else bias.to(x.dtype)
        y = self._normalise(x, weight.to(x.dtype), bias)
        return y if self.output_dtype is None else y.to(self.output_dtype)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.apex is not None and x.is_cuda:
            fused_rms_norm, fused_layer_norm = self.apex
            if bias is None:
                return fused_rms_norm(x, weight, (self.hidden_size,), self.eps)
            return fused_layer_norm(x, weight, bias, (self.hidden_size,), self.eps)
        if bias is None:
            return F.rms_norm(x, (self.hidden_size,), weight, self.eps)
        return F.layer_norm(x, (self.hidden_size,), weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {'RMSNorm' if self.rms else 'LayerNorm'}, eps={self.eps}"


class QKNorm(Norm):
    """The norm of the q_layernorm and k_layernorm slots: over the head dimension of this rank's heads.

    Its weight is shared by all heads, so its gradient is a partial sum per rank with or without sequence
    parallelism, and is completed in backward as in `Norm`. Megatron sums gradients of parameters with these
    slot names itself; the attribute makes it average instead, which leaves complete (equal) gradients as
    they are.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__(config, hidden_size, eps)
        self.reduce_weight_gradient = True
        for parameter in self.parameters():
            parameter.average_gradients_across_tp_domain = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        # Backward keeps the input, and with a view all of the QKV projection.
        return super().forward(x.contiguous() if x.requires_grad else x)
