# SPDX-License-Identifier: Apache-2.0
"""Which token is offered to the pool when: the integer arithmetic shared by every backend.

Positions are absolute. A call sees `past` tokens already consumed and `s` new ones; slot r is the refresh point
c_r = stride * (past // stride + r). A token at position p enters the pool at the first refresh point c >= p + window
(before that the local band holds it), so the pool of slot r has been offered every position <= c_r - window.
"""

from __future__ import annotations

from dataclasses import dataclass

from .types import list_tile


@dataclass(frozen=True)
class Geometry:
    """One unpacked call. `stateful` says whether a `SelectionState` came in (then E = pool + recent + s)."""

    past: int
    s: int
    window: int
    stride: int
    pool: int
    stateful: bool

    @property
    def recent(self) -> int:
        """Tokens a state keeps beside the pool: those that may not have been offered yet."""
        return self.window + self.stride - 1

    @property
    def token_base(self) -> int:
        """E index of this call's first token."""
        return self.pool + self.recent if self.stateful else 0

    @property
    def num_keys(self) -> int:
        return self.token_base + self.s

    @property
    def first_refresh(self) -> int:
        """Global number of slot 0."""
        return self.past // self.stride

    @property
    def num_slots(self) -> int:
        return (self.past + self.s - 1) // self.stride - self.first_refresh + 1 if self.s else 0

    @property
    def first_candidate(self) -> int:
        """Position of the first token that no earlier call has offered to the pool."""
        if self.past == 0:
            return 0
        return max(0, self.stride * ((self.past - 1) // self.stride) - self.window + 1)

    @property
    def candidate_base(self) -> int:
        """E index of position `first_candidate`."""
        return self.token_base + self.first_candidate - self.past

    def offered(self, slot: int) -> int:
        """Candidates of this call that slot `slot` has been offered."""
        return max(0, self.stride * (self.first_refresh + slot) - self.window + 1 - self.first_candidate)

    def slot_of(self, candidate: int) -> int:
        """First slot that has been offered candidate number `candidate`."""
        position = self.first_candidate + candidate
        return -(-(position + self.window) // self.stride) - self.first_refresh

    @property
    def num_tiles(self) -> int:
        tile = list_tile(self.stride)
        return (self.past + self.s - 1) // tile - self.past // tile + 1 if self.s else 0

    def tile_slot(self, tile: int) -> int:
        """Slot whose selection list tile `tile` stores."""
        slots = list_tile(self.stride) // self.stride
        return max(0, (self.first_refresh // slots + tile) * slots - self.first_refresh)
