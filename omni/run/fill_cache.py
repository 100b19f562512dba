"""Fill the feature cache ahead of training: encode each utterance of a config's splits once.

Training audio that augmentation changes in every epoch is not encoded, since no run could reuse its
features. Cached features are kept, so the same command continues an interrupted one, and training
that runs later or at the same time reads them.
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

from omni.audio.windows import FRAME, SAMPLING_RATE
from omni.cluster.ray_errors import ray_reason
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.index_row import recordings
from omni.corpus.parts import PartedCorpus
from omni.corpus.rejects import count_reasons
from omni.corpus.splits import naming_settings, open_corpora
from omni.errors import ConfigError, counted
from omni.model.encoder.whisper import CPU_FRAMES, GPU_FRAMES
from omni.plan.plan import Plan, Split
from omni.plan.stream_order import ListedBins
from omni.run.actor_count import assume_actors
from omni.run.prepare_parts import read_sample
from omni.run.prepared_part import read_with_text
from omni.storage.path import as_path, join
from omni.storage.uri import reason_of, report_storage_errors
from omni.stream.compaction import compact, compact_if_many
from omni.stream.encoder_facts import describe_encoder
from omni.stream.feature_cache import FeatureCache
from omni.stream.pipeline import SharedSettings, make_stream
from omni.stream.stream_settings import StreamSettings, stream_settings

_PROGRESS_SECONDS = 5.0


def fill_cache(config: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Encode the utterances that the feature cache lacks; report progress lines to `say`.

    Training data of more than `data.window_utterances` is read window by window. Stops when the
    cache is full. Returns counts of `utterances` with distinct audio (in their window), those
    `cached` before, `encoded` now and `kept` at the end; `rejects` by reason; `audio_seconds`,
    `seconds` and `gigabytes`; and `full`, the reason why the cache took no more, or None.
    Raises ConfigError when the config or its data cannot be used.
    """
    config = assume_actors(config, 1)
    if config.cache is None:
        raise ConfigError("data.cache: expected a folder or URI; null turns the cache off")
    indexes, corpus = open_corpora(config)
    sample = indexes["train"] if corpus is None else read_sample(corpus, config)
    facts = describe_encoder(config, sample)
    settings = stream_settings(config, facts)
    notes = [note for index in indexes.values() for note in index.notes]
    rejects = Counter(count_reasons(r.reason for i in indexes.values() for r in i.rejects))
    if corpus is not None:
        notes += corpus.notes
        rejects.update(count_reasons(reject.reason for reject in corpus.rejects))
    if not config.augment.clean_share:
        corpus = None
        indexes.pop("train", None)
        say("augment changes all training audio in every epoch: only dev and test are encoded")
    if not indexes and corpus is None:
        raise ConfigError("augment: expected clean_share above 0, or dev or test data to encode")
    for note in notes:
        say(f"note: {note}")
    location = join(config.cache, facts.cache_folder)
    cache = FeatureCache(location)
    result: dict[str, Any] = {
        "location": cache.location,
        "utterances": 0,
        "cached": 0,
        "encoded": 0,
        "kept": 0,
        "audio_seconds": 0.0,
        "seconds": 0.0,
        "halvings": 0,
        "full": None,
    }
    if corpus is not None:
        say(f"{corpus.rows:,} utterances of training, window by window")
    for table in _windows(indexes, corpus, config, rejects):
        _encode_window(_distinct_recordings(table), settings, cache, result, rejects, say)
        if result["full"]:
            if corpus is not None:
                say("the windows after this one were not looked through")
            break
    try:
        if (compacted := compact_if_many(location)) is not None:
            say(f"compacted: {compacted}")
    except OSError as error:
        say(f"note: the cache was not compacted: {reason_of(error)}")
    return {**result, "gigabytes": cache.stored_bytes / 1e9, "rejects": dict(rejects)}


def _windows(
    indexes: dict[str, Index], corpus: PartedCorpus | None, config: Config, rejects: Counter[str]
) -> Iterator[pa.Table]:
    """Yield the rows of what is in memory, and then those of the parts, a window at a time.

    Rows of parts without a usable text are counted in `rejects`.
    """
    if indexes:
        yield pa.concat_tables([index.table for index in indexes.values()])
    if corpus is None:
        return
    tables: list[pa.Table] = []
    for part in corpus.parts:
        with naming_settings():
            index = read_with_text(part, config)
        rejects.update(count_reasons(reject.reason for reject in index.rejects))
        tables.append(index.table)
        if sum(map(len, tables)) >= config.data.window_utterances:
            yield pa.concat_tables(tables)
            tables = []
    if tables:
        yield pa.concat_tables(tables)


