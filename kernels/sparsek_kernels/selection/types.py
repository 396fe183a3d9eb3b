# SPDX-License-Identifier: Apache-2.0
"""What selection hands to attention, and what it carries from one chunk of a sequence to the next.

Legend (the symbols of `kernels/README.md`):

    s      tokens in this call                c(i)   refresh point of query i, stride * (i // stride)
    b      batch                              R      refresh slots, ceil(s / stride) (see `select` for packing)
    hkv    key/value heads                    r      refresh slot of this call, 0 ... R - 1
    tau    threshold of the SparseK operator  F      keys with fractional gate, 0 < u - tau < 1, inside the pool
    NT     list tiles, ceil(s / list_tile)    evict  first query that no longer attends to a key
    E      keys this call can see: s, and with an incoming `SelectionState` pool + (window + stride - 1) + s:
           first the carried pool in its order, then the recent tokens, oldest first, then this call's tokens

The whole sparsity pattern is one integer per key: query i attends to key j exactly when `j <= i < evict[j]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def list_tile(stride: int) -> int:
    """Queries per stored list of selected keys: the smallest multiple of `stride` that is at least 64.

    A list tile starts at a refresh point, so its list is exactly the selection of its first query, and every
    other key its queries need lies in the contiguous band that starts `window` before the tile.
    """
    return stride * -(-64 // stride)


@dataclass(frozen=True)
class SelectionState:
    """Everything about a prefix of a sequence that later tokens can still see, at the level of scores.

    Its size depends on `pool`, `window` and `stride` only, never on the length of the prefix.
    Positions are absolute (they count from the start of the sequence).

    length         tokens consumed so far: the position of the next token
    pool_scores    [b, hkv, pool] fp32, score descending, ties to the lower position; -inf where empty
    pool_index     [b, hkv, pool] int32 absolute positions of the same keys; -1 where empty
    recent_scores  [b, hkv, window + stride - 1] fp32, scores of positions
                   `length - (window + stride - 1) ... length - 1` (newest last; -inf before the start):
                   every token that has not been offered to the pool yet is here
    threshold      [b, hkv] fp64, tau of the last refresh point processed; -inf while the pool holds <= topk
    topk, window, stride  settings of the calls that made it, which those that continue it must share; None: not known
    """

    length: int
    pool_scores: torch.Tensor
    pool_index: torch.Tensor
    recent_scores: torch.Tensor
    threshold: torch.Tensor
    topk: int | None = None
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Selection:
    """Result of `select`: one threshold per refresh point, one eviction per key, one key list per query tile.

    threshold      [b, hkv, R] fp32, tau rounded to fp32; -inf while the pool holds <= topk; +inf in unused slots
    threshold_low  [b, hkv, R] fp32, what rounding left: tau = threshold + threshold_low in float64 (0 where infinite)
                   Gates are computed as (u - threshold) - threshold_low, exact where it matters at any score offset.
    evict          [b, hkv, E] int32, a query index of this call; the end of the key's sequence (s unpacked) for "never"
    lists          [b, hkv, NT, topk] int32 key indices in 0 ... E - 1 selected at the refresh point of the first query
                   of each list tile, score descending (ties to the lower index); -1 past the end of the list
    fraction_start [b, hkv, E] int32 refresh slots: key j is in F exactly for slots fraction_start <= r < fraction_end
    fraction_end   [b, hkv, E] int32
    fraction_size  [b, hkv, R] int32, |F| per refresh slot (members outside the top-k included)
    state          the `SelectionState` after the last token, when asked for, else None
    past           P, tokens consumed before this call: the length of the incoming state, else 0

    With `cu_seqlens`, slots and tiles restart at each sequence: the slot of query i of sequence a is
    sum_{a' < a} ceil(len_a' / stride) + (i - start_a) // stride in a capacity of R = s // stride + num_seqs, and list
    tiles follow the same rule with `list_tile` in the place of `stride`.
    With a state of length P, slot r is the refresh point stride * (P // stride + r), and list tile t starts at
    position list_tile * (P // list_tile + t); the first list is taken at the refresh point of position P.
    """

    threshold: torch.Tensor
    threshold_low: torch.Tensor
    evict: torch.Tensor
    lists: torch.Tensor
    fraction_start: torch.Tensor
    fraction_end: torch.Tensor
    fraction_size: torch.Tensor
    topk: int
    window: int
    stride: int
    pool: int
    cu_seqlens: torch.Tensor | None = None
    state: SelectionState | None = None
    past: int = 0

    @property
    def list_tile(self) -> int:
        return list_tile(self.stride)
