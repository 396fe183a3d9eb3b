# SPDX-License-Identifier: Apache-2.0
"""Generation from the cache gives the outputs of one forward over the whole sequence, however it is cut."""

import attention_oracle
import pytest
import torch
from cached_generation import SMALL, decode, generate, largest_error, make_cache, make_inputs, part
from sparsek_kernels import sparsek_attention


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
