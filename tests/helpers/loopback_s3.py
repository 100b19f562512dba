"""A real S3 server on loopback, for tests that keep things in a bucket."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """URI of a new bucket, server included, as a user would name it; tests/conftest.py has keys."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"endpoint_override={host}:{port}&scheme=http&allow_bucket_creation=true"
        uri = f"s3://{name}?{options}"
        filesystem, _ = pafs.FileSystem.from_uri(uri)
        filesystem.create_dir(name)
        yield uri
    finally:
        server.stop()


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
