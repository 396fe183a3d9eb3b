# SPDX-License-Identifier: Apache-2.0
"""The selection kernels: bitwise equal to the torch path, in Triton's interpreter here and compiled on a GPU."""

import weakref

import pytest
import torch
from sparsek_kernels import select
from sparsek_kernels.selection import call, score_gradient
from sparsek_kernels.selection.plan import Plan
from test_selection import FIELDS, STATE_FIELDS, make_scores

TINY = Plan(
    block=16,
    group=2,
    chunk=8,
    slots=5,
    lanes=8,
    interval_block=64,
    sort_warps=1,
    scan_warps=1,
    merge_warps=1,
    walk_warps=1,
    walk_registers=64,
    interval_warps=1,
)


@pytest.fixture
def tiny(monkeypatch):
    """Many blocks and groups at sizes that the interpreter can run."""
    call.remembered_call.cache_clear()
    monkeypatch.setattr(call, "make_plan", lambda *args: TINY)
    yield
    call.remembered_call.cache_clear()


def assert_same(scores, *, device="cpu", **kw):
    """Both backends on the same arguments; returns the kernels' selection."""
    expected = select(scores, backend="torch", **kw)
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in kw.items()
    }
    actual = select(scores.to(device), backend="triton", **moved)
    if device == "cuda":  # a repeated call launches what the first one compiled
        actual = select(scores.to(device), backend="triton", **moved)
    for name in FIELDS:
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    if expected.state is not None:
        for name in STATE_FIELDS:
            assert torch.equal(getattr(actual.state, name).cpu(), getattr(expected.state, name)), name
    return expected


INTERPRETED = {
    "several groups": ("normal", 100, 1.0, {"topk": 5, "window": 8, "stride": 8, "pool": 16}),
    "per token": ("normal", 45, 1.0, {"topk": 5, "window": 4, "stride": 1, "pool": 9}),
    "ties": ("grid", 90, 2.0, {"topk": 5, "window": 8, "stride": 7, "pool": 20}),
    "all equal": ("constant", 90, 1.0, {"topk": 5, "window": 8, "stride": 64, "pool": 20}),
    "rising": ("rising", 90, 3.0, {"topk": 3, "window": 8, "stride": 9, "pool": 20}),
    "falling": ("falling", 90, 3.0, {"topk": 3, "window": 8, "stride": 9, "pool": 20}),
    "wide gaps": ("normal", 90, 1e6, {"topk": 5, "window": 8, "stride": 9, "pool": 20}),
    "tiny": ("normal", 90, 1e-6, {"topk": 5, "window": 8, "stride": 9, "pool": 20}),
    "support fills the pool": ("narrow", 100, 0.5, {"topk": 4, "window": 8, "stride": 12, "pool": 16}),
    "window beyond n": ("normal", 30, 1.0, {"topk": 4, "window": 300, "stride": 8, "pool": 9}),
    "one token": ("normal", 1, 1.0, {"topk": 1, "window": 1, "stride": 1, "pool": 2}),
    "hard": ("normal", 90, 1.0, {"topk": 5, "window": 8, "stride": 9, "hard": True}),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name, tiny):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, n, scale, kw = INTERPRETED[name]
    assert_same(make_scores(kind, n, 0, scale)[None, :, None], return_state=True, device=device, **kw)


@pytest.mark.parametrize("lengths", [[0, 40, 1, 55], [1, 1, 1, 60]])
def test_interpreted_packed(lengths, tiny):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = make_scores("normal", sum(lengths) + 9, 0)[None, :, None]
    scores[:, sum(lengths) :] = float("nan")
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    assert_same(scores, device=device, topk=3, window=5, stride=7, pool=9, cu_seqlens=cu_seqlens)


def test_interpreted_chunks(tiny):
    if torch.cuda.is_available():
        pytest.skip("the compiled kernels are tested on larger chunks")
    scores = make_scores("normal", 90, 0)[None, :, None]
    state = None
    for first, last in ((0, 33), (33, 34), (34, 90)):
        part = scores[:, first:last]
        state = assert_same(part, topk=5, window=8, stride=7, pool=20, state=state, return_state=True).state


def test_compiles_without_graph_breaks(tiny):
    kw = {"topk": 3, "window": 5, "stride": 7, "pool": 9, "backend": "triton"}

    def thresholds(x):
        selection = select(x, **kw)
        return selection.threshold + selection.threshold_low, selection.evict * 2

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = make_scores("normal", 40, 0)[None, :, None].to(device)
    actual = torch.compile(thresholds, backend="aot_eager", fullgraph=True)(scores)
    for a, b in zip(actual, thresholds(scores), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("topk", [512, 2048])
@pytest.mark.parametrize("stride", [1, 64])
@pytest.mark.parametrize("n", [8_192, 40_000])
def test_memory_is_bounded(n, stride, topk, monkeypatch):
    """At most 64 + 4 topk / 64 bytes per token and row, transient and kept together: buffers alive, no kernel run."""
    buffers, peak, empty = [], 0, torch.empty

    def count(*args, **kwargs):
        nonlocal peak
        tensor = empty(*args, **kwargs)
        storage = tensor.untyped_storage()
        buffers.append((weakref.ref(storage), storage.nbytes()))
        peak = max(peak, sum(size for alive, size in buffers if alive() is not None))
        return tensor

    monkeypatch.setattr(call.Launch, "__call__", lambda *_: None)
    monkeypatch.setattr(torch, "empty", count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    select(torch.zeros(1, n, 8, device=device), topk=topk, window=512, stride=stride, backend="triton")
    assert 40 < peak / (8 * n) <= 64 + 4 * topk / 64


def gpu_scores(kind: str, n: int, heads: int, scale: float = 1.0) -> torch.Tensor:
    return torch.stack([make_scores(kind, n, seed, scale) for seed in range(heads)], -1)[None]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "grid", "constant", "rising", "falling", "drifting", "narrow"])
