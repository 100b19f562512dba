"""What every rank of a run, and every stage of its stream, is told when it starts."""

from __future__ import annotations

import numpy as np

from omni.checkpoint.resume import ResumePoint
from omni.config import Config
from omni.plan.plan import EMPTY, Split
from omni.run.prepare import Prepared
from omni.train.worker_spec import WorkerSpec


def make_job(prepared: Prepared, workers: int = 1, resume: ResumePoint | None = None) -> WorkerSpec:
    """The job of one attempt, with so many workers."""
    train = prepared.splits["train"]
    return WorkerSpec(
        config=prepared.config,
        model=prepared.model,
        encoder=prepared.encoder,
        tokenizer_json=prepared.tokenizer.to_json(),
        template=prepared.template,
        tasks=prepared.tasks,
        fingerprints=prepared.fingerprints,
        held_rows={
            name: len(held_bins(split, prepared.config, workers))
            for name, split in prepared.splits.items()
            if name != "train"
        },
        train_rows=train.table.num_rows,
        epoch_ends=train.plan.epoch_ends.tolist(),
        resume=resume,
    )


def held_bins(split: Split, config: Config, workers: int) -> np.ndarray:
    """A held-out split's bins, filled up so that all ranks take equally many blocks."""
    unit = workers * config.optim.bins_per_block
    bins = np.full(-(-split.plan.bins // unit) * unit, EMPTY, dtype=np.int64)
    bins[: split.plan.bins] = np.arange(split.plan.bins)
    return bins
