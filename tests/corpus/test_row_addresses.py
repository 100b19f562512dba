"""Whatever address stands in a row: nothing is read or fetched that the settings do not admit."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from jobs import index as index_job
from omni.corpus.index import build_index
from omni.corpus.sources import Options, Row, open_source, row_audio
from omni.errors import ManifestError
from omni.storage.http import DownloadLimits
from tests.helpers.hostile_addresses import HOSTILE, resolver

pytestmark = pytest.mark.unit
_seen: list[str] | None = None


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _seen.append(f"connect {arguments[1]}")
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if "secret" in path or path.startswith(("/etc/passwd", "/dev/zero", "/proc/self/environ")):
            _seen.append(f"open {path}")


@pytest.fixture(scope="module")
def recorder() -> None:
    sys.addaudithook(_record)


@pytest.fixture
def seen(recorder: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Connections made and foreign files opened by this process."""
    global _seen
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(row_audio, "_PATIENCE_SECONDS", 0.0)
    _seen = []
    yield _seen
    _seen = None


def _sound(seconds: float = 0.5) -> bytes:
    held = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(int(16_000 * seconds)) / 9)
    soundfile.write(held, tone, 16_000, format="FLAC")
    return held.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        body = _sound()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked = []
    found.url = f"http://127.0.0.1:{found.server_address[1]}"
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def _table(folder: Path, *addresses: str) -> str:
    path = folder / "x.parquet"
    texts = [f"text {n}" for n in range(len(addresses))]
    pq.write_table(pa.table({"audio": addresses, "text": texts}), path)
    return str(path)


def _rows(spec: str, **options: Any) -> list[Row]:
    source = open_source(spec, Options(**options))
    return [row for part in source.parts() for row in source.read(part)]


def _manifest(folder: Path, address: str) -> str:
    path = folder / "x.jsonl"
    path.write_text(json.dumps({"audio": address, "text": "a"}) + "\n")
    return str(path)


def test_there_are_two_hundred_addresses() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) >= 200


@pytest.mark.parametrize("write", [_table, _manifest])
def test_hostile_addresses_are_named_and_not_opened(
    write: Any, seen: list[str], server: Any, tmp_path: Path
) -> None:
    """Each row is left out with its position, or ends the corpus with it, or is a missing file."""
    (tmp_path / "secret.wav").write_bytes(_sound())
    folder = tmp_path / "corpus"
    folder.mkdir()
    server.asked.clear()
    left_out = ended = missing = 0
    for address in HOSTILE:
        spec = write(folder, address.replace("PORT", str(server.server_address[1])))
        del seen[:]
        try:
            [row] = _rows(spec)
        except ManifestError as error:
            assert "x.parquet:1: " in str(error) or "x.jsonl:1: " in str(error), address
            assert "SECRET" not in str(error)
            ended += 1
        else:
            assert row.data is None, address
            if row.error is not None:
                assert row.error[1].startswith(f"{spec}:1: "), address
                assert "\n" not in row.error[1] and "secret@" not in row.error[1]
                left_out += 1
            else:
                assert row.uri.startswith(f"{folder}/") and not Path(row.uri).exists(), address
                missing += 1
        assert not seen, (address, seen)
    assert server.asked == []
    assert left_out > 150 and ended > 10 and left_out + ended + missing == len(HOSTILE)


@pytest.mark.parametrize(
    "address",
    [
        "reference://k.wav::http://127.0.0.1/refs.json",
        "ftp://127.0.0.1/a",
        "local:///etc/passwd",
        "zip://a::http://127.0.0.1/a.zip",
        "http://good@127.0.0.1/a",
    ],
)
@pytest.mark.parametrize("write", [_table, _manifest])
def test_settings_admit_no_other_schemes(
    address: str, write: Any, seen: list[str], tmp_path: Path
) -> None:
    downloads = DownloadLimits(allow_private_hosts=True)
    [row] = _rows(write(tmp_path, address), allow_absolute=True, downloads=downloads)
    assert row.error is not None and row.error[0] == "address"
    assert address.partition("://")[0] in row.error[1] and not seen


