# SPDX-License-Identifier: Apache-2.0
"""The `.json` beside a dataset: which tokenizer made it, and the entropy of its tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsek_megatron.errors import UserError


@dataclass(frozen=True)
class DatasetCard:
    """What a dataset's `.json` says. `unigram_entropy` is in nats per token, of the dataset's own token counts."""

    tokenizer_sha256: str
    vocab_size: int
    documents: int
    tokens: int
    unigram_entropy: float


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution with these counts: the least loss of any model without context."""
    present = counts[counts > 0].astype(np.float64)
    probabilities = present / present.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def read_card(prefix: str) -> DatasetCard | None:
    """The card of the dataset at `prefix`; None for data that another program prepared without one.

    Raises:
        UserError: the card exists but cannot be read.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        return DatasetCard(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise UserError(f"{path}: not a dataset card; prepare the data again with examples/prepare_data.py") from None
