# SPDX-License-Identifier: Apache-2.0
"""Stand-ins with the interfaces of Transformer Engine's modules, to assemble and run the TE spec without TE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from megatron.core.transformer.dot_product_attention import DotProductAttention

from sparsek_megatron import compat
from sparsek_megatron.norm import Norm


class StubTENorm(Norm):
    """TENorm's place."""


class StubTEColumnParallelLinear(ColumnParallelLinear):
    """TEColumnParallelLinear's place."""


class StubTERowParallelLinear(RowParallelLinear):
    """TERowParallelLinear's place."""


class StubTEDotProductAttention(DotProductAttention):
    """TEDotProductAttention's place."""


class StubTELayerNormColumnParallelLinear(ColumnParallelLinear):
    """Norm and linear in one module, with TE's parameter name for the norm's weight."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **keywords: Any) -> None:
        super().__init__(input_size, output_size, config=config, **keywords)
        self._norm = [Norm(config, input_size, config.layernorm_epsilon)]
        self.layer_norm_weight = self._norm[0].weight

    def forward(self, input_: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        return super().forward(self._norm[0](input_), *args, **keywords)


class StubTESpecProvider(LocalSpecProvider):
    """TESpecProvider's answers."""

    def linear(self) -> type:
        return StubTEColumnParallelLinear

    def column_parallel_linear(self) -> type:
        return StubTEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return StubTERowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return StubTELayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return StubTENorm

    def core_attention(self) -> type:
        return StubTEDotProductAttention


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make megatron-core's spec functions and ours believe that TE is there."""
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", StubTESpecProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", StubTENorm, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(compat, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(compat, "transformer_engine_norm", lambda: StubTENorm)
    monkeypatch.setattr(transformer_block, "LayerNormImpl", StubTENorm)
