"""Prepare a run in a temporary folder, so that suites can measure its stages."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch
from rich.console import Console

from omni.audio.windows import SAMPLING_RATE
from omni.config import Config
from omni.plan.plan import Split
from omni.run.actor_count import assume_actors
from omni.run.prepare import Prepared, prepare
from omni.run.rates import encoder_rate, first_rows, loaded_blocks, without_cache
from omni.stream.collate import Utterance
from omni.stream.schema import utterances
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import StreamSettings, stream_settings
from omni.train.evaluation import Layout


@dataclass(frozen=True)
class Sample:
    """Hold the first bins of a run's plan as log-mels and as features, and the rate of each stage.

    Rates are audio seconds per second of one process that has the machine to itself.
    """

    prepared: Prepared
    settings: StreamSettings
    loaded: list[pa.Table]
    encoded: list[pa.Table]
    load_rate: float
    encode_rate: float

    @property
    def layout(self) -> Layout:
        return Layout.of(self.prepared.config, self.prepared.model)

    def bins(self) -> list[list[Utterance]]:
        rows = [row for block in self.encoded for row in block.to_pylist()]
        return [utterances(row, self.settings.codec) for row in rows]


def take_sample(config: Config, bins: int, seconds: float = 5.0) -> Sample:
    """Load and encode the first `bins` bins of the training plan, in this process."""
    torch.set_num_threads(config.encoder.threads)
    prepared = prepare(config)
    settings = without_cache(stream_settings(config, prepared.encoder))
    train: Split = prepared.splits["train"]
    rows = first_rows(train.plan, bins, config.optim)
    loaded, took = loaded_blocks(train, rows, settings)
    rate, encoded = encoder_rate(EncodeStage(settings), loaded, seconds)
    audio = (
        sum(sum(row) for block in encoded for row in block["samples"].to_pylist()) / SAMPLING_RATE
    )
    return Sample(prepared, settings, loaded, encoded, audio / took, rate)


@contextlib.contextmanager
def in_temporary_storage(config: Config) -> Iterator[Config]:
    """Yield the config with a temporary run.storage, and one encoder actor for `auto`."""
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as folder:
        run = config.run.model_copy(update={"storage": folder})
        yield assume_actors(config.model_copy(update={"run": run}), 1)


def progress(line: str) -> None:
    """Print a line of progress to stderr, since suites take minutes."""
    Console(highlight=False, stderr=True, soft_wrap=True).print(f"[dim]{line}[/]")
