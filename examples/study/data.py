# SPDX-License-Identifier: Apache-2.0
"""Batches of every table: text, recall tasks, and generated sequences; the same for all arms of a (seed, step).

A batch is tokens [b, n + 1] int64 and weights [b, n]: the weight of predicting tokens[:, i + 1] at i (0 leaves it out).
For recall tasks `distance` [b, n] gives, where the weight is not 0, how many tokens ago the answer was shown.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsek_megatron.data.corpus import find_sources, is_validation, read_documents, stdlib_sources
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from sparsek_megatron.files import atomic_write

VOCABULARY = 4096
VALIDATION_FRACTION = 0.05
EVALUATION_SEED = 1 << 40


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


class Text:
    """Random windows of tokenised files; held-out files for validation.

    inputs: files, or folders of which files matching `include` are read; none means the Python standard library.
    Tokens are kept in `folder`, under a name made from the documents, so that each corpus is encoded once.
    """

    vocabulary = VOCABULARY

    def __init__(self, inputs: list[str], folder: Path, include: str = "*", threads: int = 1) -> None:
        sources = find_sources(inputs, include=include) if inputs else stdlib_sources()
        documents = list(read_documents(sources))
        digest = hashlib.sha256()
        for document in documents:
            digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "surrogatepass"))
        self.corpus = f"{len(documents)} files, sha256 {digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"text-{digest.hexdigest()[:16]}-{VOCABULARY}.npz"
        if not path.is_file():
            self._encode(documents, path, threads)
        with np.load(path) as arrays:
            self.train = torch.from_numpy(arrays["train"].astype(np.int32))
            self.valid = torch.from_numpy(arrays["valid"].astype(np.int32))

    @staticmethod
    def _encode(documents: list, path: Path, threads: int) -> None:
        model = path.with_suffix(".model")
        texts = (d.text for d in documents if not is_validation(d.name, VALIDATION_FRACTION))
        tokenizer: SentencePieceTokenizer = train_tokenizer(
            texts, vocab_size=VOCABULARY, path=model, threads=threads
        )
        parts: dict[str, list[int]] = {"train": [], "valid": []}
        for document in documents:
            part = "valid" if is_validation(document.name, VALIDATION_FRACTION) else "train"
            parts[part] += [*tokenizer.tokenize(document.text), tokenizer.eod]
        with atomic_write(path, "wb") as stream:
            np.savez(stream, **{name: np.asarray(ids, dtype=np.uint16) for name, ids in parts.items()})  # pyright: ignore

    def batch(self, seed: int, step: int, size: int, length: int) -> Batch:
        starts = torch.randint(0, len(self.train) - length, (size,), generator=generator(seed, step))
        tokens = torch.stack([self.train[s : s + length + 1] for s in starts.tolist()]).long()
        return Batch(tokens, torch.ones(size, length))

    def evaluation(self, length: int, tokens: int) -> list[Batch]:
        """Batches of one sequence each: consecutive parts of the held-out files, the same for every seed."""
        count = min(max(1, tokens // length), (len(self.valid) - 1) // length)
        if count < 1:
            raise ValueError(
                f"the held-out files have {len(self.valid)} tokens, fewer than a length of {length}"
            )
        parts = [self.valid[i * length : (i + 1) * length + 1][None].long() for i in range(count)]
        return [Batch(part, torch.ones(1, length)) for part in parts]


class Generated:
    """Sequences from a generator; validation draws from a seed that training never uses."""

    vocabulary = 512

    def sample(self, g: torch.Generator, size: int, length: int) -> Batch:
        raise NotImplementedError

    def batch(self, seed: int, step: int, size: int, length: int) -> Batch:
        return self.sample(generator(seed, step), size, length)

    def evaluation(self, length: int, tokens: int) -> list[Batch]:
        return [
            self.sample(generator(EVALUATION_SEED, i), 8, length)
            for i in range(max(1, tokens // length // 8))
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
    """Multi-query associative recall (after Arora et al., arXiv 2312.04927), among noise.

    `pairs` key-value pairs lie at random places of the first three quarters; in the last quarter each key comes once
    more and its value is to be predicted. Ids: noise 0-63, values 64-95, keys 96 on (no key twice). With one pair,
    whose key is then always the same, this is passkey retrieval. Only answers count; guessing gets 1 in 32 right.
    """

    vocabulary = 352
    first_value, first_key = 64, 96

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.keys = 1 if pairs == 1 else 2 * pairs

    def sample(self, g: torch.Generator, size: int, length: int) -> Batch:
        tokens = torch.randint(0, self.first_value, (size, length + 1), generator=g)
        weights, distance = torch.zeros(size, length), torch.zeros(size, length)
        shown, asked = (
            length * 3 // 8,
            length // 8,
        )  # two-token slots of the first three quarters, and of the last
        if self.pairs > asked:
            raise ValueError(
                f"{self.pairs} pairs do not fit a length of {length}: use at least {8 * self.pairs}"
            )
        for row in range(size):
            keys = self.first_key + torch.randperm(self.keys, generator=g)[: self.pairs]
            values = torch.randint(self.first_value, self.first_key, (self.pairs,), generator=g)
            places = 2 * torch.randperm(shown, generator=g)[: self.pairs]
            queries = length - 2 * asked + 2 * torch.randperm(asked, generator=g)[: self.pairs]
            for first in (places, queries):
                tokens[row, first], tokens[row, first + 1] = keys, values
            weights[row, queries] = 1.0
            distance[row, queries] = (queries - places).float()
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


def make(name: str, inputs: list[str], folder: Path, include: str = "*") -> Text | Generated:
    """The data of a table."""
    if name == "text":
        return Text(inputs, folder, include, threads=min(8, os.cpu_count() or 1))
    if name == "passkey":
        return Recall(pairs=1)
    if name == "recall":
        return Recall(pairs=16)
    if name == "recall_many":
        return Recall(pairs=64)
    return {"genome": Genome, "series": Series}[name]()


NAMES = ("text", "passkey", "recall", "recall_many", "genome", "series")