def test_a_recording_of_an_allowed_server_is_kept(server: Any, tmp_path: Path) -> None:
    server.asked.clear()
    spec = _table(tmp_path, f"{server.url}/a.flac", f"{server.url}/b.flac")
    allowed = DownloadLimits(allow_private_hosts=True)
    found = build_index([spec], cache_dir=tmp_path / "cache", downloads=allowed)
    assert found.table["samples"].to_pylist() == [8000, 8000]
    assert server.asked == ["/a.flac", "/b.flac"]
    small = DownloadLimits(megabytes=1, seconds=5, allow_private_hosts=True)
    assert _rows(spec, downloads=small)[0].data == _sound()


def test_refused_hosts_are_counted_and_named(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.asked.clear()
    (tmp_path / "a.flac").write_bytes(_sound())
    spec = _table(tmp_path, "a.flac", f"{server.url}/b.flac", "ftp://127.0.0.1/c.flac")
    out = tmp_path / "out"
    assert index_job.main(["--source", spec, "--out", str(out)]) == 0
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [r["reason"] for r in rejects] == ["private host", "address"]
    assert (
        "x.parquet:2: " in rejects[0]["detail"] and "--allow_private_hosts" in rejects[0]["detail"]
    )
    assert "x.parquet:3: " in rejects[1]["detail"] and "ftp" in rejects[1]["detail"]
    assert server.asked == []
    said = capsys.readouterr().out
    assert "private host" in said and "address" in said
    again = ["--source", spec, "--out", str(out), "--allow_private_hosts"]
    assert index_job.main(again) == 0, "a part is made again when the limits have changed"
    assert server.asked == ["/b.flac"]
    assert len(build_index([str(out)])) == 2


def test_a_member_of_an_archive_ends_at_the_limit(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.wav", bytes(3 << 20))
        archive.writestr("good.flac", _sound())
    spec = _table(tmp_path, "zip://bomb.wav::x.zip", "zip://good.flac::x.zip")
    bomb, good = _rows(spec, downloads=DownloadLimits(megabytes=2))
    assert bomb.error is not None and bomb.error[0] == "too large"
    assert good.data == _sound()


@pytest.mark.parametrize("method", ["ZIP_BZIP2", "ZIP_LZMA"])
def test_a_member_that_zipfile_unpacks_whole_is_not_unpacked(method: str, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w", getattr(zipfile, method)) as archive:
        archive.writestr("bomb.wav", bytes(1000))
    [row] = _rows(_table(tmp_path, "zip://bomb.wav::x.zip"))
    assert row.error is not None and row.error[0] == "unreadable"
    assert "stored or deflated" in row.error[1]


def test_damaged_archives_and_names_that_no_file_has_leave_out_their_rows(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"a" * 100)
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04")
    spec = _table(tmp_path, "tar://a::x.tar", "zip://a::x.zip", "a\0.wav", "a\0/../b.wav")
    tar, archive, *unnamed = [row.error for row in _rows(spec)]
    assert tar is not None and tar[0] == "unreadable" and "x.parquet:1: " in tar[1]
    assert archive is not None and archive[0] == "unreadable" and "x.parquet:2: " in archive[1]
    assert all(error is not None and error[0] == "address" for error in unnamed)


def test_files_of_another_dataset_are_read_without_the_users_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a dataset names outside itself must be public: the user's private files are not."""
    asked: list[dict[str, Any]] = []

    def read(url: str, options: Options, **settings: Any) -> bytes:
        asked.append(settings)
        return b"x"

    monkeypatch.setattr(row_audio, "_read", read)
    from omni.storage.path import as_path

    home = as_path("hf://datasets/me/mine@main")
    for address in (
        "hf://datasets/me/mine@main/a.flac",
        "zip://a::hf://datasets/me/mine@main/a.zip",
        "hf://datasets/me/private@main/a.flac",
        "hf://datasets/me/mine@main/../private@main/a.flac",
        "zip://a::hf://datasets/me/private/a.zip",
    ):
        assert row_audio.find_recording("p:1", address, home, Options()).data == b"x"
    nobody = {"token": False}
    assert asked == [{}, {"hf": {}}, nobody, nobody, {"hf": nobody}]
