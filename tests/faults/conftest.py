# SPDX-License-Identifier: Apache-2.0
"""The prepared corpus, as tests of training have it."""

import pytest
from corpus import prepare_corpus


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return prepare_corpus(tmp_path_factory.mktemp("prepared"))
