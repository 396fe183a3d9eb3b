# SPDX-License-Identifier: Apache-2.0
"""Whether a dataset's `.idx` and `.bin` are whole and of one another: mcore finds out only where it reads, if at all.

The `.idx`, little-endian: magic (9 bytes), version (8), code of the tokens' type (1), number of sequences S (8) and of
document ends D (8); then lengths int32 [S], byte offsets int64 [S] and document ends int64 [D].
"""

import struct
from pathlib import Path

from sparsek_megatron.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # mcore's `DType`
_AGAIN = "copy it again, or prepare the data again"


def require_whole(flag: str, prefix: str) -> None:
    """Raise `UserError` where a file of the dataset at `prefix` is cut short, or where the two are of different data.

    Reads the header and the last entries alone, so that it costs nothing for an index of any length.
    """
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    told = _bytes_of_tokens(flag, index)
    held = data.stat().st_size
    if held < told:
        raise UserError(f"{flag} {data}: cut short, {held:,} bytes of the {told:,} that its .idx tells of; {_AGAIN}")
    if held > told:
        raise UserError(
            f"{flag} {data}: has {held:,} bytes and its .idx tells of {told:,}, so they are not of the same data; "
            "copy both again, or prepare the data again"
        )
    if not told:
        raise UserError(f"{flag} {prefix}: the dataset is empty, it holds no tokens; prepare it from text that is not")


def _bytes_of_tokens(flag: str, index: Path) -> int:
    """The size of the `.bin` that belongs to the file `index`."""
    held = index.stat().st_size
    with open(index, "rb") as stream:
        header = stream.read(_HEADER.size)
        if not header.startswith(_MAGIC[: len(header)]):
            raise UserError(f"{flag} {index}: not an index of Megatron's (MMIDIDX); {_AGAIN}")
        if len(header) < _HEADER.size:
            raise UserError(f"{flag} {index}: cut short within its header, at {held:,} bytes; {_AGAIN}")
        _, version, code, sequences, ends = _HEADER.unpack(header)
        if version != 1 or code not in _TOKEN_BYTES or not ends:
            raise UserError(f"{flag} {index}: damaged, or of another version of the format; {_AGAIN}")
        told = _HEADER.size + (4 + 8) * sequences + 8 * ends
        if held < told:
            raise UserError(f"{flag} {index}: cut short, {held:,} bytes of {told:,}; {_AGAIN}")

        def last(form: str, end: int) -> int:
            stream.seek(end - struct.calcsize(form))
            return struct.unpack(form, stream.read(struct.calcsize(form)))[0]

        if last("<q", told) != sequences:
            raise UserError(f"{flag} {index}: damaged, its documents end elsewhere than its sequences; {_AGAIN}")
        if not sequences:
            return 0
        offset = last("<q", told - 8 * ends)
        return offset + _TOKEN_BYTES[code] * last("<i", _HEADER.size + 4 * sequences)
