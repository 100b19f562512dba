"""Turn one rank's blocks of the stream into microbatches and held-out splits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import pyarrow as pa
import torch

from omni.corpus.index_row import span_of
from omni.inference.decode_batch import HeldUtterance
from omni.metrics.table import StepSums
from omni.metrics.throughput import Stopwatch
from omni.model.batch import Batch
from omni.plan.plan import EMPTY, padded_step
from omni.plan.stream_order import planned_bins
from omni.stream.collate import Utterance
from omni.stream.schema import EncodedRow, utterances
from omni.train.evaluation import HeldOut, Layout
from omni.train.ledger import Ledger
from omni.train.reject_log import RejectLog
from omni.train.worker_spec import WorkerSpec


@dataclass(frozen=True)
class Microbatch:
    """Bins that a rank computes at once, as a batch on the device.

    block: its number in the step, over all ranks; the seed of its dropout.
    counts: sums over its utterances; the losses are still zero.
    """

    batch: Batch
    block: int
    counts: StepSums


class BlockReader:
    """Read this rank's share of the stream, check it against the plan, and count.

    blocks: tables of `bins_per_block` rows, in the order of `StreamOrder`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        blocks: Iterator[pa.Table],
        rank: int,
        world: int,
        device: torch.device,
        watch: Stopwatch,
    ) -> None:
        self._spec, self._blocks = spec, blocks
        self._rank, self._world, self._device, self._watch = rank, world, device, watch
        self._layout = Layout.of(spec.config, spec.model)
        self._codec = spec.encoder.codec
        config = spec.config
        self.ledger = Ledger(config.run_dir, rank)
        self.rejects = RejectLog(config.run_dir, rank, config.data.max_rejects, spec.train_rows)
        self.waited = 0.0
        """Seconds spent waiting for blocks."""
        self.waiting_since: float | None = None
        """time.perf_counter() at the start of the current wait; None while there is none."""
        self._held_halvings = 0
        self.cache_full: str | None = None
        """Reason why the cache keeps no more features."""

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """Yield this rank's microbatches of a step (counted from 0), in order."""
        self.ledger.begin_step(step + 1)
        optim = self._spec.config.optim
        rows = padded_step(optim.bins_per_step, self._world, optim.bins_per_block)
        for number in range(rows // (self._world * optim.bins_per_block)):
            block = number * self._world + self._rank
            yield self._microbatch(self._next(), step, block)

    def hold(self, name: str) -> HeldOut:
        """Read this rank's share of a held-out split into memory. A collective call."""
        held, places = [], []
        size = self._spec.config.optim.bins_per_block
        bins = self._spec.held_bins[name]
        for first in range(
            self._rank * size, padded_step(bins, self._world, size), self._world * size
        ):
            block: list[EncodedRow] = self._next().to_pylist()
            planned = planned_bins(0, first // size, bins, size, bins)
            self._compare(block, name, planned, name)
            self.rejects.add(block, step=0)
            self._held_halvings += sum(row["halvings"] for row in block)
            for row in block:
                for i, utterance in enumerate(self._utterances(row)):
                    if utterance.features is None:
                        continue
                    places.append((row["bin"], i))
                    held.append(
                        HeldUtterance(
                            utterance,
                            row["ids"][i],
                            row["uris"][i],
                            row["texts"][i],
                            row["languages"][i] or "en",
                            span_of(row["spans"][i]),
                        )
                    )
        return HeldOut(held, places, self._layout, self._device)

    def _next(self) -> pa.Table:
        self.waiting_since = began = time.perf_counter()
        table = next(self._blocks, None)
        if table is None:
            raise RuntimeError("the stream has ended before the plan: a stage lost blocks")
        self.waiting_since = None
        seconds = time.perf_counter() - began
        self.waited += seconds
        self._watch.add("wait", seconds)
        return table

    def _microbatch(self, table: pa.Table, step: int, block: int) -> Microbatch:
        rows: list[EncodedRow] = table.to_pylist()
        self._check(rows, step, block)
        self.rejects.add(rows, step + 1)
        batch = self._layout.batch([self._utterances(row) for row in rows])
        with self._watch.phase("copy"):
            batch = batch.to(self._device)
        counts = StepSums(halvings=self._held_halvings)
        self._held_halvings = 0
        for row in rows:
            counts.halvings += row["halvings"]
            self.cache_full = self.cache_full or row["cache_full"]
            used = [n for n, frames in enumerate(row["frames"]) if frames]
            counts.utterances += len(used)
            counts.samples += sum(row["samples"][n] for n in used)
            counts.load_seconds += row["load_seconds"]
            counts.encode_seconds += row["encode_seconds"]
            counts.encoded_samples += row["encoded_samples"]
            counts.rejected += len(row["frames"]) - len(used)
            if row["bin"] != EMPTY:
                numbers = [row["numbers"][n] for n in used]
                self.ledger.add(row["bin"], numbers, [row["ids"][n] for n in used])
        return Microbatch(batch, block, counts)

    def _utterances(self, row: EncodedRow) -> list[Utterance]:
        return utterances(row, self._codec)

    def _check(self, rows: Sequence[EncodedRow], step: int, block: int) -> None:
        """Raise RuntimeError for a block of other bins than the plan says."""
        optim = self._spec.config.optim
        per_step = optim.bins_per_step
        planned = planned_bins(step, block, per_step, optim.bins_per_block, per_step * optim.steps)
        self._compare(rows, "train", planned, f"step {step + 1}")

    @staticmethod
    def _compare(rows: Sequence[EncodedRow], split: str, planned: Sequence[int], when: str) -> None:
        """Raise RuntimeError if the rows of a block are not the planned bins of a split."""
        found = [(row["split"], row["bin"]) for row in rows]
        for number, place in zip_longest(planned, found):
            if place != (split, number):
                sent = "no more bins" if place is None else f"bin {place[1]} of {place[0]}"
                expected = "no more" if number is None else f"bin {number} of {split}"
                raise RuntimeError(f"{when}: the stream sent {sent}, expected {expected}")
