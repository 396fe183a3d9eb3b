# SPDX-License-Identifier: Apache-2.0
"""SentencePiece tokenizers whose text round-trips exactly, in the shape that mcore's datasets expect."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write

EOD_PIECE = "<|endoftext|>"
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space so; in the text it needs bytes instead
_LONGEST_LINE_BYTES = 16_384
_SEED = 1234


class SentencePieceTokenizer:
    """A SentencePiece model with the attributes of an mcore tokenizer (`vocab_size`, `eod`, `pad`, ...).

    For models made by `train_tokenizer`, `detokenize(tokenize(text)) == text` for every Unicode text.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        self.eos: int = self.eod
        self.pad: int = self._processor.pad_id()
        # Hashed into the names of mcore's index caches: the content counts, not the file's place.
        self.unique_identifiers = {"class": type(self).__name__, "sha256": self.sha256}
        # The space mark's own UTF-8 bytes; absent from a foreign model without byte fallback.
        marks = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = marks if all(self._processor.is_byte(i) for i in marks) else None

    @classmethod
    def load(cls, path: str | Path, flag: str = "--tokenizer-model") -> "SentencePieceTokenizer":
        """Read a model file; `flag` names its origin in the error.

        Raises:
            UserError: the file is missing, is not a SentencePiece model, or has no end-of-document token.
        """
        try:
            model = Path(path).read_bytes()
            if not model:  # SentencePiece takes it for no model given, and complains on stderr with each use
                raise RuntimeError
            tokenizer = cls(model)
        except OSError as err:
            raise UserError(
                f"{flag} {path}: {err.strerror}; train one with examples/prepare_data.py --train-tokenizer"
            ) from None
        except RuntimeError:
            raise UserError(
                f"{flag} {path}: not a SentencePiece model, or one cut short; give a .model file, or copy it again"
            ) from None
        if tokenizer.eod < 0:
            raise UserError(f"{flag} {path}: the model has no end-of-sequence token; train it with one")
        return tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`; no end-of-document token is added."""
        if self._mark_ids is None or _SPACE_MARK not in text:
            return self._processor.encode(text)
        first, *others = text.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids
            ids += self._processor.encode(part)
        return ids

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of token ids; ids past the vocabulary (padding of the embedding) and end-of-document give nothing."""
        known = [int(i) for i in ids if int(i) < self.vocab_size and int(i) not in (self.eod, self.pad)]
        return self._processor.decode(known)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, path: Path, threads: int = 1) -> SentencePieceTokenizer:
    """Train byte-pair encoding with byte fallback and write the model to `path`, complete or not at all.

    Identity normalisation, no dummy prefix, whitespace kept: what round-trips exactly. A newline is one
    token of its own; the first ids are <unk> 0, <|endoftext|> 1, <pad> 2.

    Raises:
        UserError: there is no text, or `vocab_size` is more than the corpus supports (or too small); and what `texts`
            itself raises.
    """
    smallest = 256 + 4  # every byte, the three control tokens, newline
    if vocab_size <= smallest:
        raise UserError(f"--vocab-size {vocab_size}: too small, bytes and control tokens alone take {smallest}")
    lines = _Lines(texts)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            eos_piece=EOD_PIECE,
            pad_id=2,
            character_coverage=0.9995,
            max_sentence_length=_LONGEST_LINE_BYTES,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as err:
        if lines.error is not None:
            raise lines.error from None
        if lines.count == 0:
            raise UserError("--input: the corpus holds no text to train a tokenizer on") from None
        raise UserError(_explain_training_failure(vocab_size, str(err))) from None
    with atomic_write(path, "wb") as stream:
        stream.write(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())


class _Lines:
    """Lines of the texts, how many there were, and what ended them: SentencePiece passes it on as its own error."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.count = 0
        self.error: UserError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    if line and "\0" not in line:
                        self.count += 1
                        yield line
        except UserError as err:
            self.error = err
            raise


def _explain_training_failure(vocab_size: int, message: str) -> str:
    largest = re.search(r"too high.*<= (\d+)", message)
    if largest:
        return (
            f"--vocab-size {vocab_size}: larger than the corpus can support; "
            f"use at most {largest.group(1)} or give more text"
        )
    smallest = re.search(r"too small.*>= (\d+)", message)
    if smallest:
        return f"--vocab-size {vocab_size}: too small for this corpus's characters; use at least {smallest.group(1)}"
    return f"--vocab-size {vocab_size}: SentencePiece refused: {' '.join(message.split())}; choose another size"
