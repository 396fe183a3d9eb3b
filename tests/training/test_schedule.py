# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every step."""

import dataclasses
import math

import pytest

from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.schedule import learning_rate

CONFIG = TrainingConfig(train_iters=110, lr=1.0, min_lr=0.1, lr_warmup_iters=10)


def test_warm_up_is_linear_and_reaches_the_peak():
    assert [learning_rate(CONFIG, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("style", "expected"),
    [("cosine", [1.0, 0.55 + 0.45 * math.cos(0.25 * math.pi), 0.55, 0.1]), ("linear", [1.0, 0.775, 0.55, 0.1]),
     ("constant", [1.0, 1.0, 1.0, 1.0])],
)  # fmt: skip
def test_decay_runs_from_the_warm_up_to_the_last_step(style, expected):
    config = dataclasses.replace(CONFIG, lr_decay_style=style)
    assert [learning_rate(config, step) for step in (10, 35, 60, 110)] == pytest.approx(expected)


def test_decay_may_end_before_the_run():
    config = dataclasses.replace(CONFIG, lr_decay_iters=60)
    assert learning_rate(config, 35) == pytest.approx(0.55)
    assert learning_rate(config, 60) == learning_rate(config, 109) == 0.1
