"""One rank's end of the stream: blocks in, batches out, and the books about both.

Keeps the ledger (which utterances were trained at which step) and the rejects, and checks that the
stream brings what the plan says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from omni.inference.decode_batch import HeldUtterance
from omni.metrics.run_files import append_json, keep_lines, read_json_lines
from omni.metrics.table import StepSums
from omni.metrics.throughput import Stopwatch
from omni.model.batch import Batch
from omni.plan.plan import EMPTY, padded_step
from omni.storage.retry import retry_storage
from omni.stream.collate import Utterance
from omni.stream.schema import EncodedRow, utterances
from omni.train.distributed import all_gather
from omni.train.evaluation import HeldOut, Layout
from omni.train.worker_spec import WorkerSpec


class TooManyRejects(RuntimeError):
    """More recordings than `data.max_rejects` allows could not be used."""


@dataclass(frozen=True)
class Microbatch:
    """A batch, its place in the step, and what is counted about it."""

    batch: Batch
    place: int
    counts: StepSums  # of its utterances; the losses are not known yet


@dataclass
class Feed:
    job: WorkerSpec
    blocks: Iterator[pa.Table]
    layout: Layout
    rank: int
    world: int
    device: torch.device
    watch: Stopwatch
    waited: float = 0.0  # seconds without a block
    waiting_since: float | None = None  # perf_counter, while there is none
    cache_full: str | None = None  # why features are no longer kept
    reject_counts: dict[str, int] = field(default_factory=dict)
    _rejected: set[str] = field(default_factory=set)
    _new_rejects: list[dict[str, Any]] = field(default_factory=list)
    _consumed: list[dict[str, Any]] = field(default_factory=list)
    _ids: dict[int, list[str]] = field(default_factory=dict)  # of this step's bins
    _step: int = 0  # counted from 1

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's blocks of a step (counted from 0), in order."""
        self._ids.clear()
        self._step = step + 1
        optim = self.job.config.optim
        rows = padded_step(optim.bins_per_step, self.world, optim.bins_per_block)
        for number in range(rows // (self.world * optim.bins_per_block)):
            place = number * self.world + self.rank
            yield self._microbatch(self._next(), step, place)

    def at_work(self) -> dict[str, Any]:
        """The newest step of which there are blocks, its bins, and the ids of their utterances."""
        ids = [name for of_bin in self._ids.values() for name in of_bin]
        return {"step": self._step, "bins": list(self._ids), "ids": ids}

    def hold(self, name: str, rows: int) -> HeldOut:
        """Take a held-out split, which leads the stream, into memory."""
        held = []
        for _ in range(rows // (self.world * self.job.config.optim.bins_per_block)):
            block: list[EncodedRow] = self._next().to_pylist()
            self._note_rejects(block, step=0)
            for row in block:
                if row["split"] != name:
                    raise RuntimeError(f"the stream brought {row['split']}, expected {name}")
                held += [
                    HeldUtterance(
                        member,
                        row["ids"][i],
                        row["uris"][i],
                        row["texts"][i],
                        row["languages"][i] or "en",
                    )
                    for i, member in enumerate(self._utterances(row))
                    if member.features is not None
                ]
        return HeldOut(held, self.layout, self.device)

    def rewind(self, step: int, counts: dict[str, int]) -> int:
        """Forget what an earlier attempt wrote about steps after `step`, its checkpoint; rank 0 is
        told how many these were.
        """
        run_dir = self.job.config.run_dir
        latest = step
        if self.rank == 0:
            keep_lines(run_dir / "rejects.jsonl", lambda row: row.get("step", 0) <= step)
            for ledger in (run_dir / "ledger").glob("rank-*.jsonl"):
                latest = max([latest, *(row.get("step", 0) for row in read_json_lines(ledger))])
                keep_lines(ledger, lambda row: row.get("step", 0) <= step)
        self.reject_counts = dict(counts)
        return latest - step

    def recall_rejects(self) -> None:
        """Read the rejects of earlier attempts, once rank 0 has rewound them."""
        path = self.job.config.run_dir / "rejects.jsonl"
        self._rejected = {row["id"] for row in read_json_lines(path) if "step" in row}

    def skip(self, step: int, reason: str) -> list[dict[str, Any]]:
        """Mark the step's bins as consumed without an update; returns those of all ranks, with the
        ids of their utterances. A collective call.
        """
        rows = [row for row in self._consumed if row["step"] == step]
        for row in rows:
            row["skipped"] = reason
        return all_gather([{"bin": row["bin"], "ids": self._ids[row["bin"]]} for row in rows])

    def write_ledger(self) -> None:
        folder = self.job.config.run_dir / "ledger"
        retry_storage(lambda: folder.mkdir(exist_ok=True))
        append_json(folder / f"rank-{self.rank:04d}.jsonl", self._consumed)
        self._consumed = []

    def share_rejects(self) -> None:
        """Write the new rejects of all ranks; raises TooManyRejects. A collective call."""
        for reject in all_gather(self._new_rejects):
            if reject["id"] in self._rejected:
                continue
            self._rejected.add(reject["id"])
            reason = reject["reason"]
            self.reject_counts[reason] = self.reject_counts.get(reason, 0) + 1
            if self.rank == 0:
                append_json(self.job.config.run_dir / "rejects.jsonl", [reject])
        self._new_rejects = []
        allowed, rows = self.job.config.data.max_rejects, self.job.train_rows
        if len(self._rejected) > allowed * rows:
            raise TooManyRejects(
                f"data.max_rejects: {len(self._rejected)} of {rows} utterances were rejected, "
                f"more than {allowed:.0%} ({self.reject_counts}); rejects.jsonl names them"
            )

    def _next(self) -> pa.Table:
        self.waiting_since = began = time.perf_counter()
        table = next(self.blocks)
        self.waiting_since = None
        seconds = time.perf_counter() - began
        self.waited += seconds
        self.watch.add("wait", seconds)
        return table

    def _microbatch(self, table: pa.Table, step: int, place: int) -> Microbatch:
        rows: list[EncodedRow] = table.to_pylist()
        self._check(rows[0], step, place)
        self._note_rejects(rows, step + 1)
        batch = self.layout.batch([self._utterances(row) for row in rows])
        with self.watch.phase("copy"):
            batch = batch.to(self.device)
        samples = 0
        count = 0
        for row in rows:
            self.cache_full = self.cache_full or row["cache_full"]
            used = [n for n, frames in enumerate(row["frames"]) if frames]
            count += len(used)
            samples += sum(row["samples"][n] for n in used)
            if row["bin"] != EMPTY:
                self._ids[row["bin"]] = [row["ids"][n] for n in used]
                self._consumed.append(
                    {
                        "step": step + 1,
                        "bin": row["bin"],
                        "utterances": [row["numbers"][n] for n in used],
                    }
                )
        return Microbatch(
            batch,
            place,
            StepSums(
                utterances=count,
                samples=samples,
                load_seconds=sum(row["load_seconds"] for row in rows),
                encode_seconds=sum(row["encode_seconds"] for row in rows),
                encoded_samples=sum(row["encoded_samples"] for row in rows),
                rejected=sum(not frames for row in rows for frames in row["frames"]),
            ),
        )

    def _utterances(self, row: EncodedRow) -> list[Utterance]:
        return utterances(row, self.job.encoder.codec)

    def _check(self, row: EncodedRow, step: int, place: int) -> None:
        """The stream and the loop must agree on what is trained now."""
        optim = self.job.config.optim
        offset = place * optim.bins_per_block
        expected = step * optim.bins_per_step + offset if offset < optim.bins_per_step else EMPTY
        if row["split"] != "train" or row["bin"] != expected:
            raise RuntimeError(
                f"step {step}: the stream brought bin {row['bin']} of {row['split']}, "
                f"the plan says {expected}"
            )

    def _note_rejects(self, rows: list[EncodedRow], step: int) -> None:
        for row in rows:
            for i, error in enumerate(row["errors"]):
                if error is None:
                    continue
                reason, _, detail = error.partition("\n")
                self._new_rejects.append(
                    {
                        "id": row["ids"][i],
                        "uri": row["uris"][i],
                        "reason": reason,
                        "detail": detail,
                        "split": row["split"],
                        "step": step,
                    }
                )
