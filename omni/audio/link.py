"""Links of a recording, and a window on the bytes of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

MISSING = "parts are missing"
"""Reason for a recording with holes: what follows is not where it belongs."""


@dataclass(frozen=True)
class Link:
    """A range of a file that libsndfile decodes as a file of its own."""

    offset: int
    length: int
    head: bytes = b""
    """Bytes to put before the range: a header with its sizes filled in."""
    samples: int | None = None
    """Samples in it by its frames; `head` is only needed if libsndfile's guess is less."""


@dataclass(frozen=True)
class Layout:
    """Structure of a recording."""

    links: tuple[Link, ...] = ()
    """In order; empty: the whole file, as it is."""
    estimated: bool = False
    """The number of samples in the header is a guess: only decoding tells the length."""
    fault: str = ""
    """Evidence that the file is not whole: reason and detail, on a line each."""
    samples: int = 0
    """Samples of all frames of a file without links; 0: not counted."""


class Window:
    """`size` bytes of a file from `offset` on."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self.file, self.offset, self.size = file, offset, size

    def read(self, at: int, count: int) -> bytes:
        """Read up to `count` bytes from byte `at` of the window on."""
        count = min(count, self.size - at)
        if count <= 0:
            return b""
        self.file.seek(self.offset + at)
        return self.file.read(count)
