# SPDX-License-Identifier: Apache-2.0
"""One step under the profiler: its kernels' time by part, the time in which any ran, and the host's waits counted.

A kernel counts where it was launched, not when it ran. Kernels of one part run one after another on a stream; copies
and communication run beside others, so parts may add up to more than the busy time. A step replayed as a CUDA graph has
no parts: one launch starts all of its kernels.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from training_benchmark.parts import ATTENTION, PARTS, part_of_kernel, part_of_module

_NODE = "autograd::engine::evaluate_function: "
_WAITS = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cudaMemcpy$")
_ALLOCATIONS = re.compile(r"^cuda(Malloc|Free)(Async)?$|^cudaHostAlloc|^cuMem(Create|Map)")


@dataclass
class Split:
    """One step, in milliseconds.

    parts         kernels by part; empty for a step that was not split
    attention_ms  in which a kernel ran that another attention would not need; None for a step that was not split
    busy_ms       in which any kernel ran
    step_ms       from the first kernel's start to the last one's end
    waits         the host's waits for the GPU, by place
    slowest       kernels by part ("step" for a step that was not split), and where they were launched
    """

    parts: dict[str, float] = field(default_factory=dict)
    attention_ms: float | None = None
    busy_ms: float = 0.0
    step_ms: float = 0.0
    waits: Counter[str] = field(default_factory=Counter)
    allocations: int = 0
    kernels: int = 0
    slowest: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def idle_ms(self) -> float:
        """In which no kernel ran."""
        return self.step_ms - self.busy_ms


@contextmanager
def ranges(model: torch.nn.Module) -> Iterator[None]:
    """Record a range around the forward of each module that is a part."""
    handles = []
    for name, module in model.named_modules():
        part = part_of_module(name, module)
        if part is None:
            continue
        opened: list[Any] = []

        def enter(*_: Any, part: str = part, opened: list[Any] = opened) -> None:
            opened.append(record_function(f"part:{part}"))
            opened[-1].__enter__()

        def leave(*_: Any, opened: list[Any] = opened) -> None:
            opened.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile_step(
    step: Callable[[], Any], model: torch.nn.Module, keep: Path | None = None, *, by_part: bool = True
) -> Split:
    """Profile one call of `step`; `keep` is where to leave the trace, `by_part` False for a step that is replayed."""
    with ranges(model), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("step"):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return split_trace(json.loads(path.read_text())["traceEvents"], by_part=by_part)


def places_of_waits(step: Callable[[], Any]) -> Counter[str]:
    """Python lines (file:line) of one step at which torch itself makes the host wait for the GPU, with their counts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return Counter(
        f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
        for w in caught
        if "synchroniz" in str(w.message)
    )


def split_trace(events: list[dict[str, Any]], *, by_part: bool = True) -> Split:
    """The split of one profiled step from its Chrome trace events (times in microseconds)."""
    complete = [e for e in events if e.get("ph") == "X"]
    step = next(e for e in complete if e["name"] == "step" and e.get("cat") == "user_annotation")
    began, ended = step["ts"], step["ts"] + step["dur"]
    phases = [e for e in complete if e.get("cat") == "user_annotation" and e["name"].startswith("phase:")]
    around = _operations_around_launches(complete)
    result = Split(parts=dict.fromkeys(PARTS, 0.0) if by_part else {})
    spans: list[tuple[float, float]] = []
    attention: list[tuple[float, float]] = []
    for event in complete:
        category, name = event.get("cat", ""), event["name"]
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            launched_in = around.get(event["args"].get("correlation"), ())
            part = part_of_kernel(name, launched_in) if by_part else "step"
            if by_part:
                result.parts[part] += event["dur"] / 1e3
            where = " < ".join(each.removeprefix(_NODE) for each in launched_in[:4])
            result.slowest.setdefault(part, Counter())[f"{_plain(name)} [{where}]"] += event["dur"] / 1e3
            result.kernels += category == "kernel"
            spans.append((event["ts"], event["ts"] + event["dur"]))
            if part in ATTENTION:
                attention.append(spans[-1])
        elif category in ("cuda_runtime", "cuda_driver") and began <= event["ts"] < ended:
            if _WAITS.match(name):
                result.waits[_phase(phases, event["ts"])] += 1
            result.allocations += bool(_ALLOCATIONS.match(name))
    result.busy_ms, result.attention_ms = covered(spans) / 1e3, covered(attention) / 1e3 if by_part else None
    if spans:
        result.step_ms = (max(e for _, e in spans) - min(s for s, _ in spans)) / 1e3
    return result


def _operations_around_launches(events: list[dict[str, Any]]) -> dict[int, tuple[str, ...]]:
    """For each launch (by correlation id) the operations that its thread was in, innermost first."""
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    found: dict[int, tuple[str, ...]] = {}
    for thread in threads.values():
        stack: list[tuple[float, str]] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1][0] <= event["ts"]:
                stack.pop()
            if event["cat"] in ("cpu_op", "user_annotation"):
                stack.append((event["ts"] + event["dur"], event["name"]))
            elif "correlation" in event.get("args", {}):
                found[event["args"]["correlation"]] = tuple(name for _, name in reversed(stack))
    return found


def _plain(kernel: str) -> str:
    """A kernel's name without the templates that all of torch's elementwise kernels share."""
    inner = re.search(r"(\w+)(Functor|_kernel_cuda|CUDAKernel\w*)", kernel)
    return inner.group(0) if kernel.startswith("void at::native") and inner else kernel[:60]


def _phase(phases: list[dict[str, Any]], when: float) -> str:
    inside = [e for e in phases if e["ts"] <= when < e["ts"] + e["dur"]]
    return inside[-1]["name"].removeprefix("phase:") if inside else "between"


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
