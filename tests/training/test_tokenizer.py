# SPDX-License-Identifier: Apache-2.0
"""Text round-trips exactly through a trained tokenizer, whatever it is made of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from sparsek_megatron.errors import UserError

CODE = "def f(x):\n    if x:\n\treturn  [x,  1]\n\n\n        # naïve café ▁ ▁▁x\r\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    trained = train_tokenizer([CODE, "the quick brown fox jumps over the lazy dog\n" * 20], vocab_size=340, path=path)
    assert SentencePieceTokenizer.load(path).sha256 == trained.sha256
    return trained


def whole_text(tokenizer: SentencePieceTokenizer, text: str) -> str:
    return tokenizer.detokenize(tokenizer.tokenize(text))


@settings(max_examples=400, deadline=None)
@given(st.text())
def test_any_unicode_text_round_trips(tokenizer, text):
    assert whole_text(tokenizer, text) == text


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=" \t\n\r\f\v\0\N{NO-BREAK SPACE}\N{LOWER ONE EIGHTH BLOCK}\N{BOM}ax<0>_"))
def test_whitespace_and_the_tokenizers_own_marks_round_trip(tokenizer, text):
    assert whole_text(tokenizer, text) == text


@pytest.mark.parametrize("text", [CODE, "<unk>", "<pad>", "<|endoftext|>", "<0x0A>", "", " ", "\n", "  \n\t"])
def test_code_and_names_of_control_tokens_are_plain_text(tokenizer, text):
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert not {tokenizer.eod, tokenizer.pad, 0} & set(ids)


def test_control_and_padding_ids_give_no_text(tokenizer):
    ids = tokenizer.tokenize("x = 1")
    padded = [*ids, tokenizer.eod, tokenizer.pad, tokenizer.vocab_size + 3]
    assert tokenizer.detokenize(padded) == "x = 1"


def test_training_is_reproducible(tmp_path):
    models = [train_tokenizer([CODE], vocab_size=300, path=tmp_path / name).sha256 for name in ("a", "b")]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("texts", "size", "said"),
    [
        ([CODE], 50_000, "larger than the corpus can support; use at most"),
        ([CODE], 100, "too small"),
        ([""], 400, "no text"),
        ([], 400, "no text"),
    ],
)
def test_impossible_vocabularies_are_refused(tmp_path, texts, size, said):
    with pytest.raises(UserError, match=said):
        train_tokenizer(texts, vocab_size=size, path=tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_refused(tmp_path, capfd):
    path = tmp_path / "t.model"
    path.write_text("not a model")
    with pytest.raises(UserError, match=r"t\.model: not a SentencePiece model"):
        SentencePieceTokenizer.load(path)
    path.write_bytes(b"")
    capfd.readouterr()
    with pytest.raises(UserError, match=r"t\.model: not a SentencePiece model, or one cut short"):
        SentencePieceTokenizer.load(path)
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="No such file"):
        SentencePieceTokenizer.load(tmp_path / "absent.model")
