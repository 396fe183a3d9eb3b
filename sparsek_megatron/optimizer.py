# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of the scorer for Megatron's own optimizer.

The scorer's parameters carry no `sequence_parallel` attribute and are not tensor parallel: their gradients
are complete after backward and replicated, so `finalize_model_grads` leaves them alone and the gradient norm
counts them on one tensor-parallel rank. Slope and norm weights are one-dimensional, which Megatron leaves
out of weight decay.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey

from sparsek_megatron.config import SparseKConfig

SCORER_ATTRIBUTE = "sparsek_scorer"


def scorer_config_overrides(config: OptimizerConfig, sparsek: SparseKConfig) -> dict[ParamKey, Any]:
    """`config_overrides` for `get_megatron_optimizer`: Megatron's standard ones, and the scorer's learning
    rate.

    The learning rate (and its minimum) of every parameter with the attribute `sparsek_scorer` is multiplied
    by `sparsek.scorer_lr_mult`; warm-up and decay keep their shape.
    """
    overrides = dict(get_standard_config_overrides(config))
    if sparsek.scorer_lr_mult != 1.0:
        assert config.lr is not None
        rates: Any = {"max_lr": config.lr * sparsek.scorer_lr_mult}
        if config.min_lr is not None:
            rates["min_lr"] = config.min_lr * sparsek.scorer_lr_mult
        overrides[ParamKey(attr=SCORER_ATTRIBUTE)] = rates
    return overrides
