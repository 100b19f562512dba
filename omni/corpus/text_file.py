"""Read the text files of corpora: UTF-8 with or without a byte order mark, one record per line.

Lines end at \\n or \\r\\n alone: other characters that Unicode counts as line breaks, such as
U+2028, are part of the text.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from omni.errors import ManifestError
from omni.storage.path import StoragePath

_BLANK = " \t\r\n\f\v"
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@contextlib.contextmanager
def open_lines(path: StoragePath) -> Iterator[IO[bytes]]:
    """Open a text file as bytes, decompressed where its name ends in .gz."""
    with path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield file


def decode_text(position: str, data: bytes) -> str:
    """Decode UTF-8, without a byte order mark. Raises ManifestError that begins with `position`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        other = _OTHER_MARKS.get(data[:2])
        found = f"{other} text" if other else f"byte 0x{error.object[error.start]:02x}"
        raise ManifestError(f"{position}: expected UTF-8 text, found {found}") from None


def text_lines(
    path: StoragePath, lines: Iterable[bytes], first: int = 1
) -> Iterator[tuple[str, str]]:
    """Yield position (FILE:LINE) and text of each line that is not blank, without its end.

    A mark at the start of any line is dropped: files with one are often concatenated. first: number
    of the first line. Raises ManifestError.
    """
    for number, line in enumerate(lines, start=first):
        position = f"{path}:{number}"
        if (text := decode_text(position, line)).strip(_BLANK):
            yield position, text.rstrip("\r\n")


def json_lines(
    path: StoragePath, lines: Iterable[bytes], first: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position (FILE:LINE) and object of each line but blank ones. Raises ManifestError."""
    for position, line in text_lines(path, lines, first):
        yield position, json_object(position, line)


def json_object(position: str, text: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ManifestError that begins with `position`."""
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{position}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ManifestError(f"{position}: expected an object, got {text[:40]!r}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields. Raises ValueError for a name that occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} occurs twice")
    return made
