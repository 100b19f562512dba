"""Log of recordings that could not be used, in rejects.jsonl, and the limit on their number.

notes.jsonl has those of which one channel was used instead of the mean, once each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

from omni.metrics.run_files import append_json, keep_lines, read_json_lines
from omni.storage.path import StoragePath
from omni.stream.schema import EncodedRow
from omni.train.distributed import all_gather


class TooManyRejects(RuntimeError):
    """More recordings than `data.max_rejects` allows could not be used."""


class RejectRow(TypedDict):
    """One utterance that the stream could not use: a row of rejects.jsonl."""

    id: str
    uri: str
    reason: str
    """Key of the reason, by which rejects are counted."""
    detail: str
    split: str
    step: int
    """Step (counted from 1) that the utterance belonged to; 0 for a held-out split."""


class NoteRow(TypedDict):
    """One utterance in whose decoding a choice was made: a row of notes.jsonl."""

    id: str
    uri: str
    note: str
    """Kind of the choice, by which notes are counted."""
    detail: str
    split: str
    step: int
    """As in `RejectRow`."""


class RejectLog:
    """Rejects and notes of all ranks. Every rank counts them; rank 0 writes the file.

    max_share: largest share of `utterances`, the rows of the training index, that may be rejected.
    """

    def __init__(self, run_dir: StoragePath, rank: int, max_share: float, utterances: int) -> None:
        self._path, self._notes_path = run_dir / "rejects.jsonl", run_dir / "notes.jsonl"
        self._rank, self._max_share, self._utterances = rank, max_share, utterances
        self.counts: dict[str, int] = {}
        """Rejected utterances by reason, over all attempts."""
        self.notes: dict[str, int] = {}
        """Utterances with a note by kind, over all attempts."""
        self._ids: set[str] = set()
        self._noted: set[str] = set()
        self._pending: list[RejectRow] = []
        self._pending_notes: list[NoteRow] = []

    def add(self, rows: Iterable[EncodedRow], step: int) -> None:
        """Collect the rejects and notes of a block. step: see `RejectRow`."""
        for row in rows:
            for i, note in enumerate(row["notes"] or []):
                if note is not None and row["ids"][i] not in self._noted:
                    kind, _, detail = note.partition("\n")
                    self._pending_notes.append(
                        {
                            "id": row["ids"][i],
                            "uri": row["uris"][i],
                            "note": kind,
                            "detail": detail,
                            "split": row["split"],
                            "step": step,
                        }
                    )
            for i, error in enumerate(row["errors"]):
                if error is None:
                    continue
                reason, _, detail = error.partition("\n")
                self._pending.append(
                    {
                        "id": row["ids"][i],
                        "uri": row["uris"][i],
                        "reason": reason,
                        "detail": detail,
                        "split": row["split"],
                        "step": step,
                    }
                )

    def share(self) -> None:
        """Exchange new rejects and notes between ranks and write them. A collective call.

        Raises TooManyRejects, on all ranks alike.
        """
        for reject in all_gather(self._pending):
            if reject["id"] in self._ids:
                continue
            self._ids.add(reject["id"])
            self.counts[reject["reason"]] = self.counts.get(reject["reason"], 0) + 1
            if self._rank == 0:
                append_json(self._path, [reject])
        for noted in all_gather(self._pending_notes):
            if noted["id"] in self._noted:
                continue
            self._noted.add(noted["id"])
            self.notes[noted["note"]] = self.notes.get(noted["note"], 0) + 1
            if self._rank == 0:
                append_json(self._notes_path, [noted])
        self._pending, self._pending_notes = [], []
        if len(self._ids) > self._max_share * self._utterances:
            raise TooManyRejects(
                f"data.max_rejects: {len(self._ids)} of {self._utterances} utterances were "
                f"rejected, more than {self._max_share:.0%} ({self.counts}); rejects.jsonl names "
                "them"
            )

    def rewind(self, step: int) -> None:
        """Drop what an earlier attempt wrote about later steps. For rank 0."""
        for path in (self._path, self._notes_path):
            keep_lines(path, lambda row: row.get("step", 0) <= step)

    def restore(self) -> None:
        """Take over the counts and ids in the files, once they are rewound."""
        # Rows without a step are rejects of the index, which are counted apart.
        rows = [row for row in read_json_lines(self._path) if "step" in row]
        self._ids = {row["id"] for row in rows}
        self.counts = dict(Counter(row["reason"] for row in rows))
        notes = list(read_json_lines(self._notes_path))
        self._noted, self.notes = (
            {row["id"] for row in notes},
            dict(Counter(n["note"] for n in notes)),
        )
