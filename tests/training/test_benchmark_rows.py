# SPDX-License-Identifier: Apache-2.0
"""Rows of the training benchmark: counts of pairs and operations, what ranks agree on, and the committed table."""

import sys

import pytest
import torch
import torch.distributed as dist
from programs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))

from training_benchmark import ranks
from training_benchmark.arms import FLEX_ELEMENTS, _near
from training_benchmark.row import Row, compare_with_dense, line, reject_without_loss
from training_benchmark.shapes import SHAPES, causal_pairs, window_pairs
from training_benchmark.table import COLUMNS, read_csv

from sparsek_megatron.training.parallel import Machine


@pytest.mark.parametrize("tokens, width", [(7, 3), (7, 7), (7, 20), (1, 1)])
def test_pairs_are_counted(tokens, width):
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert window_pairs(tokens, width) == int(((j <= i) & (i - j < width)).sum())
    assert causal_pairs(tokens) == int((j <= i).sum())


def test_the_shapes_have_the_sizes_of_their_names():
    sizes = {
        name: shape.num_layers * shape.layer_weights / 1e9 for name, shape in SHAPES.items() if name != "tiny"
    }
    assert sizes == pytest.approx({"1.3b": 1.3, "3b": 3.0, "8b": 8.0}, rel=0.2)


def test_step_flops_are_three_times_the_forward():
    shape = SHAPES["tiny"]
    tokens, vocabulary, pairs = 10, 100, 30.0
    matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 192), (64, 192), (192, 64)]
    layer = sum(2 * a * b * tokens for a, b in matrices) + 4 * 16 * 4 * pairs
    want = 3 * (2 * layer + 2 * 64 * vocabulary * tokens)
    assert shape.step_flops(tokens=tokens, vocabulary=vocabulary, pairs=pairs) == want


def test_a_row_has_the_memory_of_the_rank_that_held_most_and_the_mean_loss(monkeypatch):
    def gathered(into, own):
        into[:] = [own, (6.0, 12.5), (7.0, 7.0)]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda shared, src: None)
    row = Row("8b", 4, 1024, "sparsek", "mcore", 3, 1, 1, "", loss=5.0, peak_gib=3.0)
    agreed = ranks.agree(row, Machine(0, 3, torch.device("cpu"), dist.HashStore()))
    assert (agreed.loss, agreed.peak_gib) == (6.0, 12.5)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_step_without_a_loss_measures_nothing(loss):
    row = Row("8b", 4, 1024, "dense", "mcore", 1, 1, 1, "", step_ms=5.0, tokens_per_second=7.0, loss=loss)
    other = Row("8b", 4, 1024, "sparsek", "mcore", 1, 1, 1, "", step_ms=4.0, tokens_per_second=9.0, loss=6.0)
    for each in (row, other):
        reject_without_loss(each)
        compare_with_dense(each, [row, other])
    assert row.step_ms is None and line(row).endswith(f"loss is {loss}: not a measurement")
    assert other.step_ms == 4.0 and other.speedup is None and not other.error


def test_what_flex_attention_cannot_address_is_copied():
    """As values of a fused QKV product lie: 6,144 elements apart, in a storage of which nothing is touched."""
    tokens = 8
    for stride, copied in ((FLEX_ELEMENTS // tokens, False), (FLEX_ELEMENTS // (tokens - 1) + 1, True)):
        storage = torch.empty(FLEX_ELEMENTS + 2**20, dtype=torch.bfloat16)
        values = storage.as_strided((1, 2, tokens, 4), (0, 4, stride, 1))
        values.copy_(torch.randn(values.shape))
        near = _near(values)
        assert torch.equal(near, values)
        assert (near is values) != copied
        assert near.is_contiguous() == copied


def test_the_committed_table_has_the_programs_columns_and_marks_what_later_rows_replace():
    rows = read_csv(REPOSITORY / "examples" / "results" / "training.csv", "--plot")
    assert tuple(rows[0]) == COLUMNS
    case = COLUMNS[: COLUMNS.index("options") + 1]
    for index, row in enumerate(rows):
        later = [each for each in rows[index + 1 :] if all(each[name] == row[name] for name in case)]
        variables = [(each["max_connections"], row["max_connections"]) for each in later]
        replaced = any(theirs == own or not theirs or not own for theirs, own in variables)
        assert row["replaced"] == ("1" if replaced else ""), row
