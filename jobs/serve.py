"""Serve a checkpoint over HTTP, as OpenAI serves transcriptions and chat, and a page.

Keys of clients come from OMNI_API_KEY (several: with commas between them). Without keys the server
listens on this machine only.
"""

from __future__ import annotations

import argparse
import os
import sys

import yaml

from jobs.cli import job_parser, positive, run_job
from jobs.decoding_arguments import CHECKPOINT, add_decoding
from omni.config.field_types import OMNI_TINY, absolute
from omni.errors import ConfigError

_KEY = "OMNI_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str] | None = None) -> int:
    from omni.serve.settings import ServeSettings

    usual = ServeSettings(OMNI_TINY)
    parser = job_parser("serve", __doc__)
    add = parser.add_argument
    about = f"{CHECKPOINT} (default omni-tiny, a small model for English)"
    add("--checkpoint", metavar="DIR", default=OMNI_TINY, help=about)
    add("--host", default=usual.host, help=f"address to listen on (default {usual.host})")
    add("--port", type=positive, default=usual.port, help=f"default {usual.port}")
    add("--replicas", type=positive, default=1, help="copies of the model (default 1)")
    add("--gpus", type=_number, default=0.0, help="GPUs of a replica, also a share (default 0)")
    add("--cpus", type=_number, default=1.0, help="CPUs of a replica, for Ray (default 1)")
    add("--threads", type=positive, default=1, help="torch threads of a replica (default 1)")
    add("--batch", type=positive, default=usual.batch, help="most pieces decoded at a time")
    add("--queue", type=positive, default=usual.queue, help="waiting requests; more get a 429")
    add("--max_megabytes", type=_number, default=usual.max_megabytes, help="of a request, or 413")
    add("--max_seconds", type=_number, default=usual.max_seconds, help="of a recording, or 413")
    add_decoding(parser)
    arguments = parser.parse_args(argv)
    return run_job(lambda: _serve(arguments))


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError
    return value


def _serve(arguments: argparse.Namespace) -> None:
    keys = tuple(key.strip() for key in os.environ.get(_KEY, "").split(",") if key.strip())
    if not keys and arguments.host not in _LOOPBACK:
        raise ConfigError(
            f"--host: {arguments.host} is open to others; expected keys for them in {_KEY}"
        )
    try:
        from omni.serve.deploy import shut_down, start, wait_for_signal
    except ImportError as error:
        raise ConfigError(
            f"omni serve needs {error.name}: pip install 'nanochat-omni[serve]'"
        ) from None
    from omni.checkpoint.base import checkpoint_folder
    from omni.checkpoint.checkpoint import CheckpointError, read_checkpoint
    from omni.serve.settings import ServeSettings

    if arguments.checkpoint != OMNI_TINY:  # Replicas have another working directory.
        arguments.checkpoint = absolute(arguments.checkpoint)
    try:
        found = read_checkpoint(checkpoint_folder(arguments.checkpoint), verify=True)
    except CheckpointError as error:
        raise ConfigError(f"--checkpoint: {error}") from None
    config = yaml.safe_load((found.path / "config.yaml").read_text())
    language = config["data"].get("language") or "en"
    settings = ServeSettings(keys=keys, language=language, **vars(arguments))
    address = start(settings)
    print(f"serving {settings.model} at {address} (Ctrl-C ends it)", flush=True)
    wait_for_signal(shut_down)


if __name__ == "__main__":
    sys.exit(main())
