"""Prepare augmentation: corpora of noise and rooms, lengths at each speed, notes on the cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from omni.audio.windows import encoder_frames
from omni.augment.augment import Augmentation
from omni.augment.noise import Clips, read_clips
from omni.augment.speed import Speeds, changed_length, names_of
from omni.config import Config
from omni.corpus.index_row import IndexRow, recordings
from omni.corpus.manifest import ManifestError
from omni.errors import ConfigError
from omni.plan.sequences import sequence_positions
from omni.storage.uri import report_storage_errors


def augmentation_of(config: Config, speeds: Callable[[], Speeds | None]) -> Augmentation | None:
    """Return the augmentation of the training utterances; None without any.

    speeds: makes their speeds, where these change. Raises ConfigError if a corpus of noises or
    rooms cannot be used.
    """
    settings = config.augment
    if settings.clean_share == 1:
        return None
    return Augmentation(
        settings,
        config.run.seed,
        None if settings.speed == [1.0] else speeds(),
        _clips(config, "noise"),
        _clips(config, "reverb"),
    )


def augmentation_notes(config: Config) -> list[str]:
    """Say which audio the feature cache still serves beside augmentation."""
    share = config.augment.clean_share
    if share == 1 or config.cache is None:
        return []
    held = " and ".join(name for name in ("dev", "test") if getattr(config.data, name))
    left = f", and the {share:.0%} of training audio that an epoch leaves as it is" if share else ""
    return [f"augment: the feature cache serves only {held}{left}; the encoder runs in every epoch"]


def _clips(config: Config, name: str) -> Clips:
    try:
        with report_storage_errors(f"augment.{name}"):
            return read_clips(
                getattr(config.augment, name),
                name,
                cache_dir=config.cache_dir,
                allow_absolute=config.data.allow_absolute,
            )
    except ManifestError as error:
        raise ConfigError(f"augment.{name}: {error}") from None


def speeds_of(config: Config, table: pa.Table, lengths: np.ndarray) -> Speeds:
    """Count the positions of each utterance at each speed.

    table: the index with token ids. lengths: (n,) positions at speed 1; 0: not in the plan.
    """
    speeds = config.augment.speed
    samples = [[r["samples"] for r in recordings(row)] for row in _index_rows(table)]
    ids = [len(tokens) for tokens in table["tokens"].to_pylist()]
    positions = np.zeros((len(speeds), len(ids)), dtype=np.int32)
    for number, speed in enumerate(speeds):
        for i, (of_row, count) in enumerate(zip(samples, ids, strict=True)):
            changed = [changed_length(n, speed) for n in of_row]
            frames = [encoder_frames(n, config.encoder.mode) for n in changed]
            need = sequence_positions(
                frames, count, config.model.stack, config.model.summary_tokens
            )
            positions[number, i] = need if need <= config.optim.bin_positions else 0
    return Speeds(
        tuple(speeds), positions, lengths, names_of(table["key"].to_pylist()), config.run.seed
    )


def _index_rows(table: pa.Table) -> list[IndexRow]:
    rows: list[IndexRow] = table.select(["samples", "audios"]).to_pylist()
    return rows
