"""Read cut manifests of lhotse: JSON lines with recording, span and supervisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from omni.corpus.audio_paths import AddressError, shown
from omni.corpus.labels import Kept, kept_fields, labels_json
from omni.corpus.manifest import check_row
from omni.corpus.sources.base import Options, Part, Row, fingerprint_of, resolve_audio
from omni.corpus.sources.jsonl_csv import cut as cut_lines
from omni.corpus.sources.jsonl_csv import json_objects
from omni.errors import ManifestError
from omni.storage.path import StoragePath

_ROUNDING = 1e-3  # seconds


class CutsSource:
    """cuts.jsonl or cuts.jsonl.gz; paths are relative to it. An utterance is a whole cut."""

    def __init__(self, spec: str, path: StoragePath, options: Options) -> None:
        self.spec, self.path, self.options = spec, path, options

    def parts(self) -> list[Part]:
        parts = cut_lines(self.path, self.options.rows_per_part)
        # Older parts may hold means of the channels that sources name: make them again.
        return [replace(p, fingerprint=fingerprint_of(p.fingerprint, "channels")) for p in parts]

    def read(self, part: Part) -> Iterator[Row]:
        for position, cut in json_objects(self.path, part):
            yield self._row(position, cut)

    def _row(self, position: str, cut: dict[str, Any]) -> Row:
        recording = cut.get("recording")
        if not isinstance(recording, dict):
            reason = "it has features only" if "features" in cut else "it has no recording"
            return Row(id=_name(position, cut), error=("no recording", f"{position}: {reason}"))
        sources = recording.get("sources")
        if not isinstance(sources, list) or not all(isinstance(s, dict) for s in sources):
            raise ManifestError(
                f"{position}: field 'recording.sources': expected a list of objects"
            )
        kinds = {str(source.get("type")) for source in sources}
        if len(sources) != 1 or not kinds <= {"file", "url"}:
            what = f"{len(sources)} sources of type {', '.join(sorted(kinds))}"
            return Row(
                id=_name(position, cut),
                error=("no audio file", f"{position}: expected a file, {what}"),
            )
        name = sources[0].get("source")
        if not isinstance(name, str) or not name or "\0" in name:
            raise ManifestError(f"{position}: field 'recording.sources': expected a path, {name!r}")
        if "://" in name and name.partition(":")[0] in ("http", "https"):
            return Row(
                id=_name(position, cut), error=("no audio file", f"{position}: fetch {shown(name)}")
            )
        if self.options.audio_folder:
            name = f"{self.options.audio_folder}/{name}"
        try:
            path = resolve_audio(position, self.path.parent, name, self.options)
        except AddressError as error:
            return Row(id=_name(position, cut), error=("address", f"{position}: {error}"))
        return row_of_cut(position, cut, self.options, (path, None, None))


def row_of_cut(
    position: str, cut: dict[str, Any], options: Options, where: tuple[str, int | None, int | None]
) -> Row:
    """Turn a cut into a row. where: uri, offset, length of its recording. Raises ManifestError."""
    name, recording = _name(position, cut), cut.get("recording") or {}
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        return Row(id=name, error=("mixed cut", f"{position}: expected a MonoCut, got {kind}"))
    if recording.get("transforms"):
        detail = f"{position}: {recording['transforms']!r}: save the transformed audio"[:200]
        return Row(id=name, error=("transformed recording", detail))
    channels = _channels(recording)
    wanted = _as_list(cut["channel"]) if "channel" in cut else channels[:1]
    if channels and set(wanted) != set(channels):
        detail = f"{position}: channel {', '.join(map(str, wanted))} of {channels}"
        return Row(id=name, error=("one channel of several", detail))
    start, duration = cut.get("start", 0.0), cut.get("duration")
    if duration is None:
        raise ManifestError(f"{position}: field 'duration' is missing")
    spoken = [s for s in cut.get("supervisions") or [] if isinstance(s, dict)]
    said = [s.get("text") or "" for s in sorted(spoken, key=lambda s: s.get("start") or 0.0)]
    row = {
        "id": name,
        "audio": where[0],
        "text": " ".join(said).strip() if all(isinstance(t, str) for t in said) else said,
        "offset": start,
        "duration": duration,
        "speaker": _shared(spoken, "speaker"),
        "language": _shared(spoken, "language") or options.language,
    }
    check_row(position, row)
    total = recording.get("duration")
    total = float(total) if isinstance(total, (int, float)) else None
    whole = total is not None and not start and abs(total - duration) < _ROUNDING
    return Row(
        id=name,
        text=row["text"],
        uri=where[0],
        offset=where[1],
        length=where[2],
        start=0.0 if whole else float(start),
        duration=None if whole else float(duration),
        stated_duration=total if whole else None,
        speaker=row["speaker"],
        language=row["language"],
        labels=labels_json(position, _kept(cut, spoken, options)),
    )


def _kept(cut: dict[str, Any], spoken: list[dict[str, Any]], options: Options) -> Kept:
    """Return the kept fields that all supervisions share, or their `custom` or the cut's has."""

    def custom(holder: dict[str, Any]) -> dict[str, Any]:
        return holder["custom"] if isinstance(holder.get("custom"), dict) else {}

    fields = custom(cut)
    for name in options.keep:
        values = [own for s in spoken if (own := {**custom(s), **s}.get(name)) is not None]
        if values and all(value == values[0] for value in values):
            fields = {**fields, name: values[0]}
    return kept_fields(fields, options.keep)


def _channels(recording: dict[str, Any]) -> list[int]:
    """Return the channels of a recording: as in lhotse, those of its sources if none are given."""
    given = recording.get("channel_ids")
    if given is None:
        sources = [s for s in recording.get("sources") or [] if isinstance(s, dict)]
        given = {c for source in sources for c in _as_list(source.get("channels") or [])}
    return sorted(_as_list(given))


def _as_list(channels: Any) -> list[int]:
    items = channels if isinstance(channels, (list, set)) else [channels]
    return [c for c in items if isinstance(c, int)]


def _name(position: str, cut: dict[str, Any]) -> str:
    name = cut.get("id")
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{position}: field 'id': expected a text, got {name!r}")
    return name


def _shared(supervisions: list[dict[str, Any]], field: str) -> str | None:
    """Return the value that all supervisions of a cut share, else None."""
    values = {str(s[field]) for s in supervisions if s.get(field) is not None}
    return values.pop() if len(values) == 1 else None
