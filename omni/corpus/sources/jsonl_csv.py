"""Read JSONL, CSV and TSV manifests, cut into parts at byte offsets."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any, Literal

from omni.corpus.audio_paths import AddressError
from omni.corpus.labels import kept_fields
from omni.corpus.manifest import checked_row, id_of
from omni.corpus.sources.base import Options, Part, Row, explain_missing, manifest_fields
from omni.corpus.text_file import decode_text, json_lines, open_lines
from omni.errors import ManifestError
from omni.storage.digest import digest
from omni.storage.path import StoragePath, raise_if_unreachable

Kind = Literal["jsonl", "csv", "tsv"]
_NUMBERS = ("offset", "duration")
_LARGEST_FIELD = 1 << 24  # characters of a CSV field; Python's own limit is 128 KiB


def cut(path: StoragePath, rows: int, kind: Kind = "jsonl") -> list[Part]:
    """Cut a file into parts of `rows` records; where: (first byte, bytes, first line number).

    A part's fingerprint is that of its bytes: what is appended to a file changes the end only.
    Raises ManifestError.
    """
    parts: list[Part] = []
    if path.suffix == ".gz":
        rows *= 10  # gzip has no random access: every part decompresses all before it.
    try:
        with open_lines(path) as file:
            lines = iter(file)
            position, number = 0, 1
            if kind != "jsonl":
                header = next(_records(path, lines, kind), b"")
                position, number = len(header), 1 + header.count(b"\n")
            records = _records(path, lines, kind, number) if kind != "jsonl" else lines
            while block := list(itertools.islice(records, rows)):
                data = b"".join(block)
                name = f"{path.name}-{len(parts):06}"
                parts.append(Part(name, digest(data), (position, len(data), number)))
                position += len(data)
                number += data.count(b"\n")
    except (OSError, EOFError) as error:
        raise_if_unreachable(path, error)
        raise ManifestError(f"{path}: cannot be read: {error}") from None
    except csv.Error as error:
        raise ManifestError(f"{path}: expected {kind.upper()}: {error}") from None
    return parts


def read_bytes(path: StoragePath, part: Part) -> bytes:
    """Read the bytes of a part made by `cut`."""
    position, length, _ = part.where
    try:
        with open_lines(path) as file:
            file.seek(position)
            return file.read(length)
    except (OSError, EOFError) as error:
        raise_if_unreachable(path, error)
        raise ManifestError(f"{path}: cannot be read: {error}") from None


def json_objects(path: StoragePath, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position (FILE:LINE) and object of each line. Raises ManifestError."""
    return json_lines(path, io.BytesIO(read_bytes(path, part)), part.where[2])


def _records(
    path: StoragePath, lines: Iterator[bytes], kind: Kind, first: int = 1
) -> Iterator[bytes]:
    """Yield CSV records as bytes: one line each, or several where quotes span lines.

    first: number of the first line.
    """
    csv.field_size_limit(_LARGEST_FIELD)
    taken: list[bytes] = []

    def texts() -> Iterator[str]:
        for number, line in enumerate(lines, start=first):
            taken.append(line)
            yield decode_text(f"{path}:{number}", line)

    for _ in csv.reader(texts(), **_dialect(kind)):
        yield b"".join(taken)
        taken.clear()


def _dialect(kind: Kind) -> dict[str, Any]:
    # Quotation marks in TSV files (Common Voice) are part of the text.
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}


class LineSource:
    """A JSONL, CSV or TSV manifest; its recordings' paths are relative to it."""

    def __init__(self, spec: str, path: StoragePath, kind: Kind, options: Options) -> None:
        self.spec, self.path, self.kind, self.options = spec, path, kind, options

    def parts(self) -> list[Part]:
        return cut(self.path, self.options.rows_per_part, self.kind)

    def read(self, part: Part) -> Iterator[Row]:
        rows = json_objects(self.path, part) if self.kind == "jsonl" else self._csv(part)
        for position, fields in rows:
            if "messages" in fields:  # A conversation has its own field names.
                row = {**fields, "labels": kept_fields(fields, self.options.keep)}
            else:
                row = manifest_fields(fields, self.options)
                for name in ("audio", "text"):
                    if name not in row:
                        missing = explain_missing(name, list(fields), self.options)
                        raise ManifestError(f"{position}: {missing}")
            try:
                checked = checked_row(
                    self.path, position, row, allow_absolute=self.options.allow_absolute
                )
            except AddressError as error:
                identity = id_of(self.path, position, row)
                yield Row(id=identity, error=("address", str(error)))
                continue
            yield Row(**checked)

    def _csv(self, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            with open_lines(self.path) as file:
                header = next(_records(self.path, iter(file), self.kind)).decode("utf-8-sig")
            names = next(csv.reader([header], **_dialect(self.kind)))
            if twice := [name for name in names if names.count(name) > 1]:
                raise ManifestError(f"{self.path}:1: the column {twice[0]!r} occurs twice")
            lines = io.BytesIO(read_bytes(self.path, part))
            texts = (
                decode_text(f"{self.path}:{number}", line)
                for number, line in enumerate(lines, start=part.where[2])
            )
            reader = csv.reader(texts, **_dialect(self.kind))
            for values in reader:
                position = f"{self.path}:{part.where[2] + reader.line_num - 1}"
                if not values:
                    continue
                if len(values) != len(names):
                    raise ManifestError(
                        f"{position}: expected {len(names)} columns ({', '.join(names)}), "
                        f"got {len(values)}"
                    )
                yield position, self._typed(position, dict(zip(names, values, strict=True)))
        except csv.Error as error:
            raise ManifestError(f"{self.path}: expected {self.kind.upper()}: {error}") from None

    def _typed(self, position: str, fields: dict[str, str]) -> dict[str, Any]:
        """Convert numbers, and drop empty fields except the text."""
        typed: dict[str, Any] = {}
        own = {self.options.columns.get(name, name): name for name in _NUMBERS}
        texts = manifest_fields(fields, self.options)
        for name, value in fields.items():
            if name in own and value:
                try:
                    typed[name] = float(value)
                except ValueError:
                    raise ManifestError(
                        f"{position}: field {name!r}: expected a number, got {value!r}"
                    ) from None
            else:
                typed[name] = value if value or value is texts.get("text") else None
        return typed
