# SPDX-License-Identifier: Apache-2.0
"""Settings when only `--spec` is given: a YAML file, environment variables, or the defaults.

`SPARSEK_CONFIG` names a YAML file of `SparseKConfig` fields; `SPARSEK_<FIELD>` (SPARSEK_TOPK=512,
SPARSEK_DENSE_LAYERS=0,-1) sets one field and wins over the file. An unknown name is an error, so that a
typing mistake cannot train with a default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsek_megatron.config import SparseKConfig

PREFIX = "SPARSEK_"
FILE_VARIABLE = "SPARSEK_CONFIG"


def _unknown(kind: str, name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return ValueError(f"{kind} {name} is not a SparseK setting: {hint}")


def _parse(variable: str, text: str, kind: Any) -> Any:
    """The value of one environment variable as the field's type; ValueError naming the variable."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in options and text.lower() in ("", "none"):
        return None
    wanted = next(option for option in options if option is not types.NoneType)
    try:
        if typing.get_origin(wanted) is tuple:
            return tuple(int(part) for part in text.replace(",", " ").split())
        if wanted is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return wanted(text)
    except (ValueError, KeyError):
        name = "integers" if typing.get_origin(wanted) is tuple else wanted.__name__
        raise ValueError(f"{variable}={text!r}: not a valid {name}") from None


def _from_file(path: str, known: list[str]) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as err:
        raise ValueError(f"{FILE_VARIABLE}={path}: cannot read it ({err.strerror})") from None
    except yaml.YAMLError as err:
        raise ValueError(f"{FILE_VARIABLE}={path}: not YAML ({' '.join(str(err).split())})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{FILE_VARIABLE}={path}: must hold fields of SparseKConfig, like 'topk: 512'")
    for name in settings:
        if name not in known:
            raise _unknown(f"{FILE_VARIABLE}={path}:", str(name), known)
    return settings


def settings_from(environment: Mapping[str, str]) -> tuple[SparseKConfig, str]:
    """The configuration that an environment describes, and where its numbers came from, in words.

    Raises ValueError naming the variable or file, the value and the fix.
    """
    kinds = typing.get_type_hints(SparseKConfig)
    known = [field.name for field in dataclasses.fields(SparseKConfig)]
    settings: dict[str, Any] = {}
    sources = []
    if environment.get(FILE_VARIABLE):
        settings.update(_from_file(environment[FILE_VARIABLE], known))
        sources.append(f"{FILE_VARIABLE}={environment[FILE_VARIABLE]}")
    for variable in sorted(environment):
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise _unknown("environment variable", variable, [PREFIX + n.upper() for n in known])
        settings[name] = _parse(variable, environment[variable], kinds[name])
        sources.append(variable)
    return SparseKConfig(**settings), ", ".join(sources) or "defaults"


@functools.cache
def settings_from_environment() -> tuple[SparseKConfig, str]:
    """`settings_from` this process's environment, read once."""
    return settings_from(os.environ)


def resolve_settings(sparsek: SparseKConfig | None) -> tuple[SparseKConfig, str]:
    """`sparsek`, or the environment's without one, and where it came from in words: "code" unless a spec that was
    given none took it from the environment. The environment is not read where code has given settings.
    """
    read = settings_from_environment.cache_info().currsize > 0
    if sparsek is None or (read and sparsek is settings_from_environment()[0]):
        return settings_from_environment()
    return sparsek, "code"
