# SPDX-License-Identifier: Apache-2.0
"""The data that a run is given: flags, blends, and what can be checked before megatron-core is imported."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsek_megatron.data.card import read_card
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.data.whole import require_whole
from sparsek_megatron.errors import UserError

_SAMPLE = 50_000_000
_DECIMAL = re.compile(r"\d+\.?\d*|\.\d+", re.ASCII)


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
        for _, given in self.by_flag():
            found += parse_blend(given)[0]
        return found

    def by_flag(self) -> list[tuple[str, tuple[str, ...]]]:
        """(flag, value) of each list that was given."""
        named = (("--data-path", self.blend), ("--train-data-path", self.train), ("--valid-data-path", self.valid))
        return [(flag, value) for flag, value in named if value]


def parse_blend(given: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """(prefixes, weights), as mcore's `get_blend_from_list`: weights where every other word is a number."""
    if len(given) % 2 == 0:
        try:
            return list(given[1::2]), [float(weight) for weight in given[::2]]
        except ValueError:
            pass
    return list(given), None


def parse_split(given: str) -> list[float]:
    """The train, valid and test parts of `--split`; parts left out at the end are 0, as mcore takes them.

    Raises:
        UserError: not one to three decimal numbers (mcore finds nothing else in the text), or the first is 0.
    """
    words = [word.strip() for word in given.split(",")]
    parts = [float(word) for word in words if _DECIMAL.fullmatch(word)]
    if len(parts) != len(words) or len(parts) > 3 or not parts[0]:
        raise UserError(
            f"--split {given}: must be the train,valid,test parts as decimal numbers, train's above 0; e.g. 95,5,0"
        )
    return parts + [0.0] * (3 - len(parts))


def check_data(paths: DataPaths, tokenizer: SentencePieceTokenizer, tokenizer_path: str) -> None:
    """Raise `UserError` for missing, damaged or empty data, for data made with another tokenizer, and for parts or
    weights that are no proportions.
    """
    if not paths.by_flag():
        raise UserError("no training data: give --data-path, or --train-data-path and --valid-data-path")
    if paths.blend:
        parse_split(paths.split)
    for flag, given in paths.by_flag():
        prefixes, weights = parse_blend(given)
        for weight, prefix in zip(weights or [1.0] * len(prefixes), prefixes, strict=True):
            if not 0 < weight < math.inf:
                raise UserError(f"{flag} {weight:g} {prefix}: the weight must be above 0; leave out data of weight 0")
            for suffix in (".bin", ".idx"):
                if not Path(prefix + suffix).is_file():
                    raise UserError(
                        f"{flag} {prefix}: {prefix}{suffix} does not exist; "
                        "give the prefix without suffix, or make the data with examples/prepare_data.py"
                    )
            require_whole(flag, prefix)
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
    largest = int(sample_tokens(prefix).max(initial=0))
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{flag} {prefix}: holds token {largest} but --tokenizer-model {tokenizer_path} has "
            f"{tokenizer.vocab_size} tokens; give the tokenizer that made the data"
        )


def sample_tokens(prefix: str) -> np.ndarray:
    """The first tokens of a dataset, at most 50M, as an array on disk."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # seconds: only for data without a card

    dataset = IndexedDataset(prefix)
    return np.memmap(prefix + ".bin", dtype=dataset.index.dtype, mode="r")[:_SAMPLE]
