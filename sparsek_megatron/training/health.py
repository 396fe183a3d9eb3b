# SPDX-License-Identifier: Apache-2.0
"""How the selection is doing, from a forward pass's scores: saturated gates, age of selected keys, pool overflow."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from sparsek_kernels import sparsek
from torch import Tensor

from sparsek_megatron.context_parallel import gather_sequence
from sparsek_megatron.diagnostics import pool_overflow
from sparsek_megatron.scoring import ScoringNetwork
from sparsek_megatron.training.arguments import TrainingConfig

SAMPLES = 8  # refresh points looked at in each row


@dataclass(frozen=True)
class SelectionHealth:
    """saturated: share of selected keys whose gate is 1 (they give the scorer no gradient); mean_age: tokens between a
    query's refresh point and its selected keys; overflow: share of refresh points where the pool cuts off a positive
    gate. Over all layers, KV heads and ranks. None where no query has that many keys behind it yet; overflow also under
    hard selection, which has no positive gates to cut off.
    """

    saturated: float | None
    mean_age: float | None
    overflow: float | None


@torch.no_grad()
def selection_counts(scores: Tensor, *, topk: int, window: int, stride: int, pool: int) -> Tensor:
    """[saturated keys, selected keys, sum of their ages in tokens, overflows, refresh points looked at], float64.

    scores [b, s, n]. Looks at up to `SAMPLES` evenly spaced refresh points that have candidates, the last among them.
    """
    refresh = torch.arange(0, scores.shape[1], stride)
    refresh = refresh[refresh >= window]
    counts = torch.zeros(5, dtype=torch.float64, device=scores.device)
    if refresh.numel():
        picked = torch.linspace(0, refresh.numel() - 1, min(SAMPLES, refresh.numel())).round().long().unique()
        columns = scores.transpose(1, 2).float()
        for point in refresh[picked].tolist():
            candidates = columns[..., : point - window + 1]
            best = candidates.topk(min(pool, candidates.shape[-1]), dim=-1)
            gates = sparsek(best.values, topk)[..., :topk]
            ages = point - best.indices[..., :topk]
            counts[0] += (gates >= 1).sum()
            counts[1] += gates.numel()
            counts[2] += ages.sum()
    overflows, looked_at = pool_overflow(
        scores, topk=topk, window=window, stride=stride, pool=pool, samples=SAMPLES
    )
    counts[3] += overflows
    counts[4] += looked_at
    return counts


class SelectionWatch:
    """Watches the scorers of a model: `arm` before a forward pass, `disarm` and `collect` after it."""

    def __init__(self, config: TrainingConfig, model: torch.nn.Module):
        topk = config.sparsek_topk
        pool = topk if config.sparsek_hard_selection else config.sparsek_pool or 4 * topk
        self._settings = {
            "topk": topk, "window": config.sparsek_window, "stride": config.sparsek_stride, "pool": pool
        }  # fmt: skip
        self._hard = config.sparsek_hard_selection
        self._armed = False
        self._scores: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, ScoringNetwork):
                module.register_forward_hook(self._see)

    def _see(self, _module: torch.nn.Module, _inputs: Any, scores: Tensor) -> None:
        if self._armed:
            self._scores.append(scores.detach())

    def arm(self) -> None:
        """Keep the scores of the coming forward pass."""
        self._armed = True

    def disarm(self) -> None:
        """Keep no more scores: backward may run the scorers again to recompute them."""
        self._armed = False

    def collect(self, device: torch.device) -> SelectionHealth:
        """What the scores kept since `arm` tell, over all ranks. A collective."""
        counts = torch.zeros(5, dtype=torch.float64, device=device)
        group: Any = parallel_state.get_context_parallel_group()
        for scores in self._scores:
            scores = gather_sequence(scores, group)
            counts += selection_counts(scores, **self._settings)
        self._scores.clear()
        dist.all_reduce(counts)
        saturated, selected, ages, overflows, looked_at = counts.tolist()
        return SelectionHealth(
            saturated=saturated / selected if selected else None,
            mean_age=ages / selected if selected else None,
            overflow=overflows / looked_at if looked_at and not self._hard else None,
        )
