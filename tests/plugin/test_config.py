# SPDX-License-Identifier: Apache-2.0
"""`SparseKConfig` and its sources: every bad value names its field or variable, and nothing unknown is ignored."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsek_megatron import SparseKConfig, config
from sparsek_megatron.environment import settings_from


def test_pool_defaults_to_four_times_topk_and_the_config_is_frozen() -> None:
    made = SparseKConfig(topk=32)
    assert made.pool == 128
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.topk = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert dataclasses.replace(made, window=7).window == 7
    assert SparseKConfig(topk=8, hard_selection=True).pool == 8
    assert SparseKConfig(8, 16, 4, 24, "value") == SparseKConfig(
        topk=8, window=16, stride=4, pool=24, gate="value"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"topk": 0}, ["topk=0", ">= 1"]),
        ({"topk": 2.5}, ["topk=2.5", "integer"]),
        ({"topk": True}, ["topk=True", "integer"]),
        ({"window": 0}, ["window=0"]),
        ({"stride": -1}, ["stride=-1"]),
        ({"topk": 8, "pool": 4}, ["pool=4", "topk=8"]),
        ({"topk": 8, "pool": 8}, ["pool=8", "hard_selection=True"]),
        ({"topk": 8, "pool": 9, "hard_selection": True}, ["pool=9", "topk=8"]),
        ({"topk": 8192}, ["pool=32768", "default for topk=8192", "set pool to at most 16384"]),
        ({"topk": 8, "pool": 16385}, ["pool=16385", "at most 16384"]),
        ({"topk": 16385, "hard_selection": True}, ["pool=16385", "smaller topk"]),
        ({"gate": "both"}, ["gate='both'", "key_value"]),
        ({"backend": "cuda"}, ["backend='cuda'", "triton"]),
        ({"scorer": "deep"}, ["scorer='deep'", "mlp"]),
        ({"score_spread": 0.0}, ["score_spread=0.0", "greater than 0"]),
        ({"score_spread": float("nan")}, ["score_spread=nan"]),
        ({"scorer_lr_mult": -1.0}, ["scorer_lr_mult=-1.0"]),
        ({"initial_slope": -4.0}, ["initial_slope=-4.0"]),
        ({"initial_slope": 4.0, "position_slope": False}, ["initial_slope=4.0", "position_slope=True"]),
        ({"reference_length": 0}, ["reference_length=0"]),
        ({"dense_layers": 3}, ["dense_layers=3", "(0, -1)"]),
        ({"dense_layers": ("a",)}, ["dense_layers"]),
        ({"dense_every": 0}, ["dense_every=0"]),
        ({"detach_hidden": "yes"}, ["detach_hidden='yes'"]),
        ({"scorer_norm": "maybe"}, ["scorer_norm='maybe'"]),
        ({"overflow_warning": -0.1}, ["overflow_warning=-0.1"]),
    ],
)
def test_a_bad_value_is_refused_in_one_line_naming_the_field(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        SparseKConfig(**settings)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_settings_come_from_a_file_and_variables_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "sparsek.yaml"
    file.write_text("topk: 16\nwindow: 24\ndense_layers: [0, -1]\nscore_spread: 0.5\n")
    environment = {
        "SPARSEK_CONFIG": str(file),
        "SPARSEK_WINDOW": "48",
        "SPARSEK_POSITION_SLOPE": "false",
        "HOME": "x",
    }
    made, source = settings_from(environment)
    assert made == SparseKConfig(
        topk=16, window=48, dense_layers=(0, -1), score_spread=0.5, position_slope=False
    )
    assert str(file) in source and "SPARSEK_WINDOW" in source
    assert settings_from({}) == (SparseKConfig(), "defaults")
    made, _ = settings_from({"SPARSEK_DENSE_LAYERS": "0, -1", "SPARSEK_OVERFLOW_WARNING": "none"})
    assert made.dense_layers == (0, -1) and made.overflow_warning is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SPARSEK_TOPKK": "4"}, ["SPARSEK_TOPKK", "SPARSEK_TOPK"]),
        ({"SPARSEK_TOPK": "many"}, ["SPARSEK_TOPK='many'", "int"]),
        ({"SPARSEK_DENSE_LAYERS": "first"}, ["SPARSEK_DENSE_LAYERS='first'", "integers"]),
        ({"SPARSEK_DETACH_HIDDEN": "perhaps"}, ["SPARSEK_DETACH_HIDDEN='perhaps'", "bool"]),
        ({"SPARSEK_CONFIG": "/nowhere.yaml"}, ["SPARSEK_CONFIG=/nowhere.yaml", "cannot read"]),
        ({"SPARSEK_TOPK": "0"}, ["topk=0"]),
    ],
)
def test_a_bad_environment_is_refused_by_name(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        settings_from(environment)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("text", ["- 1\n", "topkk: 3\n", "topk: [\n"])
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="SPARSEK_CONFIG") as error:
        settings_from({"SPARSEK_CONFIG": str(file)})
    assert "\n" not in str(error.value)


def test_choices_and_limits_are_those_of_the_kernels() -> None:
    from sparsek_kernels import settings

    assert (config.GATES, config.BACKENDS, config.MAX_POOL) == (
        settings.GATES,
        settings.BACKENDS,
        settings.MAX_POOL,
    )
    assert SparseKConfig(topk=8192, pool=settings.MAX_POOL).pool == settings.MAX_POOL


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, sparsek_megatron; "
        "assert not {'torch', 'megatron', 'triton', 'transformer_engine', 'apex'} & set(sys.modules); "
        "sparsek_megatron.SparseKConfig(topk=4); assert 'torch' not in sys.modules; "
        "assert set(sparsek_megatron.__all__) == set(sparsek_megatron._HOME)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
