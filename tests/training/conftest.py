# SPDX-License-Identifier: Apache-2.0
"""A small corpus, its tokenizer and its datasets, made once; and how a program refuses."""

import sysconfig
from pathlib import Path

import pytest
from programs import Prepared

from sparsek_megatron.data.prepare import prepare
from sparsek_megatron.errors import report_user_errors

VOCABULARY = 512


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
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


@pytest.fixture
def refused(capsys, monkeypatch):
    """Call a program's function and return its one-line report, requiring exit code 2 and nothing else said."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(program, *arguments) -> str:
        with pytest.raises(SystemExit) as exit_info, report_user_errors():
            program(*arguments)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error.strip()

    return call
