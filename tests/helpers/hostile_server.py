"""A web server that means harm: endless, slow, packed and wrong answers, each at its own path."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY = bytes(range(256)) * 100


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        try:
            getattr(self, f"_{self.path.strip('/').partition('?')[0].replace('-', '_')}")()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _head(self, status: int = 200, **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _small(self) -> None:
        self._head(Content_Length=len(BODY))
        self.wfile.write(BODY)

    def _chunked(self) -> None:
        self._head(Transfer_Encoding="chunked")
        for first in range(0, len(BODY), 1000):
            block = BODY[first : first + 1000]
            self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _endless(self) -> None:
        self._head(Connection="close")
        while True:
            self.wfile.write(bytes(1 << 16))
            self.server.sent += 1 << 16  # type: ignore[attr-defined]

    def _long(self) -> None:
        self._head(Content_Length=1 << 40)
        self.server.released.wait(5)  # type: ignore[attr-defined]

    def _drip(self) -> None:
        self._head(Content_Length=1000)
        while not self.server.released.wait(0.05):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def _drip_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.server.released.wait(0.05):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def _headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100_000)

    def _header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * (1 << 24))

    def _cut(self) -> None:
        self._head(Content_Length=1000, Connection="close")
        self.wfile.write(b"half")
        self.close_connection = True

    def _packed(self) -> None:
        self._head(Content_Encoding="gzip", Content_Length=3)
        self.wfile.write(b"abc")

    def _to(self) -> None:
        self._head(302, Location=self.path.partition("?")[2], Content_Length=0)

    def _loop(self) -> None:
        self._head(302, Location="/loop", Content_Length=0)

    def _gone(self) -> None:
        self._head(404, Content_Length=0)

    def _overloaded(self) -> None:
        self._head(503, Content_Length=0)

    def log_message(self, format: str, *args: Any) -> None:
        pass


BOMBS = ("endless", "long", "headers", "header", "packed", "loop", "cut", "drip", "drip-head")
"""Paths whose answers have no end, or lie about their size."""


@contextlib.contextmanager
def hostile_server() -> Iterator[Any]:
    """Serve on loopback. asked: paths so far; sent: bytes of `endless`; url: of the server."""
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.asked, found.sent, found.released = [], 0, threading.Event()
    found.url = f"http://127.0.0.1:{found.server_address[1]}"
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield found
    finally:
        found.released.set()
        found.shutdown()
        found.server_close()
