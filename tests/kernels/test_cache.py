# SPDX-License-Identifier: Apache-2.0
"""Generation from the cache gives the outputs of one forward over the whole sequence, and the cache never grows."""

import attention_oracle
import pytest
import torch
from sparsek_kernels import SparseKCache, sparsek_attention

SMALL = {"topk": 4, "window": 6, "stride": 8}


def make_inputs(n, hq=4, hkv=2, d=64, batch=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, h, d, generator=g).to(dtype) for h in (hq, hkv, hkv))
    return q, k, v, torch.randn(batch, n, hkv, generator=g)


def make_cache(inputs, backend="torch", **options):
    q, k, _, _ = inputs
    return SparseKCache(
        q.shape[0], k.shape[2], q.shape[3], dtype=q.dtype, device=q.device, backend=backend, **options
    )


def part(inputs, start, stop):
    return [x[:, start:stop] for x in inputs]


def decode(cache, inputs, start, stop):
    return torch.cat([cache.decode(*part(inputs, i, i + 1)) for i in range(start, stop)], dim=1)


def generate(inputs, cut, backend="torch", **options):
    """Outputs of `cut` tokens in one prefill and the rest one at a time."""
    cache = make_cache(inputs, backend, **options)
    first = [cache.prefill(*part(inputs, 0, cut))] if cut else []
    return torch.cat([*first, decode(cache, inputs, cut, inputs[0].shape[1])], dim=1), cache


