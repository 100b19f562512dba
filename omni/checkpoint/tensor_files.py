"""Read and write tensors of a checkpoint, which one file holds whole or several hold by rows.

A file of rows says in the metadata of its header (key `rows`, JSON) which rows of which tensors it
has: name to [first row, rows of the whole]. Tensors that are not listed there are whole.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omni.storage.digest import file_digest
from omni.storage.path import ObjectPath, StoragePath, raise_if_unreachable

_CHUNK = 1 << 23  # Bytes of a request.
_MOST_HEADER = 100_000_000  # Bytes that safetensors allows for a header.


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another kind; the message names file and reason."""


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor, in memory."""

    values: Tensor
    first: int
    """Number of the first one."""
    total: int
    """Rows of the whole tensor."""


def save_tensors(tensors: Mapping[str, Tensor | Rows], path: Path) -> None:
    """Write tensors and rows of tensors to a safetensors file. Raises OSError."""
    rows = {n: [t.first, t.total] for n, t in tensors.items() if isinstance(t, Rows)}
    values = {n: t.values if isinstance(t, Rows) else t for n, t in tensors.items()}
    try:
        save_file(
            {name: value.detach().contiguous().cpu() for name, value in values.items()},
            path,
            {"rows": json.dumps(rows)} if rows else None,
        )
    except SafetensorError as error:
        # The library keeps the errno in its text only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor in a file; end is -1 for a whole tensor."""

    file: int
    first: int
    end: int


class TensorFiles:
    """Read whole tensors, or rows of them, from the files of a checkpoint.

    Objects are downloaded to a temporary file and compared with their checksums, each when the
    first of its tensors is read. A context manager. Raises CheckpointError.

    digests: checksums of the files by name.
    """

    def __init__(self, paths: Sequence[StoragePath], digests: Mapping[str, str]) -> None:
        self._paths, self._digests = paths, digests
        self._stack = ExitStack()
        self._local: dict[int, Path] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each whole tensor."""
        for number, path in enumerate(paths):
            with _read_errors(path):
                self._add(number, _header(path))
        self._require_all_rows()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def whole(self, name: str) -> Tensor:
        """Read a tensor. Raises KeyError."""
        pieces = self._pieces[name]
        parts = [self._read(name, piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Read rows `first` to `end` of a tensor of one or more dimensions. Raises KeyError."""
        pieces = self._pieces[name]
        if pieces[0].end < 0:
            pieces = [_Piece(pieces[0].file, 0, self.shapes[name][0])]
        if first >= end:
            return self._read(name, pieces[0], pieces[0].first, pieces[0].first)
        found = [
            self._read(name, piece, max(first, piece.first), min(end, piece.end))
            for piece in pieces
            if piece.first < end and first < piece.end
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, name: str, piece: _Piece, first: int = 0, end: int = -1) -> Tensor:
        # A file that stays open would keep what was read of it in memory.
        with (
            _read_errors(self._paths[piece.file]),
            safe_open(self._file(piece.file), framework="pt") as file,
        ):
            if end < 0:
                whole: Tensor = file.get_tensor(name)
                return whole
            rows: Tensor = file.get_slice(name)[first - piece.first : end - piece.first]
            return rows

    def _file(self, number: int) -> Path:
        if number not in self._local:
            path = self._paths[number]
            self._local[number] = path if isinstance(path, Path) else self._download(path)
        return self._local[number]

    def _download(self, path: ObjectPath) -> Path:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-checkpoint-"))
        local = Path(folder) / path.name
        with path.open("rb") as source, local.open("wb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
        if file_digest(local, size=16) != self._digests[path.name]:
            raise CheckpointError(f"{path}: damaged (checksum differs)")
        return local

    def _add(self, number: int, header: dict[str, Any]) -> None:
        rows = json.loads((header.pop("__metadata__", None) or {}).get("rows", "{}"))
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            first, total = rows.get(name, (0, -1))
            end = -1
            if name in rows:
                end, shape = first + shape[0], (total, *shape[1:])
            if self.shapes.setdefault(name, shape) != shape:
                raise CheckpointError(
                    f"{self._paths[number]}: {name} is of shape {shape}, in other files "
                    f"{self.shapes[name]}"
                )
            self._pieces.setdefault(name, []).append(_Piece(number, first, end))

    def _require_all_rows(self) -> None:
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.first)
            if pieces[0].end < 0 and len(pieces) == 1:
                continue
            ends = [0, *(piece.end for piece in pieces)]
            starts = [*(piece.first for piece in pieces), self.shapes[name][0]]
            if starts != ends:
                where = self._paths[0].parent
                raise CheckpointError(f"{where}: {name}: its files do not hold each row once")


def _header(path: StoragePath) -> dict[str, Any]:
    """Read the header of a safetensors file: names, shapes and metadata."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MOST_HEADER:
            raise ValueError("expected a safetensors header")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("expected a safetensors header")
    return header


@contextmanager
def _read_errors(path: StoragePath) -> Iterator[None]:
    """Name the file of an error, unless its storage is unavailable."""
    try:
        yield
    except (
        *(OSError, SafetensorError, ValueError),
        *(TypeError, KeyError, AttributeError),  # JSON of another form
    ) as error:
        raise_if_unreachable(path, error)
        raise CheckpointError(f"{path}: damaged ({error})") from None
