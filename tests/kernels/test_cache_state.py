# SPDX-License-Identifier: Apache-2.0
"""What a cache holds: lengths, memory that never grows, rows that are saved, forked and reset, and what it refuses."""

import pytest
import torch
from cached_generation import SMALL, decode, generate, largest_error, make_cache, make_inputs, part
from sparsek_kernels import SparseKCache, sparsek_attention


def test_lengths_are_known_without_the_device_until_a_step_is_captured(monkeypatch):
    inputs = make_inputs(60)
    cache = make_cache(inputs, **SMALL)
    cache.prefill(*part(inputs, 0, 20), lengths=[20, 7])
    decode(cache, inputs, 20, 23)
    row, copy = cache.rows(1, 2), cache.fork([1])
    row.prefill(*(x[1:, :5] for x in inputs))
    assert cache.lengths_on_host() == [23, 15] and copy.lengths_on_host() == [10]
    monkeypatch.setattr(SparseKCache, "_capturing", lambda self: True)
    row.decode(*(x[1:, :1] for x in inputs))
    with pytest.raises(NotImplementedError, match="prefill cannot be captured in a CUDA graph"):
        row.prefill(*(x[1:, :1] for x in inputs))
    monkeypatch.undo()
    row._buffers.length.add_(2)  # two replays
    assert cache.lengths_on_host() == [23, 18]
    cache.reset()
    row._buffers.length.add_(1)
    assert cache.lengths_on_host() == [0, 1] and copy.lengths_on_host() == [10]


def test_scores_that_are_not_finite_spoil_their_own_row_until_it_is_reset():
    inputs = make_inputs(120)
    expected, _ = generate(inputs, 40, **SMALL)
    spoiled = [x.clone() for x in inputs]
    spoiled[3][1, 30:70] = float("nan")
    actual, cache = generate(spoiled, 40, **SMALL)
    assert torch.equal(actual[0], expected[0])
    row = cache.rows(1, 2)
    row.reset()
    again = torch.cat(
        [row.prefill(*(x[1:, :40] for x in inputs)), decode(row, [x[1:] for x in inputs], 40, 120)], 1
    )
    assert torch.equal(again, expected[1:])


def test_memory_is_allocated_once_and_does_not_depend_on_the_length():
    inputs = make_inputs(200)
    cache = make_cache(inputs, **SMALL)
    size, places = cache.nbytes, [x.data_ptr() for x in cache._buffers.tensors().values()]
    cache.prefill(*part(inputs, 0, 150))
    decode(cache, inputs, 150, 200)
    assert cache.nbytes == size
    assert [x.data_ptr() for x in cache._buffers.tensors().values()] == places
    rows = 4 + 6 + 8  # topk, window, stride
    per_head = (
        rows * (2 * 64 * 4 + 4) + 4 * 16 + 4 * 4 + 8 + 4
    )  # keys, values, scores; pool; places; tau; length
    assert size == 2 * 2 * per_head


def test_saved_and_loaded_midway(tmp_path):
    inputs = make_inputs(120)
    whole, _ = generate(inputs, 40, **SMALL)
    cache = make_cache(inputs, **SMALL)
    cache.prefill(*part(inputs, 0, 40))
    decode(cache, inputs, 40, 71)
    cache.save(tmp_path / "cache.pt")
    loaded = SparseKCache.load(tmp_path / "cache.pt")
    assert loaded.settings == cache.settings
    assert torch.equal(decode(loaded, inputs, 71, 120), whole[:, 71:])
    assert [path.name for path in tmp_path.iterdir()] == ["cache.pt"]
    cache.rows(1, 2).save(tmp_path / "row.pt")
    assert torch.equal(SparseKCache.load(tmp_path / "row.pt").lengths, cache.lengths[1:])
    assert (tmp_path / "row.pt").stat().st_size < 0.7 * (tmp_path / "cache.pt").stat().st_size


