"""What no row of a corpus may reach: a server of this machine, and a file outside the corpus."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from pathlib import Path

_IN_OPEN = 0x20  # of inotify


class Trap:
    """A private file and a server on loopback, which notice whatever opens or asks them.

    The kernel tells of the file, whichever library or process opens it. The server answers every
    connection with a recording's worth of HTTP. A context manager.
    """

    def __init__(self, secret: Path) -> None:
        self.secret = secret
        self.asked = 0
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Trap:
        self._watch = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._libc.inotify_add_watch(self._watch, os.fsencode(self.secret), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"inotify: {self.secret}")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        os.close(self._watch)

    def sprung(self) -> list[str]:
        """What happened since the last call. Connections count once the kernel has made them."""
        found = []
        try:
            os.read(self._watch, 1 << 16)
            found.append(f"{self.secret} was opened")
        except BlockingIOError:
            pass
        asked, self.asked = self.asked, 0
        return found + [f"port {self.port} was asked {asked} times"] * (asked > 0)

    def settle(self) -> None:
        """Wait until connections made so far have been counted."""
        before = self.asked
        with socket.create_connection(("127.0.0.1", self.port)):
            while self.asked == before:
                time.sleep(0.001)
        self.asked -= 1

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.asked += 1
            with connection:
                connection.settimeout(0.2)
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nRIFF")
                except OSError:
                    continue
