# SPDX-License-Identifier: Apache-2.0
"""One PNG of a model's selection: ages, gates, tau over position, and pool overflow, of every layer and head."""

from __future__ import annotations

import io
from typing import Any

import torch

from sparsek_megatron.inspect.heads import GATE_BINS, HeadStatistics


def _heatmap(axes: Any, heads: list[HeadStatistics], counts: str) -> Any:
    rows = torch.tensor([getattr(h, counts) for h in heads], dtype=torch.float64)
    shares = rows / rows.sum(-1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    step = max(1, len(heads) // 16)
    axes.set_yticks(range(0, len(heads), step), [f"{h.layer}.{h.head}" for h in heads[::step]], fontsize=7)
    axes.set_ylabel("layer.head")
    return image


def draw(heads: list[HeadStatistics], *, stride: int, title: str) -> bytes:
    """The PNG. heads: all heads of all SparseK layers, at least one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(13, 9))
    (ages, gates), (thresholds, overflow) = panels
    edges = heads[0].age_edges
    figure.colorbar(_heatmap(ages, heads, "age_counts"), ax=ages)
    ticks = range(0, len(edges) - 1, 2)
    ages.set_xticks(list(ticks), [str(edges[i]) for i in ticks], fontsize=7)
    ages.set(title="Selected keys by age (share)", xlabel="tokens before the refresh point, at least")
    figure.colorbar(_heatmap(gates, heads, "gate_counts"), ax=gates)
    gates.set_xticks([0, GATE_BINS // 2, GATE_BINS - 1], ["0", "0.5", "1"])
    gates.set(title="Selected keys by gate (share)", xlabel="gate")
    colours = pyplot.get_cmap("turbo")
    last = max(h.layer for h in heads) or 1
    for h in heads:
        tau = h.threshold.masked_fill(~h.threshold.isfinite(), float("nan"))
        thresholds.plot(
            [r * stride for r in range(len(tau))], tau.tolist(), color=colours(h.layer / last), linewidth=0.9
        )
    thresholds.set(title="Threshold tau (colour: layer, blue first)", xlabel="position", ylabel="score")
    thresholds.grid(alpha=0.3)
    shares = [h.overflow if h.overflow is not None else 0.0 for h in heads]
    overflow.bar(range(len(heads)), shares)
    step = max(1, len(heads) // 16)
    names = [f"{h.layer}.{h.head}" for h in heads[::step]]
    overflow.set_xticks(range(0, len(heads), step), names, fontsize=7, rotation=90)
    overflow.set(title="Refresh points where the pool overflows (share)", xlabel="layer.head", ylim=(0, 1))
    figure.suptitle(title)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    pyplot.close(figure)
    return buffer.getvalue()