def test_what_is_not_a_saved_cache_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"other\.pt is not a saved SparseKCache"):
        SparseKCache.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"other\.pt is not a saved SparseKCache"):
        SparseKCache.load(path)


def test_forks_go_their_own_ways():
    inputs, other = make_inputs(100), make_inputs(100, seed=1)
    cache = make_cache(inputs, **SMALL)
    cache.prefill(*part(inputs, 0, 50))
    fork = cache.fork([1, 0, 1])
    tail = [x[[0, 1, 1], 50:] for x in other]
    ours, theirs = (
        decode(cache, inputs, 50, 100),
        torch.cat([fork.decode(*(x[:, i : i + 1] for x in tail)) for i in range(50)], dim=1),
    )
    assert torch.equal(ours, generate(inputs, 50, **SMALL)[0][:, 50:])
    for row, (source, continuation) in enumerate(((1, 0), (0, 1), (1, 1))):
        joined = [
            torch.cat([x[source, :50], y[continuation, 50:]])[None]
            for x, y in zip(inputs, other, strict=True)
        ]
        assert largest_error(theirs[row], sparsek_attention(*joined, **SMALL)[0, 50:]) < 1e-5


def test_reset_rows_start_over():
    inputs = make_inputs(60)
    cache = make_cache(inputs, **SMALL)
    first = cache.prefill(*part(inputs, 0, 60))
    cache.rows(1, 2).reset()
    assert cache.lengths.tolist() == [60, 0]
    again = cache.rows(1, 2).prefill(*(x[1:] for x in inputs))
    assert torch.equal(again, first[1:])
    cache.reset()
    assert torch.equal(cache.prefill(*inputs), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk must be an int of at least 1, got 0"),
        ({"pool": 3}, "pool must be at least topk = 4, got 3"),
        ({"gate": "both"}, "gate must be one of key_value, value, logit, got 'both'"),
        ({"dtype": torch.float64}, "dtype must be one of bfloat16, float16, float32, got torch.float64"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SparseKCache(1, 2, 64, **{**SMALL, **change})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda q, k, v, u: (q[:1], k[:1], v[:1], u[:1]),
            r"query has shape \(1, 1, 4, 64\); this cache takes \[2, s",
        ),
        (
            lambda q, k, v, u: (q, k[:, :, :1], v, u),
            r"key has shape \(2, 1, 1, 64\); this cache takes \(2, 1, 2, 64\)",
        ),
        (
            lambda q, k, v, u: (q.bfloat16(), k, v, u),
            "query has dtype torch.bfloat16; this cache takes torch.float32",
        ),
        (
            lambda q, k, v, u: (q, k, v, u.double()),
            "scores has dtype torch.float64; this cache takes torch.float32",
        ),
        (lambda q, k, v, u: (q, k, v.to("meta"), u), "value is on meta; this cache is on cpu"),
        (lambda q, k, v, u: (q[:, :, :3], k, v, u), "query has 3 heads, not a multiple of the cache's 2"),
        (lambda q, k, v, u: (q[:, :0], k[:, :0], v[:, :0], u[:, :0]), "query has no tokens"),
        (
            lambda *x: [y.repeat_interleave(2, 1) for y in x],
            "decode takes one token per row, got 2: use prefill",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(break_it, message):
    inputs = make_inputs(50)
    cache = make_cache(inputs, **SMALL)
    cache.prefill(*part(inputs, 0, 40))
    before = cache.fork()
    with pytest.raises(ValueError, match=message):
        cache.decode(*break_it(*part(inputs, 40, 41)))
    with pytest.raises(ValueError, match=r"lengths must hold 2 numbers between 0 and the 3 tokens given"):
        cache.prefill(*part(inputs, 40, 43), lengths=[1, 4])
    for name, tensor in before._buffers.tensors().items():
        assert torch.equal(tensor, getattr(cache._buffers, name)), name
