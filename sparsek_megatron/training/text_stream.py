# SPDX-License-Identifier: Apache-2.0
"""Text of tokens that arrive one by one."""

from collections.abc import Callable, Sequence

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer


class TextStream:
    """Text of one growing token sequence, handed on as soon as its characters are complete."""

    def __init__(
        self, tokenizer: SentencePieceTokenizer, prompt: Sequence[int], write: Callable[[str], None]
    ):
        self._tokenizer, self._write = tokenizer, write
        self._known, self._new = list(prompt[-4:]), []

    def add(self, token: int) -> None:
        """Take one more token."""
        self._new.append(token)
        text = self._pending()
        if not text.endswith("\ufffd"):  # else a character's bytes are still to come
            self._flush(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._flush(self._pending())

    def _pending(self) -> str:
        """What the new tokens add; some tokenizers spell a token differently at the start of a text."""
        before = self._tokenizer.detokenize(self._known)
        return self._tokenizer.detokenize(self._known + self._new)[len(before) :]

    def _flush(self, text: str) -> None:
        if text:
            self._write(text)
            self._known, self._new = (self._known + self._new)[-4:], []
