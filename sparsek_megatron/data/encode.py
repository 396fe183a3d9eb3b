# SPDX-License-Identifier: Apache-2.0
"""Tokenize documents in parallel into Megatron's `IndexedDataset` files (`.bin`, `.idx`) and a `.json` beside them."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from sparsek_megatron.data.card import DatasetCard, unigram_entropy
from sparsek_megatron.data.corpus import Document
from sparsek_megatron.data.ordered import WorkerKilled, ordered_map
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write, fsync_path, publish, temporary_sibling

SUFFIXES = (".bin", ".json", ".idx")  # the order of publishing: a dataset exists once its index does


def existing_files(prefix: str) -> list[str]:
    """Which files of the dataset at `prefix` exist."""
    return [prefix + suffix for suffix in SUFFIXES if os.path.exists(prefix + suffix)]


class DatasetWriter:
    """Writes one dataset aside and publishes all its files at the end; leaves nothing behind on failure."""

    def __init__(self, prefix: str, tokenizer: SentencePieceTokenizer):
        self.prefix = prefix
        self._tokenizer = tokenizer
        self._final = {suffix: Path(prefix + suffix) for suffix in SUFFIXES}
        self._partial = {suffix: temporary_sibling(path) for suffix, path in self._final.items()}
        self._builder = IndexedDatasetBuilder(
            str(self._partial[".bin"]), dtype=DType.optimal_dtype(tokenizer.vocab_size)
        )
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.documents = 0

    def add(self, ids: np.ndarray) -> None:
        """Append one document's token ids, end-of-document token included."""
        self._builder.add_document(ids, [len(ids)])  # pyright: ignore[reportArgumentType]
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self.documents += 1

    def finish(self) -> DatasetCard:
        """Make the files durable and give them their names. Cut short, it leaves no index, and so no dataset."""
        self._builder.finalize(str(self._partial[".idx"]))
        card = DatasetCard(
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            documents=self.documents,
            tokens=int(self._counts.sum()),
            unigram_entropy=unigram_entropy(self._counts),
        )
        with atomic_write(self._partial[".json"]) as stream:
            json.dump(asdict(card), stream, indent=1)
        for suffix in SUFFIXES:
            fsync_path(self._partial[suffix])
        self._final[".idx"].unlink(missing_ok=True)  # one that is replaced: it must not be found beside the new .bin
        fsync_path(self._final[".idx"].parent)
        for suffix in SUFFIXES:
            publish(self._partial[suffix], self._final[suffix])
        return card

    def discard(self) -> None:
        """Remove whatever was written aside."""
        self._builder.data_file.close()
        for partial in self._partial.values():
            partial.unlink(missing_ok=True)


def encode_documents(
    documents: Iterable[Document], model: bytes, *, workers: int, total_bytes: int, label: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Token ids of each document followed by end-of-document, in the order given, on `workers` processes.

    Args:
        model: the SentencePiece model's bytes.
        total_bytes: size of the corpus, for the progress bar alone.

    Raises:
        UserError: a process was killed; and what `documents` itself raises.
    """

    def start() -> Callable[[Document], tuple[str, np.ndarray, int]]:
        tokenizer = SentencePieceTokenizer(model)

        def encode(document: Document) -> tuple[str, np.ndarray, int]:
            ids = [*tokenizer.tokenize(document.text), tokenizer.eod]
            return document.name, np.asarray(ids, dtype=np.int64), len(document.text)

        return encode

    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        try:
            for name, ids, size in ordered_map(start, documents, processes=workers):
                bar.update(size)
                yield name, ids
        except WorkerKilled as err:
            raise UserError(
                f"--workers {workers}: a tokenizing process was killed ({err}), as happens where memory runs out; "
                "give fewer --workers, or more memory"
            ) from None
        bar.update(max(0, total_bytes - bar.n))
