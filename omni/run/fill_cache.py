"""Fill the feature cache ahead of training: every utterance of a config's splits, once.

Training audio that augmentation changes in every epoch is not encoded: nobody would read it.
What the cache holds already is left alone, so the same command continues an interrupted one, and a
training run that comes later (or goes on meanwhile) reads what it finds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from omni.audio.logmel import FRAME, SAMPLING_RATE
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.index_row import recordings
from omni.corpus.splits import build_indexes
from omni.errors import ConfigError
from omni.model.encoder.whisper import CPU_FRAMES, GPU_FRAMES
from omni.plan.plan import Plan, Split
from omni.run.actor_count import assume_actors
from omni.storage.path import join
from omni.stream.encoder_facts import describe_encoder
from omni.stream.feature_cache import FeatureCache
from omni.stream.pipeline import make_stream
from omni.stream.settings import StreamSettings, stream_settings

_SAY_SECONDS = 5.0


def fill_cache(config: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Encode what the feature cache lacks, and count; `say` gets a line of progress now and then.

    Stops where the cache is full. Returns utterances (of different audio), `cached` before,
    `encoded`, `kept` at the end, `rejects` by reason, audio_seconds, seconds, gigabytes, and
    `full`: why the cache kept no more, or None.
    Raises ConfigError when the input is wrong.
    """
    config = assume_actors(config, 1)
    if config.cache is None:
        raise ConfigError("data.cache: expected a folder or URI; null keeps nothing")
    indexes = build_indexes(config)
    facts = describe_encoder(config, indexes["train"])
    settings = stream_settings(config, facts)
    if not config.augment.clean_share:
        del indexes["train"]
        say("augment changes all training audio in every epoch: only dev and test are encoded")
    if not indexes:
        raise ConfigError("augment: it changes all training audio, and there is no other to encode")
    rejects = Counter(r.reason for index in indexes.values() for r in index.rejects)
    table = _distinct(indexes)
    keys = table["key"].to_pylist()
    cache = FeatureCache(join(config.cache, facts.cache_folder))
    missing = np.flatnonzero([key not in cache for key in keys])
    result: dict[str, Any] = {
        "location": cache.location,
        "utterances": len(keys),
        "cached": len(keys) - len(missing),
        "encoded": 0,
        "audio_seconds": 0.0,
        "seconds": 0.0,
        "full": None,
    }
    say(f"{len(keys):,} utterances, {result['cached']:,} of them in {cache.location}")
    if len(missing):
        split = _split(table, missing, GPU_FRAMES if config.encoder.gpus else CPU_FRAMES)
        start_ray(config)
        settings = replace(settings, keep_features=False, bins_per_block=1)
        _follow(_drain.remote([ray.put(split)], settings), result, rejects, len(missing), say)
        cache.refresh()
    kept = sum(key in cache for key in keys)
    return {**result, "kept": kept, "gigabytes": cache.stored_bytes / 1e9, "rejects": dict(rejects)}


def _distinct(indexes: dict[str, Index]) -> pa.Table:
    """Recordings of all splits, one for each content key, with the columns of the stream."""
    table = pa.concat_tables([index.table for index in indexes.values()])
    if table["audios"].null_count < len(table):
        rows = [{**row, **r, "audios": None} for row in table.to_pylist() for r in recordings(row)]
        table = pa.Table.from_pylist(rows, table.schema)
    _, first = np.unique(np.asarray(table["key"].to_pylist()), return_index=True)
    table = table.take(pa.array(np.sort(first)))
    for name in ("tokens", "supervised", "teacher_tokens", "task_number"):
        table = table.append_column(name, pa.nulls(len(table)))
    return table


def _split(table: pa.Table, missing: np.ndarray, frames: int) -> Split:
    """The missing utterances in blocks of about `frames` encoder frames, similar lengths together.

    Longest first: no actor is left with a long block when the others are done.
    """
    lengths = table["samples"].to_numpy()[missing] // FRAME + 1
    order = np.argsort(-lengths, kind="stable")
    blocks = np.cumsum(lengths[order]) // frames
    starts = np.concatenate(([0], np.flatnonzero(np.diff(blocks)) + 1, [len(order)]))
    members = missing[order].astype(np.int32)
    ends = np.asarray([len(starts) - 1])
    return Split("encode", table, Plan(members, starts, ends, 1, fingerprint=""))


@ray.remote(num_cpus=0)
def _drain(
    splits: list[ray.ObjectRef[Split]], settings: StreamSettings
) -> Iterator[list[dict[str, Any]]]:
    """Pull the stream to its end, in a process of its own as in training; its rows are counts."""
    torch.set_num_threads(1)
    bins = np.arange(ray.get(splits[0]).plan.bins)
    stream = make_stream(splits, [(0, bins)], settings)
    for block in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield pa.table(block).select(_COUNTS).to_pylist()


_COUNTS = ["frames", "encoded_samples", "errors", "cache_full"]


def _follow(
    counts: Any,  # a generator of references to rows
    result: dict[str, Any],
    rejects: Counter[str],
    total: int,
    say: Callable[[str], None],
) -> None:
    """Add up what the stream's rows say, and tell from time to time."""
    began = shown = time.monotonic()
    done = 0
    for reference in counts:
        try:
            rows = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise RuntimeError(
                f"encoding stopped: {str(error).strip().splitlines()[-1]}"
            ) from error
        for row in rows:
            done += len(row["frames"])
            result["encoded"] += sum(map(bool, row["frames"]))
            result["audio_seconds"] += row["encoded_samples"] / SAMPLING_RATE
            result["full"] = result["full"] or row["cache_full"]
            rejects.update(e.partition("\n")[0] for e in row["errors"] if e is not None)
        result["seconds"] = time.monotonic() - began
        if time.monotonic() - shown > _SAY_SECONDS or done == total:
            shown = time.monotonic()
            rate = result["audio_seconds"] / result["seconds"]
            say(f"{done:,}/{total:,} utterances, {rate:,.0f} audio-s/s")
        if result["full"]:
            return
