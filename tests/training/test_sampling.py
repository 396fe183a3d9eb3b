# SPDX-License-Identifier: Apache-2.0
"""From logits to text: tokens drawn as asked, alone and in a batch, and handed on in whole characters."""

import pytest
import torch

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.sampling import Sampling, draw, probabilities
from sparsek_megatron.training.text_stream import TextStream


def test_drawing_follows_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 1.0]]).expand(2000, -1)
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_k=3),
        Sampling(temperature=2.0, top_p=0.6),
        Sampling(temperature=1.0, top_k=4, top_p=0.9),
    ):
        p = torch.softmax(logits[0].double() / sampling.temperature, -1)
        order = sorted(range(5), key=lambda i: (-p[i].item(), i))[: sampling.top_k or 5]
        mass, kept = 0.0, []
        for token in order:
            if mass < sampling.top_p * sum(p[i].item() for i in order):
                kept.append(token)
            mass += p[token].item()
        expected = torch.zeros(5, dtype=torch.float64).index_put_(
            (torch.tensor(kept),), p[kept] / p[kept].sum()
        )
        weights, tokens = probabilities(logits[:1], sampling)
        assert torch.allclose(
            torch.zeros(5, dtype=torch.float64).scatter_(0, tokens[0], weights[0]), expected
        )
        drawn = draw(logits, sampling, sampling.generators(2000))
        seen = torch.bincount(drawn, minlength=5).double() / 2000
        assert (seen - expected).abs().max() < 0.05 and (seen[expected == 0] == 0).all()
    assert draw(logits[:1], Sampling(), []).item() == 0


def test_a_row_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = draw(logits, Sampling(temperature=1.0, seed=7), Sampling(seed=7).generators(3))
    for row in range(3):
        alone = draw(logits[row : row + 1], Sampling(temperature=1.0), Sampling(seed=7 + row).generators(1))
        assert alone.item() == together[row].item()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"seed": -1},
        {"seed": 2**63},
    ],
)  # fmt: skip
def test_sampling_out_of_range_is_named(bad):
    name = next(iter(bad)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name} .*: must be"):
        Sampling(**bad)


def test_text_is_handed_on_in_whole_characters(prepared):
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    text = "naïve 日本 = 🙂\n"  # bytes: none of these are in the vocabulary
    ids, pieces = tokenizer.tokenize(text), []
    stream = TextStream(tokenizer, tokenizer.tokenize("def f"), pieces.append)
    for token in ids:
        stream.add(token)
    stream.end()
    assert "".join(pieces) == text and len(pieces) > 4 and not any("\ufffd" in piece for piece in pieces)
