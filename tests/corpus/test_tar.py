"""Tar shards: the utterances of the files they hold, and no way out of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import omni
from jobs import train
from omni.audio.decode import decode
from omni.corpus.index import build_index
from omni.corpus.index_row import span_of
from omni.corpus.manifest import ManifestError

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROWS = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()][:12]

Shard = Callable[..., Path]


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A shard of the given (member, bytes)."""

    def write(*members: tuple[str | tarfile.TarInfo, bytes], name: str = "shard.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                info = _member(member) if isinstance(member, str) else member
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


def _corpus() -> list[tuple[str | tarfile.TarInfo, bytes]]:
    """The rows, half with text files and half with JSON, in folders, with their audio last."""
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [(_member("a", tarfile.DIRTYPE), b"")]
    for number, row in enumerate(ROWS):
        audio = (ASSETS / row["audio"]).read_bytes()
        if number % 2:
            fields = {"text": row["text"], "id": row["id"], "language": "en", "duration": 0.1}
            members.append((f"a/{number:04}.json", json.dumps(fields).encode()))
        else:
            members.append((f"a/{number:04}.txt", row["text"].encode()))
        members.append((f"a/{number:04}{Path(row['audio']).suffix}", audio))
    return members


def test_a_shard_holds_the_utterances_of_its_files(shard: Shard) -> None:
    rows = build_index([str(shard(*_corpus()))]).table.to_pylist()
    files = build_index([str(ASSETS / "train.jsonl")]).table.to_pylist()[: len(ROWS)]
    assert [row["id"] for row in rows] == [
        source["id"] if number % 2 else f"a/{number:04}" for number, source in enumerate(ROWS)
    ]
    for row, file in zip(rows, files, strict=True):
        assert (row["samples"], row["text"]) == (file["samples"], file["text"])
        assert row["key"] == file["key"], "the feature cache should know it by its content"
        audio = decode(row["uri"], span_of(row))
        assert np.array_equal(audio, decode(file["uri"], span_of(file)))


def test_spans_lie_inside_members(shard: Shard, tmp_path: Path) -> None:
    samples = np.linspace(-0.5, 0.5, 32_000, dtype=np.float32)
    wav = io.BytesIO()
    soundfile.write(wav, samples, 16_000, format="WAV", subtype="FLOAT")
    fields = json.dumps({"text": "b", "offset": 0.5, "duration": 0.25}).encode()
    path = shard(("other.txt", b"x"), ("other.wav", wav.getvalue()), ("u.wav", wav.getvalue()))
    with tarfile.open(path, "a") as tar:
        info = _member("u.json")
        info.size = len(fields)
        tar.addfile(info, io.BytesIO(fields))
    row = build_index([str(path)]).table.to_pylist()[1]
    assert row["samples"] == 4_000
    assert np.array_equal(decode(path, span_of(row)), samples[8_000:12_000])


def test_a_recording_cut_short_is_a_reject(shard: Shard) -> None:
    members = _corpus()
    name, data = members[2]
    members[2] = (name, data[:100])
    index = build_index([str(shard(*members))])
    assert [reject.id for reject in index.rejects] == ["a/0000"]
    assert len(index) == len(ROWS) - 1


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.wav", "a/../../b.wav", "/etc/passwd.wav", "..", "a/.."]
)
def test_a_member_that_points_outside_is_refused(shard: Shard, name: str) -> None:
    path = shard(*_corpus(), (name, b"x"))
    with pytest.raises(ManifestError) as caught:
        build_index([str(path)])
    assert str(path) in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(shard: Shard, kind: bytes) -> None:
    path = shard(*_corpus(), (_member("z.wav", kind, "/etc/passwd"), b""))
    with pytest.raises(ManifestError, match=r"'z\.wav'"):
        build_index([str(path)])


