# SPDX-License-Identifier: Apache-2.0
"""Selection on the CPU: against brute force and the streaming oracle, its invariants, chunks, packing, refusals."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import attended, brute_force, streaming
from sparsek_kernels import select, sparsek
from sparsek_kernels.selection import list_tile, pool_indices

FIELDS = ("threshold", "threshold_low", "evict", "lists", "fraction_start", "fraction_end", "fraction_size")
STATE_FIELDS = ("pool_scores", "pool_index", "recent_scores", "threshold")


def make_scores(kind: str, n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """[n] float32 scores of a named shape."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(n)
    if kind == "grid":
        u = np.round(2 * u) / 2
    elif kind == "constant":
        u = np.full(n, u[0])
    elif kind == "rising":
        u = np.sort(u)
    elif kind == "falling":
        u = np.sort(u)[::-1]
    elif kind == "drifting":
        u = np.cumsum(u) * 0.3
    elif kind == "narrow":
        u = 0.1 * u
    return torch.from_numpy((u * scale).astype(np.float32))


@st.composite
def cases(draw, max_n: int = 70) -> tuple[torch.Tensor, dict[str, int]]:
    n = draw(st.integers(1, max_n))
    kind = draw(st.sampled_from(["normal", "grid", "constant", "rising", "falling", "drifting", "narrow"]))
    scale = draw(st.sampled_from([1e-6, 1e-2, 1.0, 1.0, 20.0, 1e6]))
    topk = draw(st.integers(1, 9))
    settings_ = {
        "topk": topk,
        "window": draw(st.sampled_from([1, 2, 5, 16, 100])),
        "stride": draw(st.sampled_from([1, 2, 3, 8, 64, 100])),
        "pool": topk + draw(st.integers(1, 12)),
    }
    return make_scores(kind, n, draw(st.integers(0, 2**31)), scale), settings_


def exact_tau(selection) -> torch.Tensor:
    return selection.threshold.double() + selection.threshold_low.double()


