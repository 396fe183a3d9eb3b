# SPDX-License-Identifier: Apache-2.0
"""A small corpus with its tokenizer and datasets, from the files of Python's standard library."""

import sysconfig
from pathlib import Path

from programs import Prepared

from sparsek_megatron.data.prepare import prepare

VOCABULARY = 512


def prepare_corpus(folder: Path) -> Prepared:
    """Make everything in `folder`."""
    texts = folder / "texts"
    texts.mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.glob("[a-h]*.py"))[:40]:
        (texts / path.name).write_bytes(path.read_bytes()[:20_000].decode("utf-8", "ignore").encode())
    prepare(
        ["--input", str(texts), "--train-tokenizer", "--vocab-size", str(VOCABULARY), "--validation-fraction", "0.2",
         "--tokenizer-model", str(folder / "tokenizer.model"), "--output-prefix", str(folder / "text"),
         "--workers", "1"]
    )  # fmt: skip
    return Prepared(folder)
