"""Open corpora of any supported format as a stream of rows (docs/corpora.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from omni.audio.formats import AUDIO_ENDINGS
from omni.corpus.manifest import absolute, manifest_path
from omni.corpus.sources.base import (
    COLUMNS,
    Options,
    Part,
    Row,
    Source,
    files_of,
    source_of_part,
)
from omni.corpus.sources.folder import FolderSource
from omni.corpus.sources.hub import HubSource, SavedSource, is_saved, split_spec
from omni.corpus.sources.jsonl_csv import LineSource
from omni.corpus.sources.kaldi import KaldiSource
from omni.corpus.sources.lhotse import CutsSource
from omni.corpus.sources.parquet import ParquetSource
from omni.corpus.sources.plug_in import PlugInSource, names_plug_in
from omni.corpus.sources.webdataset import SharSource, TarSource
from omni.corpus.text_file import open_lines
from omni.errors import ManifestError
from omni.storage.path import StoragePath
from omni.storage.uri import public_uri

__all__ = ["COLUMNS", "Options", "Part", "Row", "Source", "open_source", "source_of_part"]

_DEFAULT = Options()
KINDS = ("jsonl", "csv", "tsv", "parquet", "hf", "ms", "wds", "shar", "cuts", "kaldi", "folder")


def open_source(spec: str, options: Options = _DEFAULT) -> Source:
    """Open the corpus that SPEC names: KIND:PATH, or a path whose format can be recognised.

    package.module:Class:NAME is a source of the user's own.

    Raises ManifestError.
    """
    if spec.startswith("embedded:"):
        return LineSource(spec, manifest_path(spec), "jsonl", options)
    kind, colon, name = spec.partition(":")
    if kind not in KINDS and names_plug_in(spec):
        return PlugInSource(public_uri(spec), spec, options)
    if not colon or kind not in KINDS:
        kind, name = _recognise(spec), spec
    spec = public_uri(spec)
    if kind in ("hf", "ms"):
        return _dataset(spec, kind, name, options)
    if kind == "wds":
        return TarSource(spec, files_of(name, (".tar",)), options)
    if kind == "parquet":
        return ParquetSource(spec, files_of(name, (".parquet",)), options)
    path = absolute(name)
    if kind in ("shar", "kaldi", "folder"):
        if not path.is_dir():
            raise ManifestError(f"{spec}: expected a folder")
        if kind == "folder":
            return FolderSource(spec, path, options)
        return (KaldiSource if kind == "kaldi" else SharSource)(spec, path, options)
    if not path.is_file():
        raise ManifestError(f"{spec}: no such file")
    if kind == "cuts":
        return CutsSource(spec, path, options)
    return LineSource(spec, path, kind, options)  # type: ignore[arg-type]


_OF_AN_INDEX = ("parts", "measured")
"""Folders in one that omni index, or omni annotate, has not finished."""


def format_of(spec: str) -> str | None:
    """Return the format of what SPEC names, for messages: a kind, or several; None: unknown."""
    kind, colon, _ = spec.partition(":")
    if colon and kind in KINDS:
        return kind
    path = absolute(spec)
    try:
        unfinished = any((path / name).is_dir() for name in _OF_AN_INDEX)
        if path.is_dir() and not unfinished:
            return " or ".join(_kinds_of_folder(path)) or None
    except OSError:  # Whoever asked knows a better message.
        return None
    if any(mark in path.name for mark in "*?["):
        return "a pattern"
    return None


def _dataset(spec: str, kind: str, name: str, options: Options) -> Source:
    """Open a dataset saved on disk (FOLDER[:SPLIT]), or one of a hub."""
    place, _, split = name.rpartition(":")
    for folder, wanted in ((name, None), (place, split)):
        path = Path(os.path.expanduser(folder)).absolute()
        if folder and path.is_dir() and is_saved(path):
            return SavedSource(spec, path, options, wanted)
    return HubSource(spec, *split_spec(name), options, modelscope=kind == "ms")


def _recognise(spec: str) -> str:
    """Recognise the format of a path. Raises ManifestError where it could be several."""
    path, spec = absolute(spec), public_uri(spec)
    if path.is_dir():
        kinds = list(_kinds_of_folder(path))
        if len(kinds) == 1:
            return kinds[0]
        found = f"could be {' or '.join(kinds)}" if kinds else "holds no corpus that omni knows"
        raise ManifestError(f"{spec}: the folder {found}: put a kind before it ({_choice()})")
    name = path.name.removesuffix(".gz")
    for suffix, kind in (("csv", "csv"), ("tsv", "tsv"), ("parquet", "parquet"), ("tar", "wds")):
        if name.endswith(f".{suffix}"):
            return kind
    if not path.is_file():
        raise ManifestError(f"{spec}: no such file or folder; expected a path or {_choice()}")
    if name.endswith((".jsonl", ".json")):
        return "cuts" if _is_cuts(path) else "jsonl"
    raise ManifestError(f"{spec}: put a kind before it ({_choice()})")


def _choice() -> str:
    return ", ".join(f"{kind}:" for kind in KINDS)


def _kinds_of_folder(path: StoragePath) -> Iterator[str]:
    names = {child.name for child in path.iterdir()}
    if isinstance(path, Path) and is_saved(path):
        yield "hf"
        return
    if "wav.scp" in names:
        yield "kaldi"
        return
    if any(n.startswith("cuts.") for n in names) and any(n.startswith("recording.") for n in names):
        yield "shar"
        return
    suffixes: set[str] = set()
    for files in _names_below(path):
        suffixes |= {name.rpartition(".")[2].lower() for name in files}
        if len(suffixes) > 1000:  # These are not file endings.
            break
    if "tar" in suffixes:
        yield "wds"
    if "parquet" in suffixes:
        yield "parquet"
    if "txt" in suffixes and suffixes & set(AUDIO_ENDINGS):
        yield "folder"


def _names_below(path: StoragePath) -> Iterator[Iterable[str]]:
    if isinstance(path, Path):
        yield from (files for _, _, files in os.walk(path))
    else:
        yield path.files_within()


def _is_cuts(path: StoragePath) -> bool:
    """Check whether the first line is a cut of lhotse."""
    try:
        with open_lines(path) as file:
            row = json.loads(file.readline())
    except (OSError, EOFError, ValueError, RecursionError):
        return False  # The reader reports the error.
    return isinstance(row, dict) and "supervisions" in row and "audio" not in row