@given(cases())
@settings(max_examples=120, deadline=None)
def test_matches_brute_force(case):
    u, kw = case
    n, stride, window = len(u), kw["stride"], kw["window"]
    selection = select(u[None, :, None], **kw)
    tau = exact_tau(selection)[0, 0]
    evict = selection.evict[0, 0]
    start, end = selection.fraction_start[0, 0], selection.fraction_end[0, 0]
    refreshes = brute_force(u.tolist(), **kw)
    scale = max(1.0, u.abs().max().item())
    keys = torch.arange(n)
    for r, refresh in enumerate(refreshes):
        if refresh.tau == float("-inf"):
            assert tau[r] == float("-inf")
        else:
            assert abs(tau[r].item() - refresh.tau) < 1e-10 * scale
            gates = (u[refresh.pool].double() - tau[r]).clamp(0, 1)
            assert abs(gates.sum().item() - kw["topk"]) < 1e-9 * scale
            assert gates[: kw["topk"]].sum().item() <= kw["topk"]
            assert gates[: kw["topk"]].min().item() >= 1 / (kw["pool"] - kw["topk"] + 1) - 1e-9 * scale
        members = set(torch.nonzero((start <= r) & (r < end)).flatten().tolist())
        assert len(members) == selection.fraction_size[0, 0, r]
        distance = u.double() - tau[r]
        assert members == {j for j in refresh.pool if 0 < distance[j] < 1}
        for query in {refresh.position, min(refresh.position + stride, n) - 1}:
            mine = set(torch.nonzero((keys <= query) & (query < evict)).flatten().tolist())
            assert mine == attended(refreshes, query, window=window, stride=stride)
    tile = list_tile(stride)
    for t in range(-(-n // tile)):
        expected = refreshes[t * tile // stride].selected
        assert selection.lists[0, 0, t].tolist() == expected + [-1] * (kw["topk"] - len(expected))
    finite = tau[tau > float("-inf")]
    assert bool((finite.diff() >= 0).all())  # appending never lowers tau
    assert bool((evict >= torch.minimum(keys + window, torch.tensor(n))).all())


@given(cases(60))
@settings(max_examples=50, deadline=None)
def test_streaming_oracle_agrees_with_brute_force_and_select(case):
    u, kw = case
    stream = streaming(u.tolist(), **kw)
    tau = exact_tau(select(u[None, :, None], **kw))[0, 0]
    scale = max(1.0, u.abs().max().item())
    for r, (refresh, (pool, selected, value)) in enumerate(
        zip(brute_force(u.tolist(), **kw), stream, strict=True)
    ):
        assert (pool, selected) == (refresh.pool, refresh.selected)
        assert value == refresh.tau or abs(value - refresh.tau) < 1e-10 * scale
        assert value == tau[r] or abs(value - tau[r].item()) < 1e-10 * scale


@given(cases(60))
@settings(max_examples=25, deadline=None)
def test_pool_indices_and_their_gates(case):
    u, kw = case
    pools = pool_indices(u[None, :, None], **kw)[0, 0]
    tau = exact_tau(select(u[None, :, None], **kw))[0, 0]
    for r, refresh in enumerate(brute_force(u.tolist(), **kw)):
        members = pools[r][pools[r] >= 0]
        assert members.tolist() == refresh.pool
        if len(members):
            expected = (u[members].double() - tau[r]).clamp(0, 1)
            # The operator sums raw scores in float64: at 1e6 a unit in the last place is 1e-10.
            atol = 1e-9 + 16 * torch.finfo(torch.float64).eps * u.abs().max().item()
            torch.testing.assert_close(sparsek(u[members].double(), kw["topk"]), expected, atol=atol, rtol=0)


@given(cases(90), st.lists(st.integers(0, 90), max_size=4))
@settings(max_examples=60, deadline=None)
def test_chunks_are_bitwise_the_whole(case, cuts):
    u, kw = case
    n, stride = len(u), kw["stride"]
    scores = torch.stack([u, -u])[:, :, None]
    whole = select(scores, return_state=True, **kw)
    bounds = sorted({0, n, *(c for c in cuts if c < n)})
    state = None
    for first, last in pairwise(bounds):
        part = select(scores[:, first:last], state=state, return_state=True, **kw)
        slots = slice(first // stride, first // stride + part.threshold.shape[-1])
        for name in ("threshold", "threshold_low", "fraction_size"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[..., slots]), name
        base = part.evict.shape[-1] - (last - first)
        expected = whole.evict[..., first:last].clamp(max=last) - first
        assert torch.equal(part.evict[..., base:], expected)
        if state is not None:  # carried keys: the same queries, under their new index
            recent = kw["window"] + stride - 1
            offered = max(0, (first - 1) // stride * stride - kw["window"] + 1)
            for row in range(2):
                pool_part = state.pool_index[row, 0].tolist()
                recent_part = [p if p >= offered else -1 for p in range(first - recent, first)]
                for j, position in enumerate(pool_part + recent_part):
                    end = whole.evict[row, 0, position].item() if position >= 0 else 0
                    assert part.evict[row, 0, j] == max(0, min(end, last) - first)
        state = part.state
    for name in STATE_FIELDS:
        assert torch.equal(getattr(state, name), getattr(whole.state, name)), name
    assert state.length == n


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_state_does_not_grow(backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    kw = {"topk": 4, "window": 8, "stride": 4, "pool": 10}
    sizes = set()
    for n in (3, 50, 400):
        state = select(torch.randn(1, n, 1, device=device), return_state=True, backend=backend, **kw).state
        tensors = [getattr(state, name) for name in STATE_FIELDS]
        sizes.add(tuple(tuple(x.shape) for x in tensors))
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors), "no view of what the call computed"
    assert len(sizes) == 1


@pytest.mark.parametrize("lengths", [[5], [0, 17, 1, 0, 40, 0], [1] * 9, [64, 128, 3]])
@pytest.mark.parametrize("stride", [1, 5, 64])
def test_packed_equals_each_sequence_alone(lengths, stride):
    kw = {"topk": 3, "window": 6, "stride": stride, "pool": 8}
    total, slack = sum(lengths), 7
    torch.manual_seed(len(lengths))
    scores = torch.randn(1, total + slack, 2)
    scores[:, total:] = float("nan")
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    packed = select(scores, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **kw)
    tile = list_tile(stride)
    assert packed.threshold.shape[-1] == (total + slack) // stride + len(lengths)
    slot = first_list = 0
    for a, length in enumerate(lengths):
        if length == 0:
            continue
        begin = int(bounds[a])
        alone = select(scores[:, begin : begin + length], **kw)
        slots, lists = -(-length // stride), -(-length // tile)
        for name in ("threshold", "threshold_low", "fraction_size"):
            assert torch.equal(getattr(packed, name)[..., slot : slot + slots], getattr(alone, name))
        mine = packed.lists[:, :, first_list : first_list + lists]
        assert torch.equal(mine, torch.where(alone.lists >= 0, alone.lists + begin, -1))
        assert torch.equal(packed.evict[..., begin : begin + length], alone.evict + begin)
        assert torch.equal(packed.fraction_start[..., begin : begin + length], alone.fraction_start + slot)
        assert torch.equal(packed.fraction_end[..., begin : begin + length], alone.fraction_end + slot)
        slot, first_list = slot + slots, first_list + lists
    assert torch.all(packed.threshold[..., slot:] == float("inf"))
    assert torch.all(packed.lists[:, :, first_list:] == -1)
    assert torch.all(packed.evict[..., total:] == 0)


def test_hard_selection_has_open_gates():
    u = torch.randn(1, 200, 2)
    kw = {"topk": 8, "window": 16, "stride": 8}
    hard, soft = select(u, hard=True, **kw), select(u, **kw)
    assert torch.equal(hard.evict, soft.evict) and torch.equal(hard.lists, soft.lists)
    assert torch.all(hard.threshold == float("-inf"))
    assert torch.equal(hard.fraction_start, hard.fraction_end)
    assert torch.all(hard.fraction_size == 0)


def test_short_sequences_are_dense():
    n, kw = 24, {"topk": 8, "window": 16, "stride": 4}
    selection = select(torch.randn(1, n, 1), **kw)
    assert torch.all(selection.evict == n)
    assert torch.all(selection.threshold == float("-inf"))


def test_offset_keeps_the_gates():
    u = (torch.randn(1, 400, 1) * 64).round() / 64  # exact under the shift
    kw = {"topk": 8, "window": 16, "stride": 16, "pool": 64}
    near, far = select(u, **kw), select(u + 1e4, **kw)
    shift = exact_tau(far) - exact_tau(near)
    assert (shift[exact_tau(near) > float("-inf")] - 1e4).abs().max() < 1e-9
    assert torch.equal(near.evict, far.evict)
    # the float32 recipe for gates: (u - threshold) - threshold_low
    gates = ((u[0, :, 0] + 1e4)[None] - far.threshold[0, 0][:, None]) - far.threshold_low[0, 0][:, None]
    exact = u[0, :, 0][None].double() - exact_tau(near)[0, 0][:, None]
    finite = torch.isfinite(exact)
    near_zero = finite & (exact.abs() < 2)
    assert (gates[near_zero] - exact[near_zero]).abs().max() < 1e-6


def test_signed_zeros_tie_and_lower_index_wins():
    u = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, 0.0])[None, :, None]
    selection = select(u, topk=2, window=1, stride=1, pool=3)
    assert selection.lists[0, 0, 0].tolist() == [-1, -1]
    assert pool_indices(u, topk=2, window=1, stride=1, pool=3)[0, 0, 5].tolist() == [0, 1, 2]


def test_strided_scores():
    base = torch.randn(3, 90, 2)  # [hkv, s, b]
    kw = {"topk": 4, "window": 8, "stride": 8}
    strided = base.permute(2, 1, 0)
    a, b = select(strided, **kw), select(strided.contiguous(), **kw)
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name))


GOOD = {"topk": 4, "window": 8, "stride": 8, "pool": 12}


@pytest.mark.parametrize(
    ("scores", "changes", "message"),
    [
        (torch.randn(1, 9, 2).double(), {}, "scores must be a float32 tensor, got torch.float64"),
        (torch.randn(1, 0, 2), {}, "scores must hold at least one token"),
        (torch.randn(9, 2), {}, r"scores must be \[b, s, num_query_groups\], got shape \(9, 2\)"),
        (torch.randn(1, 9, 2), {"topk": 0}, "topk must be an int of at least 1, got 0"),
        (torch.randn(1, 9, 2), {"window": 0}, "window must be an int of at least 1, got 0"),
        (torch.randn(1, 9, 2), {"stride": 0}, "stride must be an int of at least 1, got 0"),
        (torch.randn(1, 9, 2), {"stride": 2.0}, "stride must be an int of at least 1, got 2.0"),
        (torch.randn(1, 9, 2), {"pool": 4}, r"pool must be greater than topk \(4\), got 4"),
        (torch.randn(1, 9, 2), {"pool": 3}, "pool must be at least topk = 4, got 3"),
        (torch.randn(1, 9, 2), {"pool": 1 << 15}, "pool must be at most 16384, got 32768"),
        (torch.randn(1, 9, 2), {"pool": None, "topk": 5000}, "pool is 4 \\* topk = 20000 by default .* pass a pool"),
        (torch.randn(1, 9, 2), {"hard": True}, r"pool must be None or topk \(4\) with hard=True, got 12"),
        (torch.randn(1, 9, 2), {"backend": "cuda"}, "backend must be"),
        (torch.tensor([[[0.0], [float("nan")]]]), {"check": True}, "scores must be finite, got nan"),
        (torch.tensor([[[0.0], [float("inf")]]]), {"check": True}, "scores must be finite, got inf"),
        (
            torch.randn(2, 9, 2),
            {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)},
            "scores must have batch 1",
        ),
        (torch.randn(1, 9, 2), {"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens must be int32"),
        (
            torch.randn(1, 9, 2),
            {"cu_seqlens": torch.tensor([1, 9], dtype=torch.int32)},
            "cu_seqlens must start at 0",
        ),
        (
            torch.randn(1, 9, 2),
            {"cu_seqlens": torch.tensor([0, 5, 4], dtype=torch.int32)},
            "cu_seqlens must start",
        ),
        (
            torch.randn(1, 9, 2),
            {"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)},
            "cu_seqlens must start at 0",
        ),
    ],
)
def test_refuses(scores, changes, message):
    with pytest.raises(ValueError, match=message):
        select(scores, **{**GOOD, **changes})


def test_refuses_a_state_of_other_settings():
    state = select(torch.randn(1, 30, 2), return_state=True, **GOOD).state
    for name, changed in (("window", {"window": 9, "stride": 7}), ("topk", {"topk": 5})):  # tensors of the same sizes
        with pytest.raises(ValueError, match=f"{name} must be {GOOD[name]} as in the call that made the state"):
            select(torch.randn(1, 5, 2), state=state, **{**GOOD, **changed})
    unknown = dataclasses.replace(state, topk=None, window=None, stride=None)
    with pytest.raises(ValueError, match=r"state\.recent_scores must have shape"):
        select(torch.randn(1, 5, 2), state=unknown, **{**GOOD, "window": 9})
    with pytest.raises(ValueError, match="state must be a SelectionState, got int"):
        select(torch.randn(1, 5, 2), state=3, **GOOD)
    with pytest.raises(ValueError, match=r"state\.pool_scores must have shape"):
        select(torch.randn(1, 5, 2), state=state, **{**GOOD, "pool": 13})
    with pytest.raises(NotImplementedError, match="cu_seqlens cannot be combined with state"):
        cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
        select(torch.randn(1, 5, 2), state=state, cu_seqlens=cu_seqlens, **GOOD)
