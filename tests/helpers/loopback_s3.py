"""A real S3 server on loopback, for tests that keep things in a bucket."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from werkzeug.serving import make_server


@contextlib.contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """URI of a new bucket, server included, as a user would name it; tests/conftest.py has keys."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield _make_bucket(name, *server.get_host_and_port())
    finally:
        server.stop()


def _make_bucket(name: str, host: str, port: int) -> str:
    options = f"endpoint_override={host}:{port}&scheme=http&allow_bucket_creation=true"
    uri = f"s3://{name}?{options}"
    filesystem, _ = pafs.FileSystem.from_uri(uri)
    filesystem.create_dir(name)
    return uri


@contextlib.contextmanager
def server_requests() -> Iterator[list[str]]:
    """Collect the requests that the server answers meanwhile, as `GET key`, without the bucket."""
    found: list[str] = []
    logger = logging.getLogger("werkzeug")

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if request := re.search(r"([A-Z]+) /[^/ ]+/?([^? ]*)\S* HTTP", record.getMessage()):
                found.append(f"{request[1]} {request[2]}")

    handler, level = Collect(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def serve_slowly(delay: float) -> None:
    """Serve a bucket of which each request takes `delay` seconds more, and count the requests."""
    application, count, lock = DomainDispatcherApplication(create_backend_app), 0, threading.Lock()

    def slow(environment: Any, start_response: Any) -> Any:
        nonlocal count
        with lock:
            count += 1
            print(f"\r{count} requests", end="", file=sys.stderr, flush=True)
        time.sleep(delay)
        return application(environment, start_response)

    server = make_server("127.0.0.1", 0, slow, threaded=True)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    print(_make_bucket("bench", "127.0.0.1", server.port), flush=True)
    thread.join()


if __name__ == "__main__":
    # For `omni bench cache`: python -m tests.helpers.loopback_s3 SECONDS. Both of AWS_ACCESS_KEY_ID
    # and AWS_SECRET_ACCESS_KEY have to be set, to anything.
    serve_slowly(float(sys.argv[1]))