def largest_error(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("gate", ["key_value", "value", "logit"])
@pytest.mark.parametrize(("stride", "n", "cut"), [(1, 60, 20), (16, 90, 33), (64, 210, 70), (100, 230, 0)])
def test_generation_equals_the_definition_at_every_position(gate, stride, n, cut):
    inputs = make_inputs(n, hq=2, hkv=1, d=8)
    options = {"topk": 4, "window": 6, "stride": stride, "pool": 12, "gate": gate}
    actual, _ = generate(inputs, cut, **options)
    expected = attention_oracle.attention(*(x.double() for x in inputs), **options)
    assert largest_error(actual, expected) < 1e-5


@pytest.mark.parametrize("shape", ["equal", "rising", "falling", "offset", "ties", "signed zeros"])
def test_scores_that_are_hard_to_order(shape):
    inputs = make_inputs(120)
    u = inputs[3]
    ramp = torch.arange(120.0)[None, :, None].expand_as(u)
    changed = {
        "equal": torch.zeros_like(u),
        "rising": ramp / 10,
        "falling": -ramp / 10,
        "offset": u + 1e4,
        "ties": u.round(),
        "signed zeros": torch.where(u > 0, 0.0, -0.0),
    }
    inputs = (*inputs[:3], changed[shape].contiguous())
    actual, _ = generate(inputs, 30, **SMALL)
    expected = sparsek_attention(*(x.double() for x in inputs), **SMALL)
    assert largest_error(actual, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = make_inputs(150, dtype=dtype)
    actual, _ = generate(inputs, 50, **SMALL)
    expected = sparsek_attention(*(x.double() for x in inputs), **SMALL)
    assert actual.dtype == dtype and largest_error(actual, expected) < 2e-2


def test_hard_selection():
    inputs = make_inputs(100)
    options = {**SMALL, "pool": 4}
    actual, _ = generate(inputs, 30, **options)
    assert largest_error(actual, sparsek_attention(*inputs, **options)) < 1e-5


def test_up_to_window_plus_topk_tokens_it_is_dense_attention():
    inputs = make_inputs(60)
    actual, _ = generate(inputs, 7, topk=30, window=30, stride=16)
    q, k, v = (x.double().transpose(1, 2) for x in inputs[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert largest_error(actual, dense.transpose(1, 2)) < 1e-5


def test_rows_of_different_lengths_refresh_on_their_own():
    lengths, new = [0, 17, 40, 17], 50
    inputs = make_inputs(90, batch=4)
    padded = [x.clone() for x in part(inputs, 0, 40)]
    for row, length in enumerate(lengths):
        for x in padded:
            x[row, length:] = float("nan")  # padding is never read
    cache = make_cache(inputs, **SMALL)
    first = cache.prefill(*padded, lengths=lengths)
    steps = [
        cache.decode(
            *(
                torch.stack([x[row, length + i] for row, length in enumerate(lengths)])[:, None]
                for x in inputs
            )
        )
        for i in range(new)
    ]
    after = torch.cat(steps, dim=1)
    assert cache.lengths.tolist() == [length + new for length in lengths]
    for row, length in enumerate(lengths):
        alone = [x[row : row + 1, : length + new].double() for x in inputs]
        expected = sparsek_attention(*alone, **SMALL)[0]
        assert largest_error(torch.cat([first[row, :length], after[row]]), expected) < 1e-5
        assert (first[row, length:] == 0).all()


def test_prefill_continues_after_decoding():
    inputs = make_inputs(150)
    expected = sparsek_attention(*(x.double() for x in inputs), **SMALL)
    for turns in ([33, 64, 70, 150], [8, 16, 24, 150], [1, 2, 100, 150]):
        cache = make_cache(inputs, **SMALL)
        outputs, start = [], 0
        for turn, stop in enumerate(turns):
            piece = (inputs, start, stop)
            outputs.append(decode(cache, *piece) if turn % 2 else cache.prefill(*part(*piece)))
            start = stop
        assert largest_error(torch.cat(outputs, dim=1), expected) < 1e-5


def test_a_long_prefill_runs_in_pieces(monkeypatch):
    inputs = make_inputs(130, batch=3)
    monkeypatch.setattr("sparsek_kernels.cache.cache.PREFILL_TOKENS", 60)
    cache = make_cache(inputs, **SMALL)
    first = cache.prefill(*part(inputs, 0, 90), lengths=[90, 41, 90])
    expected = sparsek_attention(*(x.double() for x in inputs), **SMALL)
    assert largest_error(first[[0, 2]], expected[[0, 2], :90]) < 1e-5
    assert largest_error(first[1, :41], expected[1, :41]) < 1e-5
    later = cache.rows(2, 3).prefill(*(x[2:, 90:] for x in inputs))
    assert largest_error(later, expected[2:, 90:]) < 1e-5
    cache.reset()
    short = cache.prefill(*part(inputs, 0, 90), lengths=[50] * 3)
    assert cache.lengths.tolist() == [50] * 3 and (short[:, 50:] == 0).all()
    assert largest_error(short[:, :50], expected[:, :50]) < 1e-5


@pytest.mark.parametrize(("stride", "topk"), [(8, 4), (1, 3), (100, 5)])
def test_a_prompt_may_be_fed_in_pieces_of_any_size(stride, topk):
    """Pieces far behind the first ones see a length that stands in for theirs."""
    options = {"topk": topk, "window": 6, "stride": stride}
    inputs = make_inputs(700, d=8, hq=2, hkv=1)
    expected = sparsek_attention(*(x.double() for x in inputs), **options)
    for sizes in ([64], [13, 90, 7], [200, 1]):
        cache, outputs, start = make_cache(inputs, **options), [], 0
        while start < 700:
            stop = min(start + sizes[len(outputs) % len(sizes)], 700)
            outputs.append(cache.prefill(*part(inputs, start, stop)))
            start = stop
        assert largest_error(torch.cat(outputs, dim=1), expected) < 1e-5
        assert cache.lengths_on_host() == cache.lengths.tolist() == [700, 700]


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


def test_the_triton_backend_does_not_run_on_what_it_cannot():
    with pytest.raises(NotImplementedError, match="head_dim is 24; the triton backend has"):
        SparseKCache(1, 2, 24, **SMALL, backend="triton")


# In Triton's interpreter: small, since it takes tens of milliseconds a step.


@pytest.mark.parametrize(
    ("options", "n", "cut"),
    [
        ({"topk": 4, "window": 6, "stride": 8}, 40, 12),
        ({"topk": 3, "window": 5, "stride": 1, "gate": "value"}, 24, 3),
        ({"topk": 4, "window": 1, "stride": 70, "pool": 9, "gate": "logit"}, 150, 130),
        ({"topk": 4, "window": 6, "stride": 4, "pool": 4}, 30, 10),
    ],
)
def test_triton_steps_give_the_bits_of_the_torch_backend(options, n, cut):
    inputs = make_inputs(n, hq=3, hkv=1, batch=2)
    scores = (4 * inputs[3]).round() / 4  # ties
    scores[1] *= 5  # gaps between 1 and 2 at the edge of the selection: no gate is fractional
    inputs = (*inputs[:3], scores)
    expected, reference = generate(inputs, cut, **options)
    actual, cache = generate(inputs, cut, backend="triton", **options)
    assert largest_error(actual, expected) < 1e-5
    same_bits(cache, reference)
    piece = part(inputs, 0, 13)  # on top of what both hold
    assert largest_error(cache.prefill(*piece), reference.prefill(*piece)) < 1e-5
    same_bits(cache, reference)
    for each in (cache, reference):  # a prompt that leaves places of the ring empty
        each.reset()
        each.prefill(*part(inputs, 0, 2))
    same_bits(cache, reference)


def same_bits(cache, reference):
    for name in ("pool", "threshold", "length", "score", "place", "key", "value"):
        assert torch.equal(getattr(cache._buffers, name), getattr(reference._buffers, name)), name


def test_pieces_of_the_cache_add_up(monkeypatch):
    from sparsek_kernels.cache import triton_backend

    inputs = make_inputs(40, hq=6, hkv=2)
    expected, cache = generate(inputs, 39, backend="triton", topk=40, window=30, stride=20)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 8)
    q = inputs[0][:, -1]
    tiling = triton_backend.DecodeTiling(block=16, num_warps=4, num_stages=2, programs_per_sm=2)
    split = triton_backend.attend_triton(cache._buffers, cache.settings, q, tiling)
    assert largest_error(split, expected[:, -1]) < 1e-5
