# SPDX-License-Identifier: Apache-2.0
"""What full recompute's settings say of its checkpoints; without torch, for checks before anything starts.

`config`: a `TransformerConfig` or a `TrainingConfig`, whose recompute settings have the same names.
"""

from __future__ import annotations

from typing import Any


def checkpoints_of_one_layer(config: Any) -> bool:
    """Whether each recomputation is that of one layer: in one of several, the next layer reads the output."""
    full = config.recompute_granularity == "full"
    return full and (config.recompute_method == "block" or config.recompute_num_layers == 1)


def check_recomputed_inputs(config: Any, *, count: int, num_layers: int) -> None:
    """Whether, of `num_layers` offloaded layer inputs, `count` can be computed again from the layer before.

    Raises:
        ValueError: there are not that many.
        NotImplementedError: layers share a checkpoint.
    """
    block = config.recompute_method == "block"
    most = (min(num_layers, config.recompute_num_layers) if block else num_layers) // 2
    if not 0 <= count <= most:
        recomputed = f" and --recompute-num-layers {config.recompute_num_layers} recomputes" if block else ""
        raise ValueError(
            f"--recompute-inputs {count}: must be between 0 and {most}, half of the layers that "
            f"--cpu-offloading-num-layers {num_layers} offloads{recomputed}"
        )
    if count and not checkpoints_of_one_layer(config):
        raise NotImplementedError(
            f"--recompute-inputs {count}: needs a checkpoint a layer, and --recompute-num-layers is "
            f"{config.recompute_num_layers}; use 1"
        )