@pytest.mark.parametrize("stride", [16, 64])
def test_gpu_shapes_of_scores(kind, stride):
    assert_same(
        gpu_scores(kind, 20_011, 2), device="cuda", topk=512, window=512, stride=stride, return_state=True
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "kw"),
    [
        (3_001, {"topk": 16, "window": 50, "stride": 1, "pool": 64}),
        (5_003, {"topk": 37, "window": 100, "stride": 7, "pool": 150}),
        (9_000, {"topk": 64, "window": 64, "stride": 64, "pool": 256}),
        (30_000, {"topk": 4096, "window": 1024, "stride": 128, "pool": 8192}),
        (30_000, {"topk": 2048, "window": 3000, "stride": 640, "pool": 16_384}),
        (1, {"topk": 1, "window": 1, "stride": 1}),
        (9_000, {"topk": 64, "window": 64, "stride": 64, "hard": True}),
    ],
)
def test_gpu_sizes(n, kw):
    assert_same(gpu_scores("normal", n, 2), device="cuda", return_state=True, **kw)


@pytest.mark.gpu
def test_gpu_many_rows_and_strided_scores():
    scores = torch.randn(4, 700, 600).permute(0, 2, 1)[:, :, :600]  # 2,400 rows, strided
    assert_same(scores, device="cuda", topk=16, window=32, stride=16, pool=64)


@pytest.mark.gpu
def test_gpu_packed():
    lengths = [1, 0, 5_000, 70, 0, 9_001, 1, 2_000]
    scores = torch.randn(1, sum(lengths) + 100, 2)
    scores[:, sum(lengths) :] = float("nan")
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    for stride in (16, 64):
        assert_same(
            scores, device="cuda", topk=64, window=100, stride=stride, pool=256, cu_seqlens=cu_seqlens
        )


@pytest.mark.gpu
def test_gpu_chunks_are_bitwise_the_whole():
    scores = torch.randn(2, 20_000, 2, device="cuda")
    kw = {"topk": 128, "window": 300, "stride": 64, "return_state": True}
    whole = select(scores, **kw)
    state = None
    for first, last in ((0, 1), (1, 7_001), (7_001, 7_002), (7_002, 20_000)):
        part = select(scores[:, first:last], state=state, **kw)
        slots = slice(first // 64, first // 64 + part.threshold.shape[-1])
        for name in ("threshold", "threshold_low", "fraction_size"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[..., slots])
        state = part.state
    for name in STATE_FIELDS:
        assert torch.equal(getattr(state, name), getattr(whole.state, name))


@pytest.mark.gpu
def test_gpu_graph_capture_and_determinism():
    scores = torch.randn(1, 30_000, 4, device="cuda")
    kw = {"topk": 256, "window": 256}
    select(scores, **kw)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails on any synchronisation
        captured = select(scores, **kw)
    scores.copy_(torch.randn_like(scores))
    graph.replay()
    again = select(scores, **kw)
    for name in FIELDS:
        assert torch.equal(getattr(captured, name), getattr(again, name))


@pytest.mark.gpu
def test_gpu_score_gradient():
    scores = torch.randn(1, 20_011, 4, device="cuda")
    for kw in ({"topk": 256, "window": 256}, {"topk": 64, "window": 64, "stride": 1}):
        selection = select(scores, **kw)
        key_sum, query_sum = torch.randn(2, 1, 4, 20_011, device="cuda")
        a = score_gradient(selection, key_sum, query_sum)
        b = score_gradient(selection, key_sum, query_sum, backend="torch")
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert torch.equal(a, score_gradient(selection, key_sum, query_sum))


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [512, 2048])
@pytest.mark.parametrize("stride", [1, 64])
@pytest.mark.parametrize("n", [8_192, 40_000])
def test_gpu_memory_is_bounded(n, stride, topk):
    """At most 64 + 4 topk / 64 bytes per token and row, transient and kept together."""
    scores = torch.randn(1, n, 8, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        select(scores, topk=topk, window=512, stride=stride)
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()  # what was asked for: blocks of the allocator depend on what ran before
    extra = stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]
    assert extra / scores.numel() <= 64 + 4 * topk / 64


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_million_tokens():
    assert_same(gpu_scores("normal", 1 << 20, 1), device="cuda", topk=512, window=512, stride=4096)
