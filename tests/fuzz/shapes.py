"""Corpora with faults that people report: names, marks, encodings, incomplete and double rows."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from omni.corpus.other_files import NOT_A_RECORDING
from omni.corpus.sources import Options, Row, open_source
from omni.errors import ManifestError

_MARK = b"\xef\xbb\xbf"
_TEXTS = [
    b"plain", _MARK + b"marked", "a\u2028b \u00a0\u3000c".encode(), "Grüße".encode(), b"  padded ",
]  # fmt: skip
_BAD_TEXTS = ["Grüße".encode("latin-1"), "a".encode("utf-16"), b"nul\0", b"\xff"]
_OTHERS = ["README", "LICENSE.txt", ".DS_Store", "cover.jpg", "._u0.wav", "._u0.txt"]
_ENDINGS = ["wav", "WAV", "wave", "oga", "xyz"]


@dataclass
class _Utterance:
    name: str
    text: bytes | None
    ending: str | None  # of its recording; None: there is none


def corpus(folder: Path, rng: random.Random) -> str:
    """Every utterance of a tar, folder or table is a row with its own text, a reject, or named."""
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    home = folder / "corpus"
    home.mkdir()
    utterances = [_utterance(n, rng) for n in range(6)]
    write = rng.choice([_tar, _folder, _kaldi, _csv])
    spec, twice = write(home, utterances, rng)
    try:
        source = open_source(spec, Options(rows_per_part=rng.choice([1, 2, 1000])))
        rows = [row for part in source.parts() for row in source.read(part)]
    except ManifestError as error:
        assert str(home) in str(error)
        return "refused"
    assert not twice, "a key that occurs twice was taken"
    rows = [row for row in rows if row.error is None or row.error[0] != NOT_A_RECORDING]
    assert len(rows) == len(utterances), f"{len(rows)} rows of {utterances}"
    for utterance, row in zip(sorted(utterances, key=_shown), sorted(rows, key=_id), strict=True):
        if row.error is None:
            own_file = write in (_tar, _folder)
            assert utterance.ending is not None and not (own_file and utterance.text is None)
            # Inside a line, a mark is a character like others; no text there is an empty one.
            text = (utterance.text or b"").decode("utf-8-sig" if own_file else "utf-8")
            assert row.text == text.strip(), row
    return "rejected" if any(row.error for row in rows) else "accepted"


def _utterance(number: int, rng: random.Random) -> _Utterance:
    faulty = rng.random() < 0.15
    text = rng.choice(_BAD_TEXTS if faulty else _TEXTS)
    made = _Utterance(f"u{number}", text, rng.choice(_ENDINGS))
    if rng.random() < 0.05:
        made.text = None
        # Without a text, a file with an unknown ending is no utterance.
        made.ending = "wav"
    elif rng.random() < 0.05:
        made.ending = None
    if rng.random() < 0.05:
        made.name += "\udcff"
    return made


def _shown(utterance: _Utterance) -> str:
    return utterance.name.replace("\udcff", r"\xff")


def _id(row: Row) -> str:
    return row.id


def _sound() -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.sin(np.arange(1600)), 16_000, format="WAV")
    return data.getvalue()


def _files(utterances: list[_Utterance], rng: random.Random) -> list[tuple[str, bytes]]:
    files: list[tuple[str, bytes]] = []
    for utterance in utterances:
        if utterance.ending is not None:
            files.append((f"{utterance.name}.{utterance.ending}", _sound()))
        if utterance.text is not None:
            files.append((f"{utterance.name}.txt", utterance.text))
    return files + [(name, b"\0\5\x16\7") for name in rng.sample(_OTHERS, rng.randint(0, 3))]


def _tar(home: Path, utterances: list[_Utterance], rng: random.Random) -> tuple[str, bool]:
    files = _files(utterances, rng)
    if twice := rng.random() < 0.15:
        files.append(next(file for file in files if file[0].startswith("u")))
    with tarfile.open(home / "x.tar", "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(home / "x.tar"), twice


def _folder(home: Path, utterances: list[_Utterance], rng: random.Random) -> tuple[str, bool]:
    for name, data in _files(utterances, rng):
        with open(os.path.join(home, name), "wb") as file:
            file.write(data)
    if rng.random() < 0.3:
        os.symlink(rng.choice(["..", ".", "nowhere.wav"]), home / "link.wav")
    return f"folder:{home}", False


def _kaldi(home: Path, utterances: list[_Utterance], rng: random.Random) -> tuple[str, bool]:
    mark, end = rng.choice([b"", _MARK]), rng.choice([b"\n", b"\r\n"])
    for utterance in utterances:
        utterance.ending = "wav"
    names = [os.fsencode(utterance.name) for utterance in utterances]
    lines = [n + b" " + (u.text or b"") + end for n, u in zip(names, utterances, strict=True)]
    if twice := rng.random() < 0.15:
        lines.append(lines[0])
    (home / "text").write_bytes(mark + b"".join(lines))
    (home / "wav.scp").write_bytes(mark + b"".join(n + b" a.wav" + end for n in names))
    return f"kaldi:{home}", twice


def _csv(home: Path, utterances: list[_Utterance], rng: random.Random) -> tuple[str, bool]:
    mark, end = rng.choice([b"", _MARK]), rng.choice([b"\n", b"\r\n"])
    for utterance in utterances:
        utterance.ending = "wav"
    lines = [b"id,audio,text"]
    lines += [os.fsencode(u.name) + b",a.wav," + (u.text or b"") for u in utterances]
    if twice := rng.random() < 0.15:
        lines[0] = b"id,text,text"
    (home / "x.csv").write_bytes(mark + end.join(lines) + end)
    return str(home / "x.csv"), twice
