"""A hub on loopback with one dataset, for the real clients of Hugging Face and ModelScope."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_DATE = "2026-01-01T00:00:00.000Z"


@contextmanager
def serve(
    repository: str, folder: Path, overloaded: str | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The hub's address, and what it was asked (method, path and range).

    overloaded: files that it lists and does not serve, by the ending of their names.
    """
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            api, file = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                self._json(_info(repository, files))
            elif path.startswith(f"{api}/tree/"):
                inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
                recursive = "true" in str(parse_qs(urlsplit(self.path).query)).lower()
                self._json(_tree(files, inside, recursive))
            elif path.startswith(file) and path.removeprefix(file).partition("/")[2] in files:
                self._file(files[path.removeprefix(file).partition("/")[2]])
            elif path == f"/api/v1/datasets/{repository}/repo/tree":
                self._json({"Code": 200, "Data": {"Files": _modelscope(files)}})
            elif path == f"/api/v1/datasets/{repository}/repo":
                self._file(files[parse_qs(urlsplit(self.path).query)["FilePath"][0]])
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked.append(f"POST {self.path}")
            try:
                paths = json.loads(body)["paths"]
            except ValueError:
                paths = parse_qs(body).get("paths", [])
            entries = {entry["path"]: entry for entry in _tree(files, "", True)}
            self._json([entries[name] for name in paths if name in entries])

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _file(self, path: Path) -> None:
            if overloaded is not None and path.name.endswith(overloaded):
                self._send(503, b"", {})
                return
            body, status = path.read_bytes(), 200
            headers = {
                "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                stop = min(len(body), int(last) + 1) if last else len(body)
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(body)}"
                body, status = body[int(first) : stop], 206
            self._send(status, body, headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def _info(repository: str, files: dict[str, Path]) -> dict[str, Any]:
    return {
        "_id": "1",
        "id": repository,
        "author": repository.partition("/")[0],
        "sha": COMMIT,
        "lastModified": _DATE,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": name} for name in files],
    }


def _tree(files: dict[str, Path], inside: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder, as the hub lists them."""
    found: dict[str, dict[str, Any]] = {}
    start = f"{inside}/" if inside else ""
    for name, path in files.items():
        if not name.startswith(start):
            continue
        parts = name.removeprefix(start).split("/")
        for depth in range(1, len(parts)):
            folder = start + "/".join(parts[:depth])
            if recursive or depth == 1:
                found[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(path.read_bytes()).hexdigest()
            size = path.stat().st_size
            found[name] = {"type": "file", "oid": oid, "size": size, "path": name}
    return list(found.values())


def _modelscope(files: dict[str, Path]) -> list[dict[str, Any]]:
    return [
        {
            "Path": name,
            "Name": path.name,
            "Type": "blob",
            "Size": path.stat().st_size,
            "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for name, path in files.items()
    ]