def test_the_job_says_so_and_exits_2(
    shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(*_corpus(), ("../../etc/passwd", b"root"))
    arguments = ["--config", "scratch", "--data.train", str(path)]
    arguments += ["--run.storage", str(tmp_path / "runs")]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "'../../etc/passwd'" in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/config.yaml"))


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([("a.wav", b"x")], "no text"),
        ([("a.txt", b"x")], "no audio"),
        ([("a.txt", b"x"), ("a.jpg", b"x"), ("a.cls", b"x")], "no audio"),
        ([("a.txt", b"x"), ("a.wav", b"x"), ("a.flac", b"x")], "several recordings"),
        ([("a.1.wav", b"x"), ("a.1.txt", b"x"), ("a.2.wav", b"x")], "several recordings"),
        ([("a.json", b"[1]"), ("a.wav", b"x")], "unreadable text"),
        ([("a.json", b"{"), ("a.wav", b"x")], "unreadable text"),
        ([("a.json", b'{"text": "a", "text": "b"}'), ("a.wav", b"x")], "unreadable text"),
        ([("a.txt", b"\xff\xfe"), ("a.wav", b"x")], "unreadable text"),
        ([("a.txt", "é".encode("latin-1")), ("a.wav", b"x")], "unreadable text"),
        ([("a.json", b'{"text": 1}'), ("a.wav", b"x")], "wrong field"),
        ([("a.txt", b"x"), ("a.xyz", b"x")], "unreadable"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_reject(
    shard: Shard, members: list[tuple[str, bytes]], named: str
) -> None:
    path = shard(*members, *_corpus())
    index = build_index([str(path)])
    assert [(r.id, r.uri, r.reason) for r in index.rejects] == [("a", str(path), named)]
    assert len(index) == len(ROWS)
    with pytest.raises(ManifestError, match=f"shard.tar: .*{named}"):
        build_index([str(shard(*members))])


@pytest.mark.parametrize(
    "second", [("a/0000.opus", b"x"), ("a/0000.OPUS", b"x"), ("a/0000.txt", b"other words")]
)
def test_a_key_twice_is_refused(shard: Shard, second: tuple[str, bytes]) -> None:
    path = shard(*_corpus(), second)
    with pytest.raises(ManifestError, match=r"shard\.tar: .*'a/0000' .*twice"):
        build_index([str(path)])


def test_files_that_are_no_recordings_are_notes(shard: Shard) -> None:
    others = [("README", b"a"), ("README.txt", b"a"), ("a/cover.jpg", b"a"), (".DS_Store", b"a")]
    apple = [(f"a/._{n:04}.opus", b"\0\5\x16\7") for n in range(3)]
    index = build_index([str(shard(*apple, *_corpus(), *others))])
    assert len(index) == len(ROWS) and index.rejects == []
    [note] = index.notes
    assert all(name in note for name in ("README", "a/cover.jpg", ".DS_Store", "._*", "3 files"))


def test_an_utterance_may_have_the_name_of_a_document(shard: Shard) -> None:
    audio = (ASSETS / ROWS[0]["audio"]).read_bytes()
    index = build_index([str(shard(("notice.opus", audio), ("notice.txt", b"Notice.")))])
    assert index.table["id"].to_pylist() == ["notice"] and index.notes == []


def test_texts_are_read_with_a_mark_and_with_unusual_line_breaks(shard: Shard) -> None:
    audio = (ASSETS / ROWS[0]["audio"]).read_bytes()
    mark = b"\xef\xbb\xbf"
    fields = mark + json.dumps({"text": "b\u2028c"}, ensure_ascii=False).encode()
    path = shard(
        ("0.opus", audio), ("0.txt", mark + "a\u2028b".encode()),
        ("1.opus", audio), ("1.json", fields),
    )  # fmt: skip
    assert build_index([str(path)]).table["text"].to_pylist() == ["a\u2028b", "b\u2028c"]


def test_a_member_whose_name_is_not_utf8_is_a_reject(shard: Shard) -> None:
    index = build_index([str(shard(("\udcff.opus", b"x"), ("\udcff.txt", b"x"), *_corpus()))])
    assert [(r.id, r.reason) for r in index.rejects] == [(r"\xff", "file name")]
    assert len(index) == len(ROWS)


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ManifestError, match=r"/shard\.tar: .*\btar\b"):
        build_index([str(path)])
