"""Error of a wrong setting, exit codes of jobs, and words of messages."""

from __future__ import annotations

from enum import IntEnum

from omni.storage.uri import redact


class ExitCode(IntEnum):
    """Exit codes of jobs. docs/running.md says what whoever started a job does with each."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    RUN_TAKEN = 3
    """Another driver trains the run."""
    INTERRUPTED = 128 + 2
    """By Ctrl-C. From here on as a shell reports a signal."""
    PIPE_CLOSED = 128 + 13
    """Reader of the output, such as `head`, ended before the job."""
    TERMINATED = 128 + 15
    """By SIGTERM, with the plan not trained."""


class ConfigError(ValueError):
    """The configuration is wrong; the message names each field and what was expected."""


class ManifestError(ValueError):
    """A manifest cannot be used; the message names file, row, field and what was expected."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that is not empty, without credentials."""
    lines = (line.strip() for line in str(error).splitlines())
    return redact(next((line for line in lines if line), "no message"))


class LocatedError(RuntimeError):
    """An unexpected error, with the recording or part at which it occurred, in one line."""


def located(error: Exception, where: str) -> LocatedError:
    """Make the error of one line that says at which recording or part an unexpected one occurred.

    An error that says so already stays as it is.
    """
    if isinstance(error, LocatedError):
        return error
    return LocatedError(f"{where}: {type(error).__name__}: {first_line(error)}")


def counted(number: int, noun: str) -> str:
    """Write a number and its noun: 1 row, 1,234 rows."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    """Write control characters as escapes, except line ends: a terminal would obey them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
