# SPDX-License-Identifier: Apache-2.0
"""The prepared corpus and the ways to start a program, shared with tests/training."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

from corpus import prepare_corpus


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return prepare_corpus(tmp_path_factory.mktemp("prepared"))
