# SPDX-License-Identifier: Apache-2.0
"""Batches of every table: text, recall tasks, and generated sequences; the same for all arms of a (seed, step).

A batch is tokens [b, n + 1] int64 and weights [b, n]: the weight of predicting tokens[:, i + 1] at i (0 leaves it out).
For recall tasks `distance` [b, n] gives, where the weight is not 0, how many tokens ago the answer was shown.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import multiprocessing
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsek_megatron.data.corpus import (
    Document,
    Source,
    find_sources,
    is_validation,
    read_documents,
    stdlib_sources,
)
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write

VOCABULARY = 4096
VALIDATION_FRACTION = 0.05
EVALUATION_SEED = 1 << 40
EVALUATION_BATCH = 32_768  # tokens at a time


@dataclass(frozen=True)
class Batch:
    """Tokens and what counts; see the module's first lines."""

    tokens: Tensor
    weights: Tensor
    distance: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        return self.tokens[:, 1:]


def generator(*parts: int) -> torch.Generator:
    """A generator seeded by numbers, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Corpus:
    """What text is read.

    inputs     files, or folders of which files matching `include` are read; none means the Python standard library
    packages   installed Python packages whose sources (tests left out) are read besides
    tokenizer  a SentencePiece model; None trains one on the training files
    """

    inputs: tuple[str, ...] = ()
    include: str = "*"
    packages: tuple[str, ...] = ()
    tokenizer: Path | None = None

    def documents(self) -> list[Document]:
        """All documents, those of a package in the order of their paths."""
        sources = find_sources(self.inputs, include=self.include) if self.inputs else stdlib_sources()
        for package in self.packages:
            sources += package_sources(package)
        return list(read_documents(sources))


def package_sources(package: str) -> list[Source]:
    """The Python files of an installed package, without its tests."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--packages {package}: no package of that name is installed")
    root = Path(spec.submodule_search_locations[0])
    files = (path for path in sorted(root.rglob("*.py")) if path.stat().st_size > 0)
    named = [Source(path, f"{package}/{path.relative_to(root).as_posix()}") for path in files]
    return [source for source in named if not {"test", "tests"} & set(source.name.split("/"))]


_encoder: SentencePieceTokenizer | None = None


def _start_encoder(model: Path) -> None:
    global _encoder
    _encoder = SentencePieceTokenizer.load(model)


def _encode(text: str) -> np.ndarray:
    assert _encoder is not None
    return np.asarray([*_encoder.tokenize(text), _encoder.eod], dtype=np.uint16)


