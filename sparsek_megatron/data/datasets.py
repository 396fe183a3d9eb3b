# SPDX-License-Identifier: Apache-2.0
"""Megatron's `GPTDataset` behind its blended builder, and the order in which samples are read."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list
from torch.utils.data import DataLoader, Dataset

from sparsek_megatron.data.encode import read_card, unigram_entropy
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError

_ENTROPY_SAMPLE_TOKENS = 50_000_000


@dataclass(frozen=True)
class DataPaths:
    """Dataset prefixes as Megatron's flags give them, each list a blend (`[prefix ...]` or `[weight prefix ...]`).

    Either `blend` with `split` ("95,5,0"), or `train` and `valid` from separate files.
    """

    blend: tuple[str, ...] = ()
    split: str = "95,5,0"
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()

    def prefixes(self) -> list[str]:
        """Every prefix, weights left out."""
        found: list[str] = []
        for flag, given in self.by_flag():
            found += _blend(flag, given)[0]
        return found

    def by_flag(self) -> list[tuple[str, tuple[str, ...]]]:
        """(flag, value) of each list that was given."""
        named = (("--data-path", self.blend), ("--train-data-path", self.train), ("--valid-data-path", self.valid))
        return [(flag, value) for flag, value in named if value]


def _blend(flag: str, given: tuple[str, ...]) -> tuple[list[str], list[float] | None]:
    try:
        blend = get_blend_from_list(list(given))
    except (AssertionError, ValueError):
        blend = None
    if blend is None:
        raise UserError(f"{flag} {' '.join(given)}: give one prefix, several prefixes, or pairs of weight and prefix")
    return blend


def check_data(paths: DataPaths, tokenizer: SentencePieceTokenizer, tokenizer_path: str) -> None:
    """Raise `UserError` for missing or empty data, and for data made with another tokenizer."""
    if not paths.by_flag():
        raise UserError("no training data: give --data-path, or --train-data-path and --valid-data-path")
    for flag, given in paths.by_flag():
        for prefix in _blend(flag, given)[0]:
            for suffix in (".bin", ".idx"):
                if not Path(prefix + suffix).is_file():
                    raise UserError(
                        f"{flag} {prefix}: {prefix}{suffix} does not exist; "
                        "give the prefix without suffix, or make the data with examples/prepare_data.py"
                    )
            if Path(prefix + ".bin").stat().st_size == 0:
                raise UserError(f"{flag} {prefix}: the dataset is empty; prepare it from text that is not")
            _check_tokenizer(flag, prefix, tokenizer, tokenizer_path)


def _check_tokenizer(flag: str, prefix: str, tokenizer: SentencePieceTokenizer, tokenizer_path: str) -> None:
    card = read_card(prefix)
    if card is not None:
        if card.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"--tokenizer-model {tokenizer_path}: not the tokenizer that made {prefix} (its vocabulary: "
                f"{card.vocab_size}, this one: {tokenizer.vocab_size}); give that model or prepare the data again"
            )
        return
    largest = int(_sample_tokens(prefix).max(initial=0))
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{flag} {prefix}: holds token {largest} but --tokenizer-model {tokenizer_path} has "
            f"{tokenizer.vocab_size} tokens; give the tokenizer that made the data"
        )


def _sample_tokens(prefix: str) -> np.ndarray:
    dataset = IndexedDataset(prefix)
    return np.memmap(prefix + ".bin", dtype=dataset.index.dtype, mode="r")[:_ENTROPY_SAMPLE_TOKENS]


def validation_entropy(paths: DataPaths, vocab_size: int) -> float:
    """Unigram entropy in nats per token of the validation data (of the whole blend where one is split).

    Taken from the card beside one dataset; for several, or for data without a card, counted over at most
    the first 50M tokens of each.
    """
    flag, given = paths.by_flag()[-1]
    prefixes = _blend(flag, given)[0]
    card = read_card(prefixes[0])
    if len(prefixes) == 1 and card is not None:
        return card.unigram_entropy
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in prefixes:
        counts += np.bincount(_sample_tokens(prefix), minlength=vocab_size)[:vocab_size]
    return unigram_entropy(counts)


def build_datasets(
    paths: DataPaths,
    tokenizer: SentencePieceTokenizer,
    *,
    sequence_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    cache: Path,
) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """(train, validation) through mcore's blended builder. Call it on every rank: rank 0 writes the index cache.

    Items are dicts of [sequence_length] tensors: tokens, labels, position_ids (int64), loss_mask (float32).
    Validation is None where `valid_samples` is 0.

    Raises:
        UserError: the data is too short for one sample, or a blend without weights is too short for the run.
    """
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    if paths.blend:
        sources: dict[str, Any] = {"blend": _blend("--data-path", paths.blend), "split": paths.split}
    else:
        train = _blend("--train-data-path", paths.train)
        valid = _blend("--valid-data-path", paths.valid) if paths.valid else None
        sources = {"blend_per_split": [train, valid, None]}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(cache),
        **sources,
    )
    _require_one_sample(paths, sequence_length)
    sizes = [train_samples, valid_samples, 0]
    train_set, valid_set, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    for flag, dataset, needed in (("train", train_set, train_samples), ("valid", valid_set, valid_samples)):
        if needed and (dataset is None or len(dataset) < needed):
            have = 0 if dataset is None else len(dataset)
            raise UserError(
                f"--{flag}-data-path / --data-path: {needed:,} samples of {sequence_length} tokens wanted, "
                f"{have:,} there; give the blend weights so that it repeats, or ask for fewer steps"
            )
    return train_set, (valid_set if valid_samples else None)  # pyright: ignore[reportReturnType]


def _require_one_sample(paths: DataPaths, sequence_length: int) -> None:
    for prefix in paths.prefixes():
        dataset = IndexedDataset(prefix)  # kept: its arrays die with it
        tokens = int(dataset.sequence_lengths.sum())
        if tokens < sequence_length + 1:
            raise UserError(
                f"--seq-length {sequence_length}: {prefix} has only {tokens:,} tokens; "
                "shorten the sequence or give more text"
            )


class StepSampler:
    """Sample indices for one data-parallel rank, micro-batch by micro-batch, from `first_sample` on.

    Step t takes samples [t * global_batch_size, (t + 1) * global_batch_size) whatever the number of ranks: the order
    of the data depends on neither data-parallel size nor micro-batch size, and resuming is one number.
    """

    def __init__(
        self, *, first_sample: int, last_sample: int, micro_batch_size: int, global_batch_size: int,
        rank: int, world_size: int,
    ):  # fmt: skip
        self._samples = range(first_sample, last_sample, global_batch_size)
        self._micro = micro_batch_size
        self._share = global_batch_size // world_size
        self._offset = rank * self._share

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._samples:
            for micro in range(start + self._offset, start + self._offset + self._share, self._micro):
                yield list(range(micro, micro + self._micro))

    def __len__(self) -> int:
        return len(self._samples) * (self._share // self._micro)


def batches(dataset: Dataset[Any], sampler: StepSampler, *, num_workers: int, pin: bool) -> Iterator[dict[str, Any]]:
    """Micro-batches as dicts of [micro_batch_size, sequence_length] tensors."""
    # A generator of its own: the loader must not draw its worker seed from the RNG that checkpoints restore.
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin, generator=own)
    return iter(loader)
