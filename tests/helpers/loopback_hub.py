"""A hub on loopback that speaks to the real clients of Hugging Face and ModelScope.

It serves one folder under one repository name, and answers 404 to everything else. Large files are
told by their SHA-256, as git LFS has it. It can break off, and can serve other bytes than it names.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gguf")


class Hub:
    """`url`, and `asked`: the paths of all requests so far, in order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.gets: list[str] = []  # those that were answered with a body
        self.ranges: list[str] = []  # what Range headers said
        self.break_after: int | None = None  # bytes of the next large file, once
        self.spoil = False  # large files arrive with their last byte changed

    @property
    def modelscope(self) -> list[str]:
        return [path for path in self.asked if path.startswith("/api/v1/")]

    @property
    def hugging_face(self) -> list[str]:
        return [path for path in self.asked if not path.startswith("/api/v1/")]


def closed_port() -> str:
    """An address at which nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def serve(repository: str, folder: Path, revision: str = "main") -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            hub.asked.append(self.path)
            if self.command == "GET":
                hub.gets.append(self.path)
            query = parse_qs(parts.query)
            body, headers = _answer(unquote(parts.path), query, repository, files, revision)
            status, length = 404 if body is None else 200, len(body or b"")
            large = body is not None and any(
                self.path.split("?")[0].endswith(kind) or f"{kind}" in str(query.get("FilePath"))
                for kind in LARGE
            )
            if large and body and hub.spoil:
                body = body[:-1] + bytes([body[-1] ^ 255])
            wanted = self.headers.get("Range")
            if body and wanted:
                hub.ranges.append(wanted)
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                stop = min(length, int(last) + 1) if last else length
                body, status = body[int(first) : stop], 206
                headers = {**headers, "Content-Range": f"bytes {first}-{stop - 1}/{length}"}
            self.send_response(status)
            self.send_header("Content-Length", str(len(body or b"")))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and body:
                if large and hub.break_after is not None:
                    cut, hub.break_after = hub.break_after, None
                    self.wfile.write(body[:cut])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _answer(
    path: str,
    query: dict[str, list[str]],
    repository: str,
    files: dict[str, bytes],
    revision: str,
) -> tuple[bytes | None, dict[str, str]]:
    # Hugging Face: a revision, its tree, and each file with its ETag and commit.
    if path == f"/api/models/{repository}/revision/{revision}":
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": repository, "sha": COMMIT, "siblings": siblings}), {}
    if path == f"/api/models/{repository}/tree/{COMMIT}":
        return _json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
                | (
                    {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}}
                    if _large(name)
                    else {}
                )
                for name, data in files.items()
            ]
        ), {}
    base, _, name = path.rpartition("/")
    if base == f"/{repository}/resolve/{COMMIT}" and name in files:
        data = files[name]
        linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
        common = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": COMMIT}
        return data, common | (linked if _large(name) else {})
    # ModelScope: a list of files, and each file by its path in the query.
    if path == f"/api/v1/models/{repository}/repo/files":
        rows = [
            {
                "Path": name,
                "Type": "blob",
                "Size": len(data),
                "Sha256": _sha256(data),
            }
            for name, data in files.items()
        ]
        return _json({"Code": 200, "Data": {"Files": rows}}), {}
    if path == f"/api/v1/models/{repository}/repo":
        return files.get(query["FilePath"][0]), {}
    return None, {}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _large(name: str) -> bool:
    return name.endswith(LARGE)


def _pointer(data: bytes) -> dict[str, Any]:
    return {"oid": _sha256(data), "size": len(data), "pointerSize": 134}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
