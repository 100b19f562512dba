"""One reader for all text files of corpora: marks, encodings, line ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni.augment.noise import read_clips
from omni.corpus.index import build_index
from omni.corpus.sources import Options, open_source
from omni.errors import ManifestError

MARK = b"\xef\xbb\xbf"
TEXTS = ["a\u2028b", "c\u00a0d", "e\u3000f", "g\x85h"]  # str.splitlines and str.split cut these
Write = Callable[[Path, list[bytes]], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(len(TEXTS)):
        soundfile.write(tmp_path / f"{number}.wav", np.full(1600, 0.1), 16_000)
    return tmp_path


def _jsonl(folder: Path, texts: list[bytes]) -> str:
    lines = [b'{"audio": "%d.wav", "text": "%s"}\n' % (n, t) for n, t in enumerate(texts)]
    (folder / "m.jsonl").write_bytes(b"".join(MARK + line for line in lines))
    return str(folder / "m.jsonl")


def _csv(folder: Path, texts: list[bytes]) -> str:
    lines = [b"audio,text\n"] + [b"%d.wav,%s\r\n" % (n, t) for n, t in enumerate(texts)]
    (folder / "m.csv").write_bytes(b"".join(MARK + line for line in lines))
    return str(folder / "m.csv")


def _tsv(folder: Path, texts: list[bytes]) -> str:
    lines = [b"audio\ttext\n"] + [b"%d.wav\t%s\n" % (n, t) for n, t in enumerate(texts)]
    (folder / "m.tsv").write_bytes(b"".join(MARK + line for line in lines))
    return str(folder / "m.tsv")


def _kaldi(folder: Path, texts: list[bytes]) -> str:
    numbered = list(enumerate(texts))
    (folder / "wav.scp").write_bytes(b"".join(MARK + b"u%d %d.wav\n" % (n, n) for n, _ in numbered))
    (folder / "text").write_bytes(b"".join(MARK + b"u%d %s\n" % (n, t) for n, t in numbered))
    return f"kaldi:{folder}"


def _folder(folder: Path, texts: list[bytes]) -> str:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(MARK + text)
    return f"folder:{folder}"


SHAPES: dict[str, Write] = {
    "jsonl": _jsonl, "csv": _csv, "tsv": _tsv, "kaldi": _kaldi, "folder": _folder,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows_per_part", [1, 1000])
def test_marks_and_unusual_line_breaks(shape: str, rows_per_part: int, folder: Path) -> None:
    source = open_source(
        SHAPES[shape](folder, [text.encode() for text in TEXTS]),
        Options(rows_per_part=rows_per_part),
    )
    rows = [row for part in source.parts() for row in source.read(part)]
    assert [(row.text, row.error) for row in rows] == [(text, None) for text in TEXTS]
    assert [row.uri for row in rows] == [str(folder / f"{n}.wav") for n in range(len(TEXTS))]


@pytest.mark.parametrize("shape", ["jsonl", "csv", "tsv", "kaldi"])
def test_text_that_is_not_utf8_names_file_and_line(shape: str, folder: Path) -> None:
    with pytest.raises(ManifestError, match=r"/(m\.\wsv|m\.jsonl|text):[23]: .*UTF-8.*0xfc"):
        source = open_source(SHAPES[shape](folder, [b"one", "zw\xfclf".encode("latin-1")]))
        list(source.read(source.parts()[0]))


def test_utf16_is_named(folder: Path) -> None:
    path = Path(_jsonl(folder, [b"one"]))
    path.write_bytes(path.read_bytes().decode("utf-8-sig").encode("utf-16"))
    for read in (lambda: build_index([str(path)]), lambda: read_clips([str(path)], "noise")):
        with pytest.raises(ManifestError, match=r"m\.jsonl:1: .*UTF-16"):
            read()


def test_noise_manifests_are_read_alike(folder: Path) -> None:
    path = _jsonl(folder, [text.encode() for text in TEXTS])
    assert [clip.uri for clip in read_clips([path], "noise").clips] == [
        str(folder / f"{n}.wav") for n in range(len(TEXTS))
    ]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("m.jsonl", '{"audio": "0.wav", "text": "a", "text": "b"}', r"m\.jsonl:1: .*'text'.*twice"),
        ("m.csv", "audio,text,text\n0.wav,a,b\n", r"m\.csv:1: .*'text'.*twice"),
    ],
)
def test_a_field_twice_is_refused(name: str, text: str, named: str, folder: Path) -> None:
    (folder / name).write_text(text)
    source = open_source(str(folder / name))
    with pytest.raises(ManifestError, match=named):
        list(source.read(source.parts()[0]))


def test_an_utterance_twice_in_a_table_of_kaldi_is_refused(folder: Path) -> None:
    source = open_source(_kaldi(folder, [b"one", b"two"]))
    with (folder / "text").open("a") as file:
        file.write("u1 three\n")
    with pytest.raises(ManifestError, match=r"text:3: .*'u1'.*twice"):
        list(source.read(source.parts()[0]))


def test_the_reader_of_json_lines_keeps_what_json_has(folder: Path) -> None:
    row = {"audio": "0.wav", "text": "tab\tand \u2028 and \\n", "id": 7}
    (folder / "m.jsonl").write_text("\n" + json.dumps(row, ensure_ascii=False) + "\r\n\n")
    table = build_index([str(folder / "m.jsonl")]).table
    assert (table["text"][0].as_py(), table["id"][0].as_py()) == (row["text"], "7")
