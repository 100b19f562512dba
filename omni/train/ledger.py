"""Ledger of one rank: bins and utterances of every step.

    ledger/rank-0000.lease-000003.jsonl

A file has one writer: the rank of one attempt. Older versions wrote ledger/rank-0000.jsonl.
"""

from __future__ import annotations

from typing import TypedDict

from omni.metrics.run_files import append_json, keep_lines, lease_of, read_json_lines
from omni.storage.path import StoragePath
from omni.storage.retry import retry_storage
from omni.train.distributed import all_gather

FOLDER = "ledger"


class _TrainedBin(TypedDict):
    step: int
    """Number of the step, counted from 1."""
    bin: int
    utterances: list[int]
    """Index rows; rejected ones are left out."""


class LedgerRow(_TrainedBin, total=False):
    """One bin that a rank consumed in one step."""

    skipped: str
    """Reason why the step made no update."""
    lease: int
    """Lease of the attempt; none in rows of older versions."""


class BinIds(TypedDict):
    """Ids of the utterances of one bin."""

    bin: int
    ids: list[str]


class CurrentWork(TypedDict):
    """Newest step that a rank has blocks of, with the bins and utterance ids in them."""

    step: int
    bins: list[int]
    ids: list[str]


class Ledger:
    def __init__(self, run_dir: StoragePath, rank: int) -> None:
        self._folder = run_dir / FOLDER
        self._lease = lease_of(run_dir)
        mark = "".join(f".lease-{number:06d}" for number in self._lease.values())
        self._path = self._folder / f"rank-{rank:04d}{mark}.jsonl"
        self._pending: list[LedgerRow] = []
        self._step = 0
        self._ids: dict[int, list[str]] = {}

    def begin_step(self, step: int) -> None:
        """Start recording a step (counted from 1)."""
        self._step = step
        self._ids.clear()

    def add(self, number: int, utterances: list[int], ids: list[str]) -> None:
        """Record one bin of the current step. utterances: index rows. ids: their ids."""
        self._ids[number] = ids
        self._pending.append({"step": self._step, "bin": number, "utterances": utterances})

    def current_work(self) -> CurrentWork:
        ids = [name for of_bin in self._ids.values() for name in of_bin]
        return {"step": self._step, "bins": list(self._ids), "ids": ids}

    def mark_skipped(self, reason: str) -> list[BinIds]:
        """Mark the bins of the current step as consumed without an update.

        Returns those of all ranks. A collective call.
        """
        rows = [row for row in self._pending if row["step"] == self._step]
        for row in rows:
            row["skipped"] = reason
        mine: list[BinIds] = [{"bin": row["bin"], "ids": self._ids[row["bin"]]} for row in rows]
        return all_gather(mine)

    def write(self) -> None:
        """Append the recorded rows to the rank's file."""
        retry_storage(lambda: self._folder.mkdir(exist_ok=True))
        append_json(self._path, [{**row, **self._lease} for row in self._pending])
        self._pending = []


def rewind_ledgers(run_dir: StoragePath, step: int) -> int:
    """Drop the rows of all ranks after `step`; return how many steps these were."""
    latest = step
    for path in (run_dir / FOLDER).glob("rank-*.jsonl"):
        latest = max([latest, *(row.get("step", 0) for row in read_json_lines(path))])
        keep_lines(path, lambda row: row.get("step", 0) <= step)
    return latest - step
