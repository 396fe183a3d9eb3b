# SPDX-License-Identifier: Apache-2.0
"""Slow, independent implementations of the definitions, written from them and sharing no code with the package.

`project` and `brute_force` recompute everything from scratch, in float64. `StreamingSelection` consumes one score at a
time with heaps in O(log pool) amortised, in exact rational arithmetic: tau never falls, so keys only ever move from
saturated to fractional to zero.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def threshold(z: np.ndarray, k: int) -> float:
    """tau of the SparseK operator by enumeration of the breakpoints z_j and z_j - 1; requires 1 <= k < len(z)."""
    z = np.sort(np.asarray(z, dtype=np.float64))[::-1]
    if z[k - 1] - z[k] >= 1.0:
        return (z[k - 1] + z[k] - 1.0) / 2.0
    centre = z[k - 1]
    z = z - centre
    points = np.unique(np.concatenate([z, z - 1.0]))
    points = points[(points >= -1.0) & (points <= 0.0)]
    mass = np.clip(z[None, :] - points[:, None], 0.0, 1.0).sum(1)
    left = points[np.flatnonzero(mass >= k)[-1]]
    right = points[np.flatnonzero(mass < k)[0]]
    middle = 0.5 * (left + right)
    fractional = z[(z - middle > 0.0) & (z - middle < 1.0)]
    saturated = int((z - middle >= 1.0).sum())
    return centre + (fractional.sum() + saturated - k) / len(fractional)


def project(z: np.ndarray, k: int) -> np.ndarray:
    """Euclidean projection of z onto {0 <= p <= 1, sum p = k}; ones where k >= len(z)."""
    z = np.asarray(z, dtype=np.float64)
    if k >= len(z):
        return np.ones_like(z)
    return np.clip(z - threshold(z, k), 0.0, 1.0)


@dataclass(frozen=True)
class Refresh:
    """One refresh point of one row.

    position    the refresh point c
    pool        key indices, score descending, ties to the lower index; the first `topk` are the selected ones
    selected    pool[:topk]
    tau         threshold, -inf while the pool holds at most topk
    gates       float64 gates of the pool, in its order
    fractional  set of keys with 0 < gate < 1
    """

    position: int
    pool: list[int]
    selected: list[int]
    tau: float
    gates: np.ndarray
    fractional: frozenset[int]


def brute_force(
    scores: Sequence[float], *, topk: int, window: int, stride: int, pool: int, hard: bool = False
) -> list[Refresh]:
    """Every refresh point of one sequence and KV head, from section "definitions" of the mathematics."""
    u = np.asarray(scores, dtype=np.float64)
    out = []
    for c in range(0, len(u), stride):
        candidates = sorted(range(max(0, c - window + 1)), key=lambda j: (-u[j], j))
        members = candidates[:pool]
        tau = float("-inf")
        if len(members) > topk and not hard:
            tau = threshold(u[members], topk)
        gates = np.clip(u[members] - tau, 0.0, 1.0) if tau > float("-inf") else np.ones(len(members))
        inside = frozenset(j for j, gate in zip(members, gates, strict=True) if 0.0 < gate < 1.0)
        out.append(Refresh(c, members, members[:topk], tau, gates, inside))
    return out


def attended(refreshes: list[Refresh], query: int, *, window: int, stride: int) -> set[int]:
    """Keys that a query attends to: the local band and the selection of its refresh point."""
    refresh = refreshes[query // stride]
    return set(range(max(0, refresh.position - window + 1), query + 1)) | set(refresh.selected)


class StreamingSelection:
    """Constant memory per row: a pool in two heaps, and heaps of its saturated and fractional members."""

    def __init__(self, *, topk: int, pool: int) -> None:
        self.topk, self.pool = topk, pool
        self.score: list[Fraction] = []
        self._selected: list[tuple[Fraction, int]] = []  # min-heaps of (score, -index): the worst first
        self._rest: list[tuple[Fraction, int]] = []
        self._rest_best: list[tuple[Fraction, int]] = []  # max-heap of the same, deleted lazily
        self._alive: set[int] = set()
        self._state: dict[int, str] = {}
        self._saturated: list[tuple[Fraction, int]] = []
        self._fractional: list[tuple[Fraction, int]] = []
        self._counts = {"saturated": 0, "fractional": 0, "zero": 0}
        self._sum = Fraction(0)  # over F
        self._point: Fraction | None = None  # a lower bound of tau

    def members(self) -> list[int]:
        order = sorted(self._selected + self._rest, key=lambda item: (-item[0], -item[1]))
        return [-index for _, index in order]

    def selected(self) -> list[int]:
        return [-index for _, index in sorted(self._selected, key=lambda item: (-item[0], -item[1]))]

    def push(self, score: float) -> None:
        """Offer the next key."""
        index = len(self.score)
        z = Fraction(score)
        self.score.append(z)
        moved = heapq.heappushpop(self._selected, (z, -index)) if len(self._selected) >= self.topk else None
        if moved is None and len(self._selected) < self.topk:
            heapq.heappush(self._selected, (z, -index))
        self._enter(index)
        if moved is not None:
            heapq.heappush(self._rest, moved)
            heapq.heappush(self._rest_best, (-moved[0], -moved[1]))
            self._alive.add(-moved[1])
            if len(self._selected) + len(self._rest) > self.pool:
                _, worst = heapq.heappop(self._rest)
                self._alive.discard(-worst)
                self._leave(-worst)

    def tau(self) -> float:
        """Threshold of the pool as it stands."""
        if not self._rest:
            return float("-inf")
        while self._rest_best[0][1] not in self._alive:
            heapq.heappop(self._rest_best)
        kth, following = self._selected[0][0], -self._rest_best[0][0]
        if kth - following >= 1:
            return float((kth + following - 1) / 2)
        if self._point is None:
            self._point = following - 1
            for index in self.members():
                self._classify(index)
        return float(self._advance())

    def _classify(self, index: int) -> None:
        distance = self.score[index] - self._point
        state = "saturated" if distance >= 1 else "fractional" if distance > 0 else "zero"
        self._state[index] = state
        self._counts[state] += 1
        if state == "saturated":
            heapq.heappush(self._saturated, (self.score[index], index))
        elif state == "fractional":
            self._sum += self.score[index]
            heapq.heappush(self._fractional, (self.score[index], index))

    def _enter(self, index: int) -> None:
        if self._point is not None:
            self._classify(index)

    def _leave(self, index: int) -> None:
        state = self._state.pop(index, None)
        if state is not None:
            self._counts[state] -= 1
            if state == "fractional":
                self._sum -= self.score[index]

    def _advance(self) -> Fraction:
        """Raise the lower bound to the root, event by event."""
        while True:
            for heap, state in ((self._saturated, "saturated"), (self._fractional, "fractional")):
                while heap and self._state.get(heap[0][1]) != state:
                    heapq.heappop(heap)
            events = []
            if self._saturated:
                events.append(self._saturated[0][0] - 1)
            if self._fractional:
                events.append(self._fractional[0][0])
            size = self._counts["fractional"]
            if size:
                root = (self._sum + self._counts["saturated"] - self.topk) / size
                if root <= min(events):
                    return root
            self._point = max(self._point, min(events))
            if self._saturated and self._saturated[0][0] - 1 <= self._point:
                _, index = heapq.heappop(self._saturated)
                self._counts["saturated"] -= 1
            else:
                z, index = heapq.heappop(self._fractional)
                self._counts["fractional"] -= 1
                self._sum -= z
            # at its own event a saturated key has gate 1 and turns fractional; a fractional one has gate 0
            if self._state[index] == "saturated":
                self._state[index] = "fractional"
                self._counts["fractional"] += 1
                self._sum += self.score[index]
                heapq.heappush(self._fractional, (self.score[index], index))
            else:
                self._state[index] = "zero"
                self._counts["zero"] += 1


def streaming(
    scores: Sequence[float], *, topk: int, window: int, stride: int, pool: int
) -> list[tuple[list[int], list[int], float]]:
    """(pool, selected, tau) at every refresh point, offering each key once, when it leaves the window."""
    stream = StreamingSelection(topk=topk, pool=pool)
    out = []
    for c in range(0, len(scores), stride):
        while len(stream.score) <= c - window:
            stream.push(float(scores[len(stream.score)]))
        out.append((stream.members(), stream.selected(), stream.tau()))
    return out