class Text:
    """Random windows of tokenised files; held-out files for validation.

    Tokens are kept in `folder`, under a name made from the documents, so that each corpus is encoded once.
    """

    vocabulary = VOCABULARY

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        documents = corpus.documents()
        digest = hashlib.sha256()
        for document in documents:
            digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "surrogatepass"))
        folder.mkdir(parents=True, exist_ok=True)
        processes = min(16, os.cpu_count() or 1)
        model = corpus.tokenizer or folder / f"text-{digest.hexdigest()[:16]}-{VOCABULARY}.model"
        if not model.is_file():
            texts = (d.text for d in documents if not is_validation(d.name, VALIDATION_FRACTION))
            train_tokenizer(texts, vocab_size=VOCABULARY, path=model, threads=processes)
        tokenizer = SentencePieceTokenizer.load(model)
        if tokenizer.vocab_size != VOCABULARY:
            raise UserError(
                f"--tokenizer {model}: has {tokenizer.vocab_size} tokens; give one of {VOCABULARY}"
            )
        digest.update(tokenizer.sha256.encode())
        path = folder / f"text-{digest.hexdigest()[:16]}-{VOCABULARY}.npz"
        if not path.is_file():
            self._encode(documents, model, path, processes)
        with np.load(path) as arrays:
            self.train = torch.from_numpy(arrays["train"].astype(np.int32))
            self.valid = torch.from_numpy(arrays["valid"].astype(np.int32))
        self.corpus = (
            f"{len(documents)} files, {len(self.train)} training and {len(self.valid)} held-out tokens, "
            f"sha256 with the tokenizer's {digest.hexdigest()[:16]}"
        )

    @staticmethod
    def _encode(documents: list[Document], model: Path, path: Path, processes: int) -> None:
        texts = [document.text for document in documents]
        with multiprocessing.get_context("fork").Pool(processes, _start_encoder, (model,)) as pool:
            encoded = pool.map(_encode, texts, chunksize=max(1, len(texts) // (8 * processes)))
        parts: dict[str, list[np.ndarray]] = {"train": [], "valid": []}
        for document, ids in zip(documents, encoded, strict=True):
            parts["valid" if is_validation(document.name, VALIDATION_FRACTION) else "train"].append(ids)
        arrays = {name: np.concatenate(ids) if ids else np.empty(0, np.uint16) for name, ids in parts.items()}
        with atomic_write(path, "wb") as stream:
            np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]

    def batch(self, seed: int, step: int, size: int, length: int) -> Batch:
        starts = torch.randint(0, len(self.train) - length, (size,), generator=generator(seed, step))
        tokens = torch.stack([self.train[s : s + length + 1] for s in starts.tolist()]).long()
        return Batch(tokens, torch.ones(size, length))

    def evaluation(self, length: int, tokens: int) -> list[Batch]:
        """Consecutive parts of the held-out files, the same for every seed."""
        count = min(max(1, tokens // length), (len(self.valid) - 1) // length)
        if count < 1:
            raise ValueError(
                f"the held-out files have {len(self.valid)} tokens, fewer than a length of {length}"
            )
        parts = torch.stack([self.valid[i * length : (i + 1) * length + 1] for i in range(count)]).long()
        size = max(1, EVALUATION_BATCH // length)
        return [Batch(part, torch.ones(part.shape[0], length)) for part in parts.split(size)]


class Generated:
    """Sequences from a generator; validation draws from a seed that training never uses."""

    vocabulary = 512

    def sample(self, g: torch.Generator, size: int, length: int) -> Batch:
        raise NotImplementedError

    def batch(self, seed: int, step: int, size: int, length: int) -> Batch:
        return self.sample(generator(seed, step), size, length)

    def evaluation(self, length: int, tokens: int) -> list[Batch]:
        size = max(1, min(EVALUATION_BATCH, tokens) // length)
        return [
            self.sample(generator(EVALUATION_SEED, i), size, length)
            for i in range(max(1, tokens // length // size))
        ]


class Drawn(Generated):
    """A generator whose sequences are drawn once for each length and seed, and then picked from at random."""

    sequences = 4096

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, int], Batch] = {}

    def batch(self, seed: int, step: int, size: int, length: int) -> Batch:
        if (seed, length) not in self._drawn:
            self._drawn = {(seed, length): self.sample(generator(seed, -1), self.sequences, length)}
        picked = torch.randint(0, self.sequences, (size,), generator=generator(seed, step))
        return Batch(self._drawn[seed, length].tokens[picked], torch.ones(size, length))


class Recall(Generated):
    """Multi-query associative recall (after Arora et al., arXiv 2312.04927), among noise, at all distances.

    Each of `pairs` key-value pairs is shown once at a random place and asked for once, later: its key comes again and
    its value is to be predicted. Distances are log-uniform from 4 to the length, so that a model can learn the lookup
    from near questions, and an attention that sees only near keys can answer only those. Pairs that would fall on
    taken places are left out. One pair has always the same key, which is passkey retrieval. Only answers count;
    guessing gets 1 in 16 right.

    Ids: noise 0-15, values 16-31, keys 32 on (no key twice, drawn from twice `pairs`). `joined`: what is shown is one
    token, of its own for every key and value (ids after the keys'); a lookup then needs one attention layer, and no
    layer that sees which token came before.
    """

    first_value, first_key = 16, 32

    def __init__(self, pairs: int, joined: bool = False) -> None:
        self.pairs, self.joined = pairs, joined
        self.keys = 1 if pairs == 1 else 2 * pairs
        self.first_joined = self.first_key + self.keys
        self.vocabulary = -(-(self.first_joined + (16 * self.keys if joined else 0)) // 64) * 64

    def sample(self, g: torch.Generator, size: int, length: int) -> Batch:
        slots = length // 2  # a slot holds a key and its value
        if 8 * self.pairs > length:
            raise ValueError(
                f"{self.pairs} pairs in {length} tokens: use a length of at least {8 * self.pairs}"
            )
        tokens = torch.randint(0, self.first_value, (size, length + 1), generator=g)
        weights, distance = torch.zeros(size, length), torch.zeros(size, length)
        keys = torch.rand(size, self.keys, generator=g).argsort(1)[:, : self.pairs]
        values = torch.randint(0, 16, (size, self.pairs), generator=g)
        gap = 2 * (torch.rand(size, self.pairs, generator=g) * math.log((slots - 1) / 2)).exp()
        gap = gap.long().clamp(max=slots - 1)
        shown = (torch.rand(size, self.pairs, generator=g) * (slots - gap)).long()
        taken, row = torch.zeros(size, slots, dtype=torch.bool), torch.arange(size)
        for pair in range(self.pairs):
            first, second = shown[:, pair], shown[:, pair] + gap[:, pair]
            free = ~(taken[row, first] | taken[row, second])
            r, first, second, key, value = (
                row[free],
                first[free],
                second[free],
                keys[free, pair],
                values[free, pair],
            )
            taken[r, first] = taken[r, second] = True
            if self.joined:
                tokens[r, 2 * first] = self.first_joined + 16 * key + value
            else:
                tokens[r, 2 * first] = self.first_key + key
                tokens[r, 2 * first + 1] = self.first_value + value
            tokens[r, 2 * second] = self.first_key + key
            tokens[r, 2 * second + 1] = self.first_value + value
            weights[r, 2 * second] = 1.0
            distance[r, 2 * second] = 2.0 * gap[free, pair]
        return Batch(tokens, weights, distance)


class Genome(Drawn):
    """Four bases from an order-3 Markov chain, with earlier segments copied with 5 % substitutions.

    A third of the sequence is copies of 40-120 bases from anywhere before, as repeats in genomes are. The chain's
    transition table is drawn once, from a fixed seed. Generated, not real data.
    """

    vocabulary = 16

    def __init__(self) -> None:
        super().__init__()
        self.cumulative = np.random.default_rng(20).dirichlet(np.full(4, 0.7), size=64).cumsum(-1)

    def sample(self, g: torch.Generator, size: int, length: int) -> Batch:
        draws = torch.rand(size, length + 1, generator=g).numpy()
        out = np.zeros((size, length + 1), dtype=np.int64)
        state = np.zeros(size, dtype=np.int64)
        for i in range(length + 1):
            out[:, i] = np.minimum((draws[:, i : i + 1] > self.cumulative[state]).sum(-1), 3)
            state = (4 * state + out[:, i]) % 64
        for row in range(size):
            position = 400
            while position < length - 120:
                span = int(torch.randint(40, 121, (1,), generator=g))
                source = int(torch.randint(0, position - span, (1,), generator=g))
                copy = out[row, source : source + span].copy()
                changed = torch.rand(span, generator=g).numpy() < 0.05
                copy[changed] = torch.randint(0, 4, (int(changed.sum()),), generator=g).numpy()
                out[row, position : position + span] = copy
                position += span + int(torch.randint(80, 241, (1,), generator=g))
        return Batch(torch.from_numpy(out), torch.ones(size, length))


class Series(Drawn):
    """The Mackey-Glass equation (tau 17, beta 0.2, gamma 0.1, exponent 10) from random histories, in 64 levels.

    One value in four time units, with observation noise of 0.01. Generated, not real data.
    """

    vocabulary = 64

    def sample(self, g: torch.Generator, size: int, length: int) -> Batch:
        delay, every = 17, 4
        history = (1.2 + 0.4 * torch.rand(size, delay + 1, generator=g, dtype=torch.float64)).numpy()
        noise = 0.01 * torch.randn(size, length + 1, generator=g, dtype=torch.float64).numpy()
        values, out = list(history.T), []
        for t in range((length + 101) * every):
            past, now = values[-delay - 1], values[-1]
            values.append(now + 0.2 * past / (1 + past**10) - 0.1 * now)
            if t % every == every - 1 and t >= 100 * every:
                out.append(values[-1])
            del values[: -delay - 1]
        levels = ((np.stack(out, 1) + noise) * 44).astype(np.int64).clip(0, 63)
        return Batch(torch.from_numpy(levels), torch.ones(size, length))


RECALL = {"passkey": (1, True), "recall": (24, False), "lookup": (24, True), "lookup_many": (96, True)}
NAMES = ("text", *RECALL, "genome", "series")


@lru_cache(maxsize=2)
def make(name: str, corpus: Corpus, folder: Path) -> Text | Generated:
    """The data of a table; `folder` keeps the encoded text."""
    if name == "text":
        return Text(corpus, folder)
    if name in RECALL:
        pairs, joined = RECALL[name]
        return Recall(pairs, joined)
    return {"genome": Genome, "series": Series}[name]()
