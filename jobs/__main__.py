"""The command `omni`: run one of the jobs."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

import omni
from omni.errors import ExitCode

JOBS = {
    "Corpora": ("index", "inspect", "annotate", "probe", "encode", "synthesize"),
    "Training": ("train", "submit", "audit", "compare"),
    "Checkpoints": ("evaluate", "transcribe", "serve", "export"),
    "This machine": ("bench",),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"omni {omni.__version__}")
        return 0
    job = arguments[0]
    known = [name for names in JOBS.values() for name in names]
    if job not in known:
        close = difflib.get_close_matches(job, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        text = f"error: {job}: unknown job{hint}; expected one of: {', '.join(known)}"
        print(text, file=sys.stderr)
        return ExitCode.WRONG_INPUT
    code: int = import_module(f"jobs.{job}").main(arguments[1:])
    return code


def _help() -> str:
    lines = [
        "omni trains speech language models on a Ray cluster: features of a frozen Whisper encoder",
        "stream through a projector into a GPT.",
        "",
        "usage: omni JOB [--config FILE] [ARGUMENTS]",
    ]
    for group, names in JOBS.items():
        lines += ["", f"{group}:"]
        for name in names:
            about = (import_module(f"jobs.{name}").__doc__ or "").partition("\n\n")[0]
            lines.append(f"  {name:<12}{' '.join(about.split())}")
    lines += [
        "",
        "Start here:",
        "  omni train --config smoke                train on the recordings that come with omni",
        "  omni inspect embedded:train              write a page about that corpus",
        "  omni train --help                        the arguments and settings of a job",
        "",
        "Exit codes: 0 done, 1 failed, 2 a wrong setting or input, 3 another driver has the run,",
        "130 Ctrl-C, 143 SIGTERM.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