def _encode_window(
    table: pa.Table,
    settings: StreamSettings,
    cache: FeatureCache,
    result: dict[str, Any],
    rejects: Counter[str],
    say: Callable[[str], None],
) -> None:
    """Encode what the cache lacks of one table's recordings; add to `result` and `rejects`."""
    config = settings.config
    keys = table["key"].to_pylist()
    absent = set(cache.absent(keys))
    missing = np.flatnonzero([key in absent for key in keys])
    cached = len(keys) - len(missing)
    result["utterances"] += len(keys)
    result["cached"] += cached
    say(f"{counted(len(keys), 'utterance')}, {cached:,} already in {cache.location}")
    if len(missing):
        split = _missing_split(table, missing, GPU_FRAMES if config.encoder.gpus else CPU_FRAMES)
        if not ray.is_initialized():
            start_ray(config)
        settings = replace(settings, keep_features=False, bins_per_block=1)
        _add_up(_drain.remote([ray.put(split)], settings), result, rejects, len(missing), say)
        cache.refresh()
    result["kept"] += len(keys) - len(cache.absent(keys))


def compact_cache(config: Config, say: Callable[[str], None] = print) -> None:
    """Compact the feature caches of all encoders in `data.cache`. Raises ConfigError."""
    if config.cache is None:
        raise ConfigError("data.cache: expected a folder or URI; null turns the cache off")
    with report_storage_errors("data.cache"):
        where = as_path(config.cache)
        found = sorted(path.name for path in where.iterdir()) if where.is_dir() else []
        for name in found:
            location = join(config.cache, name)
            if name != "indexes" and as_path(location).is_dir():
                compacted = compact(location)
                say(f"{name}: {'nothing to compact' if compacted is None else compacted}")
    if not found:
        say("there is no cache yet")


def _distinct_recordings(table: pa.Table) -> pa.Table:
    """Collect the recordings of these rows, one per content key, in the columns of the stream."""
    if table["audios"].null_count < len(table):
        rows = [{**row, **r, "audios": None} for row in table.to_pylist() for r in recordings(row)]
        table = pa.Table.from_pylist(rows, table.schema)
    _, first = np.unique(np.asarray(table["key"].to_pylist()), return_index=True)
    table = table.take(pa.array(np.sort(first)))
    for name in ("tokens", "supervised", "transcript_tokens", "task_number"):
        table = table.append_column(name, pa.nulls(len(table)))
    return table.combine_chunks()


def _missing_split(table: pa.Table, missing: np.ndarray, frames: int) -> Split:
    """Group the missing utterances by length into blocks of about `frames` encoder frames.

    The longest come first, so that no actor still has a long block when the others are done.
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
    """Read the stream to its end in a process of its own, as training does; yield its counts."""
    torch.set_num_threads(1)
    bins = np.arange(ray.get(splits[0]).plan.bins)
    stream = make_stream(splits, ListedBins(bins), SharedSettings.put(settings))
    for block in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield pa.table(block).select(_COUNTS).to_pylist()


_COUNTS = ["frames", "encoded_samples", "errors", "cache_full", "halvings"]


def _add_up(
    counts: Any,
    result: dict[str, Any],
    rejects: Counter[str],
    total: int,
    say: Callable[[str], None],
) -> None:
    """Add up the counts of the stream's blocks in `result` and `rejects`, and report progress.

    counts: generator of references to the rows of a block.
    """
    began = shown = time.monotonic()
    before, heard = result["seconds"], result["audio_seconds"]
    done = 0
    for reference in counts:
        try:
            rows = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"encoding stopped: {ray_reason(error)}") from error
        halvings = sum(row["halvings"] for row in rows)
        if halvings and not result["halvings"]:
            say("an encoder ran out of memory and halved its batches, which stay so")
        result["halvings"] += halvings
        for row in rows:
            done += len(row["frames"])
            result["encoded"] += sum(map(bool, row["frames"]))
            result["audio_seconds"] += row["encoded_samples"] / SAMPLING_RATE
            result["full"] = result["full"] or row["cache_full"]
            rejects.update(e.partition("\n")[0] for e in row["errors"] if e is not None)
        seconds = time.monotonic() - began
        result["seconds"] = before + seconds
        if time.monotonic() - shown > _PROGRESS_SECONDS or done == total:
            shown = time.monotonic()
            rate = (result["audio_seconds"] - heard) / seconds
            say(f"{done:,}/{total:,} utterances, {rate:,.0f} audio-s/s")
        if result["full"]:
            return
