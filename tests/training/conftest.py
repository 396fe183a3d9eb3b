# SPDX-License-Identifier: Apache-2.0
"""A small corpus, its tokenizer and its datasets, made once; and how a program refuses."""

import pytest
from corpus import prepare_corpus
from programs import Prepared

from sparsek_megatron.errors import report_user_errors


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    return prepare_corpus(tmp_path_factory.mktemp("prepared"))


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
