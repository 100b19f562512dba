"""Files beside the recordings of a corpus that hold no utterance: counted, and named by example."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from omni.corpus.rejects import Reject
from omni.errors import counted

NOT_A_RECORDING = "not a recording"
"""Reason of such files. They are no utterances, so `data.max_rejects` does not count them."""

_SYSTEM = {".ds_store", "thumbs.db", "desktop.ini"}
_DOCUMENTS = {
    "readme", "license", "licence", "copying", "notice", "changelog", "changes", "authors",
    "credits", "citation", "disclaimer",
}  # fmt: skip


def is_system_file(name: str) -> bool:
    """Check for files that macOS and Windows leave beside others, such as AppleDouble's ._NAME."""
    path = PurePosixPath(name)
    apple = path.name.startswith("._") or "__MACOSX" in path.parts
    return apple or path.name.lower() in _SYSTEM


def is_document(name: str) -> bool:
    """Check for a README, a licence and the like; such a text without a recording is no row."""
    return PurePosixPath(name).name.partition(".")[0].lower() in _DOCUMENTS


def utf8_name(name: str) -> str:
    """Show a file name whose bytes are not UTF-8 with escapes (\\xff), as valid text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class OtherFiles:
    """Counts of such files by ending, with one example of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, name: str) -> None:
        base = name.rpartition("/")[2]
        stem, dot, ending = base.rpartition(".")
        kind = f"*.{ending.lower()}" if dot and stem else base
        kind = "._*" if base.startswith("._") else kind
        count, example = self._found.get(kind, (0, utf8_name(name)))
        self._found[kind] = count + 1, example

    def rejects(self, uri: str) -> list[Reject]:
        """Return one entry for each ending; uri: the folder or archive."""
        return [
            Reject(
                utf8_name(kind),
                uri,
                NOT_A_RECORDING,
                f"{counted(count, 'file')}, such as {example}",
            )
            for kind, (count, example) in sorted(self._found.items())
        ]


def other_files_note(rejects: list[Reject], most: int = 4) -> list[str]:
    """Sum up the entries of OtherFiles in at most one line."""
    if not rejects:
        return []
    listed = [f"{r.id} ({r.detail})" for r in rejects[:most]]
    rest = [f"{len(rejects) - most} more kinds"] if len(rejects) > most else []
    return [f"left out, since they are not recordings: {', '.join(listed + rest)}"]


def without_other_files(rejects: Iterable[Reject]) -> tuple[list[Reject], list[str]]:
    """Separate rejected utterances from files that hold none; those are told of in notes."""
    utterances: list[Reject] = []
    others: list[Reject] = []
    for reject in rejects:
        (others if reject.reason == NOT_A_RECORDING else utterances).append(reject)
    return utterances, other_files_note(others)
