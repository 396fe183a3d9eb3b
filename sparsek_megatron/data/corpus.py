# SPDX-License-Identifier: Apache-2.0
"""Documents from text files, folders and JSON lines, and the corpus that every machine has."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsek_megatron.errors import UserError

# Left out of the standard-library corpus: tests (some are invalid UTF-8 on purpose), installed packages,
# character tables and generated documentation, which are not program text.
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """One text, and a name for it that does not depend on where the corpus lies on this machine."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """A file to read: `path` on disk, `name` relative to the input that the user gave."""

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        return self.path.suffix == ".jsonl"


def find_sources(inputs: Iterable[str], *, include: str = "*") -> list[Source]:
    """Files behind `--input`: each a text file, a `.jsonl` file, or a folder searched for `include`.

    Hidden files and folders are left out. Sorted by name, so that the order does not depend on the disk.

    Raises:
        UserError: an input does not exist, or there is no non-empty file at all.
    """
    inputs = list(inputs)
    found: list[Source] = []
    for given in inputs:
        root = Path(given)
        if root.is_file():
            found.append(Source(root, root.name))
        elif root.is_dir():
            inside = (p for p in root.rglob(include) if p.is_file())
            for path in inside:
                relative = path.relative_to(root)
                if not any(part.startswith(".") for part in relative.parts):
                    found.append(Source(path, relative.as_posix()))
        else:
            raise UserError(f"--input {given}: no such file or folder; check the path")
    sources = sorted((s for s in found if s.path.stat().st_size > 0), key=lambda s: s.name)
    if not sources:
        hint = f" matching --include {include!r}" if include != "*" else ""
        raise UserError(f"--input {' '.join(inputs)}: no non-empty file{hint} found; give a folder or file with text")
    return sources


def stdlib_sources() -> list[Source]:
    """The Python standard library's own sources on this machine: real text, no download."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _STDLIB_LEFT_OUT & set(relative.parts) and path.stat().st_size > 0:
            sources.append(Source(path, relative.as_posix()))
    if not sources:
        raise UserError(f"--python-stdlib: no sources under {root}; give text of your own with --input")
    return sources


def read_text(source: Source) -> str:
    """The file's text exactly: no newline translation.

    Raises:
        UserError: the file is not UTF-8, naming the file and the first bad byte.
    """
    try:
        return source.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as err:
        raise UserError(
            f"--input {source.path}: not UTF-8 at byte {err.start}; convert the file (iconv -t UTF-8) "
            "or leave it out with --include"
        ) from None


def read_documents(sources: Iterable[Source], *, json_key: str = "text") -> Iterator[Document]:
    """Documents of every source: a text file is one document, a `.jsonl` line is one document.

    Raises:
        UserError: a file that is not UTF-8; a JSON line that does not parse, is not an object, or lacks
            `json_key` as a string of whole characters (with file and line number).
    """
    for source in sources:
        if not source.is_jsonl:
            yield Document(source.name, read_text(source))
            continue
        with open(source.path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    text = _json_text(source, number, raw, json_key)
                    if text:
                        yield Document(f"{source.name}:{number}", text)


def _json_text(source: Source, number: int, raw: bytes, json_key: str) -> str:
    where = f"--input {source.path}, line {number}"
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise UserError(f"{where}: not UTF-8 at byte {err.start} of the line; convert the file") from None
    except json.JSONDecodeError as err:
        raise UserError(f"{where}: not valid JSON ({err.msg} at column {err.colno}); mend or remove the line") from None
    except (ValueError, RecursionError) as err:  # an integer of too many digits for Python, or too deep a nesting
        reason = str(err).partition(";")[0]
        raise UserError(f"{where}: not valid JSON for this program ({reason}); mend or remove the line") from None
    if not isinstance(record, dict) or json_key not in record:
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else f"a {type(record).__name__}, not an object"
        raise UserError(f"{where}: no key {json_key!r} (found: {keys}); name the text's key with --json-keys")
    if not isinstance(record[json_key], str):
        raise UserError(f"{where}: key {json_key!r} holds {type(record[json_key]).__name__}; it must hold a string")
    text = record[json_key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise UserError(
            f"{where}: key {json_key!r} holds half of a surrogate pair ({text[err.start]!a}), which is no character; "
            "mend or remove the line"
        ) from None
    return text


def is_validation(name: str, fraction: float) -> bool:
    """Whether the document called `name` belongs to the validation split: a hash, so the split never moves."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
