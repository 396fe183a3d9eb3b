# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the SparseK operator: no sort, one program per row, which it re-reads from cache at each step.

tau is bracketed between min - 1 (every gate open) and max (every gate closed). Active-set steps

    tau <- tau + (sum over F of (z - tau) + A - k) / |F|

are taken where they stay inside the bracket, bisections elsewhere and, after a few steps, in between, so that ties
cannot make it cycle. An unchanged active set after an active-set step is the root. Arithmetic is float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_ROW = 1 << 24
"""Longest row the kernel takes: counts and offsets inside a row are int32 with room to spare."""


@triton.jit
def gates(z_ptr, p_ptr, fractional_ptr, n, k, row_stride, CHUNK: tl.constexpr):
    """Grid (rows). Writes the row's gates and the membership of F."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    lane = tl.arange(0, CHUNK)
    largest = tl.full([CHUNK], float("-inf"), tl.float32)
    smallest = tl.full([CHUNK], float("inf"), tl.float32)
    for first in range(0, n, CHUNK):
        inside = first + lane < n
        score = tl.load(z_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
        largest = tl.where(inside, tl.maximum(largest, score), largest)
        smallest = tl.where(inside, tl.minimum(smallest, score), smallest)
    hi = tl.max(largest, 0).to(tl.float64)
    lo = tl.min(smallest, 0).to(tl.float64) - 1.0
    tau = tl.maximum(hi - 1.0, lo)
    last_high = tl.zeros([], tl.int32) - 1
    last_low = tl.zeros([], tl.int32) - 1
    step_number = 0
    while step_number < 256:
        count = tl.zeros([CHUNK], tl.int64)  # #{z - tau >= 1} in the low word, |F| in the high word
        partial = tl.zeros([CHUNK], tl.float64)
        for first in range(0, n, CHUNK):
            score = tl.load(z_ptr + first + lane, mask=first + lane < n, other=float("-inf")).to(tl.float32)
            distance = score.to(tl.float64) - tau
            saturated = distance >= 1.0
            count += tl.where(distance > 0.0, tl.where(saturated, 1, 1 << 32), 0)
            partial += tl.where((distance > 0.0) & (saturated == 0), distance, 0.0)
        counts = tl.sum(count, 0)
        high = (counts & 0xFFFFFFFF).to(tl.int32)
        size = (counts >> 32).to(tl.int32)
        low = high + size
        if (low == last_low) & (high == last_high):
            step_number = 256
        elif (size == 0) & (high == k):
            # tau separates k gates of 1 from gates of 0: move it midway between its two neighbours
            smallest = tl.full([CHUNK], float("inf"), tl.float32)
            largest = tl.full([CHUNK], float("-inf"), tl.float32)
            for first in range(0, n, CHUNK):
                score = tl.load(z_ptr + first + lane, mask=first + lane < n, other=float("-inf")).to(
                    tl.float32
                )
                above = score.to(tl.float64) - tau > 0.0
                smallest = tl.where(above, tl.minimum(smallest, score), smallest)
                largest = tl.where(above, largest, tl.maximum(largest, score))
            tau = 0.5 * (tl.min(smallest, 0).to(tl.float64) + tl.max(largest, 0).to(tl.float64) - 1.0)
            step_number = 256
        else:
            excess = tl.sum(partial, 0) + (high - k).to(tl.float64)
            lo = tl.where(excess > 0.0, tau, lo)
            hi = tl.where(excess > 0.0, hi, tau)
            step = tau + excess / tl.maximum(size, 1).to(tl.float64)
            good = (size > 0) & (step >= lo) & (step <= hi)
            good = good & ((step_number < 12) | (step_number % 2 == 0))
            tau = tl.where(good, step, 0.5 * (lo + hi))
            last_low = tl.where(good, low, -1)
            last_high = tl.where(good, high, -1)
            step_number += 1
    for first in range(0, n, CHUNK):
        inside = first + lane < n
        score = tl.load(z_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
        distance = score.to(tl.float64) - tau
        gate = tl.minimum(tl.maximum(distance, 0.0), 1.0).to(tl.float32)
        fractional = (distance > 0.0) & (distance < 1.0)
        tl.store(p_ptr + row * n + first + lane, gate, mask=inside)
        tl.store(fractional_ptr + row * n + first + lane, fractional.to(tl.int8), mask=inside)


def gates_triton(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [m, n] and membership of F [m, n] bool, for 1 <= k < n <= MAX_ROW and unit stride in the last dimension."""
    m, n = rows.shape
    out = torch.empty(m, n, dtype=rows.dtype, device=rows.device)
    fractional = torch.empty(m, n, dtype=torch.int8, device=rows.device)
    chunk = min(4096, triton.next_power_of_2(n))
    gates[(m,)](rows, out, fractional, n, k, rows.stride(0), CHUNK=chunk, num_warps=max(1, chunk // 512))
    return out, fractional.view(torch.bool)
