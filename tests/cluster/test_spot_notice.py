"""The script that drains a node when AWS announces that its instance goes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from omni.cluster.ray_internals.core import draining_node_ids

ROOT = Path(__file__).parents[2]


class Metadata(BaseHTTPRequestHandler):
    """What an instance asks for its notice: nothing twice, then a notice. A token is needed."""

    asked: list[str | None] = []

    def do_PUT(self) -> None:
        self._answer(200, b"secret")

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("X-aws-ec2-metadata-token"))
        self._answer(200 if len(self.asked) > 2 else 404, b'{"action": "terminate"}')

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def metadata() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_a_notice_drains_the_node(metadata: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        assert not draining_node_ids()
        environment = {
            **os.environ,
            "RAY_ADDRESS": cluster.address,
            "METADATA": metadata,
            "POLL_SECONDS": "0.1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["bash", str(ROOT / "configs" / "spot-notice.sh")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert Metadata.asked == ["secret"] * 3
        # A node without work leaves as soon as it drains.
        gone = [node for node in ray.nodes() if not node["Alive"]]
        assert len(draining_node_ids()) + len(gone) == 1, done.stdout
    finally:
        ray.shutdown()
        cluster.shutdown()
