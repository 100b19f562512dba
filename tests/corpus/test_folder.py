"""Folders of recordings: every file is a row, a reject or counted."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni.corpus.build_part import write_part
from omni.corpus.built_index import finish
from omni.corpus.index import build_index
from omni.corpus.other_files import NOT_A_RECORDING
from omni.corpus.sources import Options, Row, open_source
from omni.errors import ManifestError


def _sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(3200)), 16_000, format="WAV")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    _sound(path / "good.wav")
    (path / "good.txt").write_text("a")
    return path


def _rows(folder: Path) -> list[Row]:
    source = open_source(f"folder:{folder}")
    return [row for part in source.parts() for row in source.read(part)]


def _reasons(folder: Path) -> dict[str, str]:
    return {row.id: row.error[0] for row in _rows(folder) if row.error}


def test_every_ending_with_a_text_is_a_row(folder: Path) -> None:
    endings = ["m4a", "webm", "oga", "sph", "aac", "WMA", "xyz"]
    for ending in endings:
        (folder / f"{ending}.{ending}").write_bytes(b"x")
        (folder / f"{ending}.txt").write_text("a")
    assert {Path(row.uri).name for row in _rows(folder) if not row.error} == {
        "good.wav", *(f"{ending}.{ending}" for ending in endings)
    }  # fmt: skip


def test_what_is_incomplete_is_a_reject(folder: Path) -> None:
    _sound(folder / "silent" / "no-text.wav")
    (folder / "no-audio.txt").write_text("a")
    for name, text in (("latin", "é".encode("latin-1")), ("utf16", "a".encode("utf-16"))):
        _sound(folder / f"{name}.wav")
        (folder / f"{name}.txt").write_bytes(text)
    _sound(folder / "null.wav")
    (folder / "null.txt").write_bytes(b"a\0b")
    assert _reasons(folder) == {
        "silent/no-text": "no text", "no-audio": "no audio", "latin": "unreadable text",
        "utf16": "unreadable text", "null": "unreadable text",
    }  # fmt: skip


def test_texts_in_capitals_belong_to_their_recordings(folder: Path) -> None:
    _sound(folder / "UP.WAV")
    (folder / "UP.TXT").write_text("b")
    assert [(row.id, row.text) for row in _rows(folder)] == [("UP", "b"), ("good", "a")]


def test_annotations_beside_recordings_are_not_told_of(folder: Path) -> None:
    for ending in ("TextGrid", "json", "lab"):
        (folder / f"good.{ending}").write_text("a")
    assert [row.id for row in _rows(folder)] == ["good"]


def test_files_without_an_utterance_are_counted_apart(folder: Path, tmp_path: Path) -> None:
    names = ["README.txt", "LICENSE", "a.pdf", "b.pdf", "._good.wav", "._good.txt", ".DS_Store"]
    for name in names:
        (folder / name).write_bytes(b"\xff")
    source = open_source(f"folder:{folder}")
    tasks = [(source, part) for part in source.parts()]
    for task in tasks:
        write_part(*task, Options(), tmp_path / "out")
    done = finish(tasks, tmp_path / "out")
    assert (done["utterances"], set(done["rejects"])) == (1, {NOT_A_RECORDING})
    index = build_index([str(tmp_path / "out")])
    assert len(index) == 1 and index.rejects == []
    [note] = index.notes
    assert "2 files, such as a.pdf" in note and "._*" in note


@pytest.mark.parametrize("target", ["..", ".", "../clips"])
def test_links_to_a_folder_above_are_not_followed(folder: Path, target: str) -> None:
    os.symlink(target, folder / "above")
    os.symlink("missing.wav", folder / "dangling.wav")
    os.symlink("loop.wav", folder / "loop.wav")
    assert _reasons(folder) == {
        "links to nothing": NOT_A_RECORDING, "links to folders read once": NOT_A_RECORDING
    }  # fmt: skip
    assert [row.id for row in _rows(folder) if row.error is None] == ["good"]


def test_folders_that_link_to_each_other_are_read_once(folder: Path, tmp_path: Path) -> None:
    """Followed without end, two folders of this kind alone have 2^40 names."""
    for name, other in (("a", "b"), ("b", "a")):
        _sound(folder / name / f"{name}.wav")
        (folder / name / f"{name}.txt").write_text(name)
        for number in range(3):
            os.symlink(f"../{other}", folder / name / f"l{number}")
    outside = tmp_path / "outside"
    _sound(outside / "inner" / "c.wav")
    (outside / "inner" / "c.txt").write_text("c")
    os.symlink(folder, outside / "back")
    os.symlink("back/nothing", outside / "gone")
    os.symlink(outside, folder / "out")
    os.symlink(outside / "inner", folder / "into")
    rows = _rows(folder)
    assert sorted(row.text for row in rows if row.error is None) == ["a", "a", "b", "c"]
    assert {row.id for row in rows if row.error is None} >= {"good", "a/a", "b/b"}
    said = {row.id: row.error[1] for row in rows if row.error}
    assert said == {
        "links to nothing": "1, such as out/gone",
        "links to folders read once": "7, such as a/l0",
    }


def test_a_link_to_another_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    _sound(tmp_path / "elsewhere" / "b.wav")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    os.symlink(tmp_path / "elsewhere", folder / "more")
    assert [row.id for row in _rows(folder)] == ["good", "more/b"]


def test_names_that_are_not_utf8(folder: Path) -> None:
    name = os.fsencode(folder) + b"/\xff"
    for ending in (b".wav", b".txt"):
        with open(name + ending, "wb") as file:
            file.write(b"x")
    assert _reasons(folder) == {r"\xff": "file name"}
    os.mkdir(name)
    with pytest.raises(ManifestError, match=r"clips/\\xff: .*UTF-8"):
        open_source("folder:" + os.fsdecode(name))


def test_a_folder_that_cannot_be_listed_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sound(folder / "locked" / "a.wav")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ManifestError, match="clips/locked: Permission denied"):
        _rows(folder)


def test_shards_of_macos_beside_real_ones_are_counted(tmp_path: Path, folder: Path) -> None:
    import tarfile

    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        tar.add(folder / "good.wav", "u.wav")
        tar.add(folder / "good.txt", "u.txt")
    (tmp_path / "shards" / "._a.tar").write_bytes(b"\0\5\x16\7")
    source = open_source(f"wds:{tmp_path}/shards")
    rows = [row for part in source.parts() for row in source.read(part)]
    assert Counter(row.error and row.error[0] for row in rows) == {None: 1, NOT_A_RECORDING: 1}
