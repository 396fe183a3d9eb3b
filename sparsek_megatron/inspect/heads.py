# SPDX-License-Identifier: Apache-2.0
"""Numbers of one head's selection over one text, and what is wrong with it, from its scores alone.

Legend: s tokens; k = topk; w = window; c refresh point; u score; tau threshold; evict first query that no longer
attends to a key; age of a selected key, c - j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sparsek_kernels import select, sparsek
from sparsek_kernels.selection import pool_indices
from torch import Tensor

from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.diagnostics import pool_overflow

GATE_BINS = 20
SATURATED = 0.99
POSITIONAL = 0.95


@dataclass(frozen=True)
class HeadStatistics:
    """One KV head of one layer (both counted from 0).

    scores     [s] fp32                        evict      [s] int32; s means never
    threshold  [R] fp32, one per refresh point; -inf while the pool holds at most k keys
    age_edges  token counts, 0, 1, 2, 4, ...    age_counts selected keys, over all refresh points, by age
    gate_counts  selected keys by gate, in `GATE_BINS` bins over [0, 1], the last with gates of exactly 1 in it
    saturated  share of gates that are 1, recent and first the share of selected keys that are among the k most recent
               and the k first candidates, where there are at least 2 k candidates; None where there never are
    overflow   share of refresh points where the pool cut off a key with a positive gate; None where it never could
    warnings   what is wrong, in words
    """

    layer: int
    head: int
    scores: Tensor
    evict: Tensor
    threshold: Tensor
    age_edges: tuple[int, ...]
    age_counts: tuple[int, ...]
    gate_counts: tuple[int, ...]
    saturated: float | None
    recent: float | None
    first: float | None
    overflow: float | None

    @property
    def warnings(self) -> list[str]:
        where = f"layer {self.layer}, head {self.head}"
        found = []
        if self.saturated is not None and self.saturated >= SATURATED:
            found.append(
                f"{where}: {self.saturated:.1%} of the gates are saturated at 1, so its scorer hardly gets a gradient "
                "(lower score_spread, or raise pool)"
            )
        for share, kind in ((self.recent, "most recent"), (self.first, "first")):
            if share is not None and share >= POSITIONAL:
                found.append(
                    f"{where}: {share:.1%} of the selected keys are simply the {kind} ones: its scores follow the "
                    "position and not the content"
                )
        return found

    def summary(self) -> dict[str, object]:
        """Plain numbers, for JSON."""
        names = (
            "layer",
            "head",
            "age_edges",
            "age_counts",
            "gate_counts",
            "saturated",
            "recent",
            "first",
            "overflow",
        )
        return {**{name: getattr(self, name) for name in names}, "warnings": self.warnings}


def _share(counts: list[tuple[int, int]]) -> float | None:
    total = sum(n for _, n in counts)
    return sum(n for n, _ in counts) / total if total else None


@torch.no_grad()
def head_statistics(scores: Tensor, sparsek_config: SparseKConfig, *, layer: int) -> list[HeadStatistics]:
    """Statistics of every head of a layer: scores [s, n] fp32, for all n KV heads, of one unpacked sequence.

    Costs memory of refresh points x pool; meant for texts, not for training.
    """
    topk, window, stride, pool = (getattr(sparsek_config, x) for x in ("topk", "window", "stride", "pool"))
    hard = sparsek_config.hard_selection
    length = scores.shape[0]
    rows = scores.detach().float().cpu()[None]
    sizes = {"topk": topk, "window": window, "stride": stride, "hard": hard}
    selection = select(rows, **sizes, pool=pool, backend="torch")
    pools = pool_indices(rows, **sizes, pool=pool)[0]  # [n, R, pool]
    refresh = torch.arange(pools.shape[1]) * stride
    edges = (0, *(2**i for i in range(max(1, math.ceil(math.log2(max(2, length)))) + 1)))
    answer = []
    for head in range(scores.shape[1]):
        gates, ages, counts = [], [], {"saturated": [], "recent": [], "first": []}
        for slot, point in enumerate(refresh.tolist()):
            candidates = point - window + 1
            members = pools[head, slot][pools[head, slot] >= 0]
            chosen = members[:topk]
            if chosen.numel() == 0:
                continue
            ages.append(point - chosen)
            gate = sparsek(rows[0, members, head], topk)[:topk]
            gates.append(gate)
            if members.numel() > topk and not hard:
                counts["saturated"].append((int((gate >= 1).sum()), gate.numel()))
            if candidates >= 2 * topk:
                counts["recent"].append((int((chosen >= candidates - topk).sum()), topk))
                counts["first"].append((int((chosen < topk).sum()), topk))
        age = torch.cat(ages) if ages else torch.zeros(0)
        gate = torch.cat(gates) if gates else torch.zeros(0)
        overflowing, looked_at = pool_overflow(
            rows[..., head : head + 1],
            topk=topk,
            window=window,
            stride=stride,
            pool=pool,
            samples=len(refresh),
        )
        bins = torch.bucketize(age.float(), torch.tensor(edges[1:-1], dtype=torch.float32), right=True)
        answer.append(
            HeadStatistics(
                layer=layer,
                head=head,
                scores=rows[0, :, head].clone(),
                evict=selection.evict[0, head].clone(),
                threshold=selection.threshold[0, head].clone(),
                age_edges=edges,
                age_counts=tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()),
                gate_counts=tuple(torch.histc(gate.float(), bins=GATE_BINS, min=0.0, max=1.0).int().tolist()),
                saturated=_share(counts["saturated"]),
                recent=_share(counts["recent"]),
                first=_share(counts["first"]),
                overflow=overflowing / looked_at if looked_at and not hard else None,
            )
        )
    return answer
