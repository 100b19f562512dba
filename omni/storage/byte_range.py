"""Ranges of files and of objects as files of their own, which are read where they are needed."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, BinaryIO


class _Range(io.RawIOBase):
    """Subclasses say how bytes are fetched."""

    def __init__(self, length: int) -> None:
        self._length, self._place = length, 0

    @abstractmethod
    def _fetch(self, count: int, place: int) -> bytes: ...

    @property
    def size(self) -> int:
        """Bytes of the range."""
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = min(len(view), max(0, self._length - self._place))
        data = self._fetch(count, self._place)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


class ByteRange(_Range):
    """`length` bytes of a file from `offset` on, or those that are there."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._first = offset
        super().__init__(min(length, max(0, os.fstat(self._file.fileno()).st_size - offset)))

    def _fetch(self, count: int, place: int) -> bytes:
        return os.pread(self._file.fileno(), count, self._first + place)

    def close(self) -> None:
        self._file.close()
        super().close()


class ObjectRange(_Range):
    """`length` bytes of an open object of pyarrow's from `offset` on.

    known: bytes of the range that are here already, by their place in it. failed: why a request
    got nothing.
    """

    def __init__(
        self, file: Any, offset: int, length: int, known: Mapping[int, bytes] | None = None
    ) -> None:
        self._file, self._first, self._known = file, offset, known or {}
        self.failed: OSError | None = None
        super().__init__(length)

    def _fetch(self, count: int, place: int) -> bytes:
        for first, data in self._known.items():
            if first <= place < first + len(data):
                return data[place - first :][:count]
        try:
            return bytes(self._file.read_at(count, self._first + place))
        except OSError as error:
            self.failed = error
            return b""

    def close(self) -> None:
        self._file.close()
        super().close()


class HeadedRange(_Range):
    """`length` bytes of an open file from `offset` on, with `head` before them.

    The file stays open when this is closed.
    """

    def __init__(self, file: BinaryIO, offset: int, length: int, head: bytes = b"") -> None:
        self._file, self._first, self._head = file, offset, head
        super().__init__(len(head) + length)

    def _fetch(self, count: int, place: int) -> bytes:
        if place < len(self._head):
            return self._head[place:][:count]
        self._file.seek(self._first + place - len(self._head))
        return self._file.read(count)


class WatchedReader(io.BufferedReader):
    """Remembers what storage said: libsndfile takes a read that fails for the end of the file."""

    raw: ObjectRange

    @property
    def failed(self) -> OSError | None:
        return self.raw.failed
