"""Read Kaldi data folders: wav.scp, text, and optional segments, utt2spk, utt2lang."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator
from dataclasses import replace

from omni.audio.container import streamed_wav_length
from omni.corpus.audio_paths import AddressError
from omni.corpus.labels import labels_json
from omni.corpus.manifest import check_row
from omni.corpus.sources.base import (
    Options,
    Part,
    Row,
    file_fingerprint,
    fingerprint_of,
    resolve_audio,
)
from omni.corpus.sources.jsonl_csv import cut, read_bytes
from omni.corpus.text_file import text_lines
from omni.errors import ManifestError
from omni.storage.path import StoragePath, literal_path, raise_if_unreachable

_SPACE = r"[ \t\f\v\r]+"
_BESIDE = ("wav.scp", "text", "utt2spk", "utt2lang", "utt2dur")


class KaldiSource:
    """A data folder; a part is some lines of segments, or of wav.scp.

    Recordings are files, or WAV files inside an ark (`file.ark:OFFSET`). Commands are not run.
    """

    def __init__(self, spec: str, folder: StoragePath, options: Options) -> None:
        self.spec, self.folder, self.options = spec, folder, options
        self.segments = (folder / "segments").is_file()
        self.list = folder / ("segments" if self.segments else "wav.scp")

    def parts(self) -> list[Part]:
        if not self.options.segment and not (self.folder / "text").is_file():
            raise ManifestError(f"{self.folder}: expected a file `text` beside {self.list.name}")
        files = [self.folder / name for name in (*_BESIDE, *map(_label_file, self.options.keep))]
        mark = [file_fingerprint(file) for file in files if file.is_file() and file != self.list]
        parts = cut(self.list, self.options.rows_per_part)
        return [replace(part, fingerprint=fingerprint_of(part.fingerprint, mark)) for part in parts]

    def read(self, part: Part) -> Iterator[Row]:
        raw = io.BytesIO(read_bytes(self.list, part))
        lines = [
            (position, _fields(line, 4 if self.segments else 2))
            for position, line in text_lines(self.list, raw, part.where[2])
        ]
        ids = {fields[0] for _, fields in lines}
        texts, speakers, languages = (
            self._look_up(name, ids) for name in ("text", "utt2spk", "utt2lang")
        )
        labels = {name: self._look_up(_label_file(name), ids) for name in self.options.keep}
        lengths = {} if self.segments else self._look_up("utt2dur", ids)
        named = {fields[1] for _, fields in lines} if self.segments else set()
        scp = self._look_up("wav.scp", named)
        for position, fields in lines:
            name = fields[0]
            recording = scp.get(fields[1]) if self.segments else fields[1]
            if recording is None:
                raise ManifestError(f"{position}: no recording {fields[1]!r} in wav.scp")
            start, end = self._times(position, fields)
            row = Row(
                id=name,
                text=texts.get(name, "").strip(),
                start=start,
                duration=None if end is None else end - start,
                stated_duration=_seconds(f"{self.folder}/utt2dur: {name}", lengths.get(name)),
                speaker=speakers.get(name),
                language=languages.get(name, self.options.language),
                labels=labels_json(
                    position, tuple((label, of[name]) for label, of in labels.items() if name in of)
                ),
            )
            named_row = {"id": name, "text": row.text, "speaker": row.speaker}
            check_row(position, {**named_row, "audio": recording})
            yield self._placed(position, row, recording, scp if self.segments else ids)

    def _look_up(self, file: str, keys: set[str]) -> dict[str, str]:
        """Read the lines of the given keys only: the file is as long as the corpus."""
        path, found = self.folder / file, {}
        if not keys or not path.is_file():
            return {}
        with path.open("rb") as lines:
            for position, line in text_lines(path, lines):
                name, *value = _fields(line, 2)
                if name in found:
                    raise ManifestError(f"{position}: {name!r} occurs twice")
                if name in keys:
                    found[name] = value[0] if value else ""
        return found

    def _times(self, position: str, fields: list[str]) -> tuple[float, float | None]:
        if not self.segments:
            return 0.0, None
        try:
            start, end = float(fields[2]), float(fields[3])
        except (ValueError, IndexError):
            raise ManifestError(f"{position}: expected UTTERANCE RECORDING START END") from None
        if end == -1:  # In Kaldi -1 means to the end of the recording.
            return start, None
        if not 0 <= start < end < 1e8:
            raise ManifestError(f"{position}: expected 0 <= START < END in seconds")
        return start, end

    def _placed(self, position: str, row: Row, recording: str, keys: Collection[str]) -> Row:
        """Add the location of the recording to a row. keys: names of recordings of this part."""
        if recording.endswith("|") or recording.startswith("|"):
            raise ManifestError(
                f"{position}: {recording[:60]!r} is a command, and omni runs none: convert the "
                "recordings first, e.g. with wav-copy scp:wav.scp ark,scp:wav.ark,new.scp"
            )
        if recording.endswith("]"):
            raise ManifestError(f"{position}: {recording[-60:]!r}: ranges are not supported")
        ark = re.fullmatch(r"(.+):(\d+)", recording)
        name, offset = (ark[1], int(ark[2])) if ark else (recording, None)
        if self.options.audio_folder:
            name = f"{self.options.audio_folder}/{name}"
        try:
            path = resolve_audio(position, self.folder, name, self.options)
        except AddressError as error:
            return replace(row, error=("address", f"{position}: {error}"))
        if offset is None:
            return replace(row, uri=path)
        ark_file = literal_path(path)
        try:
            with ark_file.open("rb") as file:
                total = file.seek(0, io.SEEK_END)
                file.seek(offset)
                head = file.read(12)
                streamed = (
                    streamed_wav_length(file, offset, total, keys) if head[:4] == b"RIFF" else None
                )
        except OSError as error:
            raise_if_unreachable(ark_file, error)
            return replace(row, uri=path, error=("missing", f"{path}: {error.strerror}"))
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            detail = f"{path}: no WAV file at byte {offset}"
            return replace(row, uri=path, error=("unreadable", detail))
        said = int.from_bytes(head[4:8], "little") + 8 if streamed is None else streamed
        length = min(said, total - offset)
        return replace(row, uri=path, offset=offset, length=length)


def _label_file(name: str) -> str:
    """Name the file of a label, as Kaldi names utt2spk."""
    return f"utt2{name}"


def _seconds(position: str, value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        raise ManifestError(f"{position}: expected seconds, got {value!r}") from None


def _fields(line: str, count: int) -> list[str]:
    """Split a line at ASCII white space, as Kaldi does: `count` words, the last with the rest."""
    return re.split(_SPACE, line.strip(" \t\f\v\r"), maxsplit=count - 1)
