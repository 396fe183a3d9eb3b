# SPDX-License-Identifier: Apache-2.0
"""Megatron's `GPTDataset` behind its blended builder, and the order in which samples are read."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import __version__ as megatron_version
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader, Dataset

from sparsek_megatron.data.card import read_card, unigram_entropy
from sparsek_megatron.data.index_cache import complete_cache, plain_arrays
from sparsek_megatron.data.paths import DataPaths, parse_blend, sample_tokens
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.data.whole import require_whole
from sparsek_megatron.data.workers import ignore_sigterm_except_from_parent, kill_at_exit
from sparsek_megatron.errors import UserError
from sparsek_megatron.stop_signals import signals_held


def validation_entropy(paths: DataPaths, vocab_size: int) -> float:
    """Unigram entropy in nats per token of the validation data (of the whole blend where one is split, of the training
    data where nothing is validated).

    Taken from the card beside one dataset; for several, or for data without a card, counted over at most
    the first 50M tokens of each.
    """
    _, given = paths.by_flag()[-1]
    prefixes = parse_blend(given)[0]
    card = read_card(prefixes[0])
    if len(prefixes) == 1 and card is not None:
        return card.unigram_entropy
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in prefixes:
        counts += np.bincount(sample_tokens(prefix), minlength=vocab_size)[:vocab_size]
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
        UserError: the data is damaged or too short for one sample, a part of `--split` gets no token, a blend without
            weights is too short for the run, or the index cache cannot be written.
    """
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    if paths.blend:
        sources: dict[str, Any] = {"blend": parse_blend(paths.blend), "split": paths.split}
    else:
        train = parse_blend(paths.train)
        valid = parse_blend(paths.valid) if paths.valid else None
        sources = {"blend_per_split": [train, valid, None]}
    sizes = [train_samples, valid_samples, 0]
    settings = {
        **sources, "sizes": sizes, "sequence_length": sequence_length, "seed": seed, "tokenizer": tokenizer.sha256,
        "megatron-core": megatron_version,
    }  # fmt: skip

    def build(folder: Path) -> list[Any]:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=str(folder),
            **sources,
        )
        with plain_arrays():
            return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()

    _require_one_sample(paths, sequence_length)
    if paths.blend:
        _require_tokens_in_each_part(paths, sequence_length)
    train_set, valid_set, _ = build(complete_cache(cache, paths.prefixes(), settings, build))
    for flag, dataset, needed in (("train", train_set, train_samples), ("valid", valid_set, valid_samples)):
        if needed and (dataset is None or len(dataset) < needed):
            have = 0 if dataset is None else len(dataset)
            raise UserError(
                f"--{flag}-data-path / --data-path: {needed:,} samples of {sequence_length} tokens wanted, "
                f"{have:,} there; give the blend weights so that it repeats, or ask for fewer steps"
            )
    return train_set, (valid_set if valid_samples else None)  # pyright: ignore[reportReturnType]


def _require_one_sample(paths: DataPaths, sequence_length: int) -> None:
    for flag, given in paths.by_flag():
        for prefix in parse_blend(given)[0]:
            require_whole(flag, prefix)
            dataset = IndexedDataset(prefix)  # kept: its arrays die with it
            tokens = int(dataset.sequence_lengths.sum())
            if tokens < sequence_length + 1:
                raise UserError(
                    f"--seq-length {sequence_length}: {prefix} has only {tokens:,} tokens; "
                    "shorten the sequence or give more text"
                )


def _require_tokens_in_each_part(paths: DataPaths, sequence_length: int) -> None:
    """Refuse a part of `--split` without tokens, the test part and those of zero samples included.

    mcore would repeat such a part for ever, as it asks each for one token at least. In a blend without weights, where
    nothing is repeated, it fails where a part of a dataset is shorter than one sample.
    """
    prefixes, weights = parse_blend(paths.blend)
    least = 1 if weights or len(prefixes) == 1 else sequence_length + 1
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(paths.split))
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)  # kept: its arrays die with it
        lengths = dataset.sequence_lengths
        for part, bounds in zip(Split, matrix, strict=True):
            if bounds is None:
                continue
            first, last = (round(bound * float(len(lengths))) for bound in bounds)  # as mcore's builder
            tokens = int(lengths[first:last].sum())
            if tokens < least:
                raise UserError(
                    f"--split {paths.split}: the {part.name} part of {prefix} has {max(0, last - first):,} of its "
                    f"{len(lengths):,} documents and {tokens:,} tokens, and needs {least:,}; give more documents, "
                    "another --split (100: all trains), or separate --train-data-path and --valid-data-path"
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
    """Micro-batches as dicts of [micro_batch_size, sequence_length] tensors.

    The worker processes outlive the signals that stop a run, and end with this iterator or this process.
    """
    # A generator of its own: the loader must not draw its worker seed from the RNG that checkpoints restore.
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin, generator=own,
        worker_init_fn=ignore_sigterm_except_from_parent,
    )  # fmt: skip
    with signals_held():
        iterator = iter(loader)
    kill_at_exit(iterator)
    return iterator
