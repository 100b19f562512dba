"""Send a job to a Ray cluster, follow it, and end with its exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import EPILOG, run
from omni.config import load_config
from omni.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    codes: list[int] = []
    code = run(lambda: codes.append(_submit(argv)))
    return code or codes[0]


def _submit(argv: list[str] | None) -> int:
    arguments, overrides = _parser().parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    if arguments.dry_run and arguments.job != "train":
        raise ConfigError("--dry_run: only of --job train")
    folder = Path(arguments.working_dir)
    if not folder.is_dir():
        raise ConfigError(f"--working_dir: {folder} is no folder")
    from omni.cluster.job_client import Follower, Request, check_settings, connect, submit

    check_settings(config)
    request = Request(
        config,
        arguments.job,
        folder,
        arguments.exclude,
        arguments.max_mb << 20,
        arguments.python,
        arguments.install,
        ["--dry_run"] if arguments.dry_run else [],
    )
    client = connect(arguments.address)
    job = submit(client, request, print)
    print(f"{job} on {client.get_address()}", flush=True)
    if arguments.no_wait:
        return 0
    follower = Follower(client, job, _write)
    while True:
        try:
            return follower.run()
        except KeyboardInterrupt:
            if not _wants_to_stop(job):
                print(
                    f"{job} goes on; ray job logs -f {job} follows it, ray job stop {job} ends it"
                )
                return 130
            client.stop_job(job)
            print("stopping; a training run writes a checkpoint first", flush=True)


def _wants_to_stop(job: str) -> bool:
    """Whoever cannot be asked, in a pipe, wants the job to go on."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nstop {job} as well? [y/N] ").strip().lower() in ("y", "yes")
    except (KeyboardInterrupt, EOFError):
        return False


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        description=f"{__doc__} Packs the working directory without what git ignores, run "
        "directories, environments and secrets, and adds omni's code where it is not there.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file, see configs/")
    add("--job", choices=("train", "encode"), default="train")
    add("--address", metavar="URL", help="http://HEAD:8265; default: RAY_ADDRESS, or this machine")
    add("--working_dir", metavar="DIR", default=".", help="what the job takes along")
    add("--exclude", metavar="PATTERN", action="append", default=[], help="and not these")
    add("--max_mb", metavar="MB", type=int, default=200, help="refuse to take along more")
    add("--python", default="python", help="the interpreter on the cluster's head")
    add("--install", action="store_true", help="install the versions that are installed here there")
    add("--dry_run", action="store_true", help="check the run there, and do not train")
    add("--no_wait", action="store_true", help="do not follow the job")
    return parser


if __name__ == "__main__":
    sys.exit(main())
