"""Run a job on a Ray cluster, follow its output, and end with its exit code.

It takes along the files of the working directory that git tracks (without a repository, all), but
nothing hidden, no run directories, environments and files that look like secrets; omni's own code
is added where it is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.cli import (
    JobParser,
    parse_settings,
    run_job,
    settings_parser,
)
from omni.errors import ConfigError, ExitCode


def main(argv: list[str] | None = None) -> int:
    return run_job(lambda: _submit(argv))


def _submit(argv: list[str] | None) -> int:
    arguments, config = parse_settings(_parser(), argv)
    if arguments.dry_run and arguments.job != "train":
        raise ConfigError("--dry_run: expected --job train")
    folder = Path(arguments.working_dir)
    if not folder.is_dir():
        raise ConfigError(f"--working_dir: {folder} is not a folder")
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
                    f"{job} continues: ray job logs -f {job} follows it, ray job stop {job} ends it"
                )
                return ExitCode.INTERRUPTED
            client.stop_job(job)
            print("stopping; a training run writes a checkpoint first", flush=True)


def _wants_to_stop(job: str) -> bool:
    """Ask on a terminal; without one, let the job continue."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nstop {job} as well? [y/N] ").strip().lower() in ("y", "yes")
    except (KeyboardInterrupt, EOFError):
        return False


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> JobParser:
    parser = settings_parser("submit", __doc__)
    add = parser.add_argument
    add("--job", choices=("train", "encode"), default="train", help="job to run (default train)")
    add(
        "--address",
        metavar="URL",
        help="job server: http://HEAD:8265 (default: RAY_ADDRESS, or this machine)",
    )
    add("--working_dir", metavar="DIR", default=".", help="folder to upload (default: this one)")
    add("--exclude", metavar="PATTERN", action="append", default=[], help="do not upload these")
    add("--max_mb", metavar="MB", type=int, default=200, help="largest upload (default 200)")
    add("--python", default="python", help="interpreter on the cluster (default python)")
    add("--install", action="store_true", help="install this machine's versions there")
    add("--dry_run", action="store_true", help="check the run there, and do not train")
    add("--no_wait", action="store_true", help="do not follow the job")
    return parser


if __name__ == "__main__":
    sys.exit(main())
