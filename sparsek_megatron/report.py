# SPDX-License-Identifier: Apache-2.0
"""What was built, printed once on rank 0."""

from __future__ import annotations

import torch

from sparsek_megatron.config import SparseKConfig

_reported: set[tuple[SparseKConfig, str]] = set()


def report_once(sparsek: SparseKConfig, source: str, reference_length: int, slots: dict[str, str]) -> None:
    """Print the settings, where they came from, and the class in each slot of the first SparseK layer.

    Once for each distinct configuration, on global rank 0 (or without a process group).
    """
    key = (sparsek, source)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if key in _reported or (distributed and torch.distributed.get_rank() != 0):
        return
    _reported.add(key)
    numbers = [
        f"{name}={getattr(sparsek, name)}" for name in ("topk", "window", "stride", "pool", "gate", "backend")
    ]
    numbers += [f"scorer={sparsek.scorer}", f"L_ref={reference_length}"]
    if sparsek.dense_layers or sparsek.dense_every:
        numbers.append(f"dense_layers={sparsek.dense_layers} dense_every={sparsek.dense_every}")
    classes = ", ".join(f"{slot}={name}" for slot, name in slots.items())
    text = f"SparseK attention (settings: {source}): {' '.join(numbers)}\n  slots: {classes}\n"
    print(text, end="", flush=True)  # one write, as for a line
