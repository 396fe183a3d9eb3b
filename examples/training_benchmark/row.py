# SPDX-License-Identifier: Apache-2.0
"""A row of the benchmark: one case, what its profiled step says of the timed ones, and both in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training_benchmark.trace import Split


@dataclass
class Row:
    """One case. Times in milliseconds, memory in GiB on the rank that held most; None is "not measured".

    `step_ms` is of steps without a profiler; `split` is of one more step under it, which may take longer. `peak_gib` is
    what was allocated at most, and what a CUDA graph keeps besides.
    """

    shape: str
    layers: int
    tokens: int
    arm: str
    trainer: str
    gpus: int
    tp: int
    cp: int
    options: str
    topk: int | None = None  # these four: None or empty where the arm has no such setting
    window: int | None = None
    stride: int | None = None
    slope: str = ""  # the scores' initial slope; "topk" is the default, a fall by 1 in topk tokens
    max_connections: str = ""  # CUDA_DEVICE_MAX_CONNECTIONS
    device: str = ""
    date: str = ""
    commit: str = ""
    replaced: str = ""  # "1" once a later row of the same case is in the file; this program writes none
    step_ms: float | None = None
    tokens_per_second: float | None = None
    model_tflops: float | None = None  # per GPU
    mfu: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    split: Split | None = None
    dense_tokens_per_second: float | None = None
    dense_without_attention_ms: float | None = None  # the dense arm's step without its attention, in this run
    error: str = ""

    @property
    def profiled_step_ms(self) -> float | None:
        """The profiled step, from its first kernel's start to its last one's end."""
        return self.split.step_ms if self.split is not None and self.split.busy_ms else None

    @property
    def without_attention_ms(self) -> float | None:
        """The step without attention, scoring, selection and exchange: what no attention could make faster.

        Attention takes the share of the step that it took of the profiled one.
        """
        attention = None if self.split is None else self.split.attention_ms
        if attention is None or self.step_ms is None or self.profiled_step_ms is None:
            return None
        return self.step_ms * (1 - attention / self.profiled_step_ms)

    @property
    def share_of_bound(self) -> float | None:
        """Amdahl: the step at zero cost of attention (the dense arm's, else this arm's) over this step."""
        bound = (
            self.dense_without_attention_ms
            if self.dense_without_attention_ms is not None
            else self.without_attention_ms
        )
        return None if bound is None or self.step_ms is None else bound / self.step_ms

    @property
    def speedup(self) -> float | None:
        """Tokens per second over the dense arm's of the same case."""
        if self.dense_tokens_per_second is None or self.tokens_per_second is None:
            return None
        return self.tokens_per_second / self.dense_tokens_per_second


def reject_without_loss(row: Row) -> None:
    """A step whose loss is no number computed something else, and matrix products of NaN take less time than others:
    such a row keeps its loss and no measurement.
    """
    if row.loss is not None and not math.isfinite(row.loss):
        row.error = f"loss is {row.loss}: not a measurement"
        row.step_ms = row.tokens_per_second = row.model_tflops = row.mfu = row.peak_gib = row.split = None


def compare_with_dense(row: Row, rows: list[Row]) -> None:
    """Fill what a row says of the dense arm from the dense row of the same case, where there is one, in its layout."""
    case = ("shape", "layers", "tokens", "trainer", "gpus", "options")
    for other in rows:
        if (
            other.arm == "dense"
            and not other.error
            and all(getattr(other, n) == getattr(row, n) for n in case)
        ):
            row.dense_tokens_per_second, row.dense_without_attention_ms = (
                other.tokens_per_second,
                other.without_attention_ms,
            )


def line(row: Row) -> str:
    """One case in two lines: the step, and where it goes."""
    layout = f"TP{row.tp}" + (f" CP{row.cp}" if row.cp > 1 else "")
    head = (
        f"{row.shape} x{row.layers:<3} {row.tokens:>8} {row.arm:<8} {row.trainer:<9} {layout} of {row.gpus}"
    )
    head += f" {row.options}" if row.options else ""
    if row.error:
        return f"{head}: {row.error}"
    text = f"{head}: {row.step_ms:.1f} ms, {row.tokens_per_second:,.0f} tokens/s, loss {row.loss:.3f}"
    text += f", {row.model_tflops:.0f} TFLOP/s/GPU" + (
        "" if row.mfu is None else f" (MFU {100 * row.mfu:.1f} %)"
    )
    if row.peak_gib is not None:
        text += f", peak {row.peak_gib:.1f} GiB"
    if row.speedup is not None:
        text += f", {row.speedup:.2f}x dense"
    if row.split is None or row.profiled_step_ms is None:
        return text
    split = row.split
    waits = ", ".join(f"{count} in {place}" for place, count in split.waits.items()) or "none"
    counts = f"{split.kernels} kernels, host waits: {waits}, {split.allocations} allocations"
    text += f"\n    {row.profiled_step_ms:.1f} ms profiled: "
    if not split.parts:
        return f"{text}kernels {split.busy_ms:.1f}; no kernel running {split.idle_ms:.1f}; {counts}"
    shown = ", ".join(f"{name} {ms:.1f}" for name, ms in split.parts.items() if ms)
    assert row.share_of_bound is not None
    choosing = 100 * (split.parts["scoring"] + split.parts["selection"]) / row.profiled_step_ms
    return (
        f"{text}{shown}; no kernel running {split.idle_ms:.1f}; "
        f"{100 * row.share_of_bound:.1f} % of the bound, scoring and selection {choosing:.1f} % of the step; {counts}"
    )
