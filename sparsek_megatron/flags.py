# SPDX-License-Identifier: Apache-2.0
"""Command-line parsing whose mistakes end in one line: argparse, with the closest flag suggested."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from sparsek_megatron.errors import UserError


def closest(unknown: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known name, or a pointer to the list."""
    matches = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else "see --help for the list"


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, takes no abbreviations and suggests the closest flag."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    @property
    def flag_names(self) -> list[str]:
        """Every long flag."""
        return [o for action in self._actions for o in action.option_strings if o.startswith("--")]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            if name.startswith("-"):
                raise UserError(f"{name}: unknown flag; {closest(name, self.flag_names)}")
            raise UserError(f"{unknown[0]!r}: unexpected word on the command line; flags start with --")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].lower()}{message[1:]}".removeprefix("argument "))
