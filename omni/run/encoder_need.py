"""Find out whether anything is left to encode: without that, a stream has no encoders.

A recording that cannot be decoded has no features and needs none. Only decoding finds that out, so
the last few that the cache lacks are tried.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omni.audio.decode import AudioError, decode_with_retry
from omni.corpus.index_row import Recording, recordings, span_of
from omni.plan.plan import Split
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import register_credentials
from omni.stream.feature_cache import FeatureCache
from omni.stream.stream_settings import StreamSettings

_FEW = 64
"""So many missing recordings are decoded to see whether they have features at all."""


def needs_encoder(splits: Mapping[str, Split], settings: StreamSettings, first_step: int) -> bool:
    """Tell whether any held-out bin, or bin of training from `first_step` on, is to be encoded."""
    cache = settings.open_cache()
    if cache is None or not cache.stored_bytes:
        return True
    for name, split in splits.items():
        if name == "train" and split.augmentation is not None:
            return True
        if split.reader is not None:
            # Any window may follow, so all parts are looked through until one lacks something.
            files = split.reader.files
            for part in range(len(files)):
                table = files.all_rows(part)
                if missing_share(table, np.arange(len(table)), settings, cache):
                    return True
            continue
        plan, first = split.beginning, 0
        if name == "train":
            first = int(plan.starts[min(first_step * plan.bins_per_step, plan.bins)])
        if missing_share(split.table, np.unique(plan.members[first:]), settings, cache):
            return True
    return False


def missing_share(
    rows: pa.Table, members: np.ndarray, settings: StreamSettings, cache: FeatureCache
) -> float:
    """Return the share of these utterances' recordings that will be encoded, without augmentation.

    members: rows of the table. 0 also where the few that the cache lacks cannot be decoded.
    """
    table = rows.select(["key", "audios"]).take(pa.array(members, pa.int64()))
    plain = table.filter(pc.is_null(table["audios"]))["key"]
    inside = [chunk.flatten().field("key") for chunk in table["audios"].chunks]
    keys = pc.unique(pa.chunked_array([*plain.chunks, *inside], pa.large_string())).to_pylist()
    absent = set(cache.absent(keys))
    if len(absent) <= _FEW:
        register_credentials(settings.config.locations)
        wanted = pc.or_(
            pc.is_valid(table["audios"]),
            pc.is_in(table["key"], pa.array(absent, pa.large_string())),
        )
        chosen = rows.take(pa.array(members[wanted.to_numpy()], pa.int64())).to_pylist()
        tried = {r["key"]: r for row in chosen for r in recordings(row) if r["key"] in absent}
        if not any(parallel_map(_can_be_decoded, tried.values())):
            return 0.0
    return len(absent) / len(keys) if keys else 0.0


def _can_be_decoded(recording: Recording) -> bool:
    try:
        decode_with_retry(recording["uri"], span_of(recording), samples=recording["samples"])
    except AudioError:
        return False
    except OSError:  # Its storage may answer later.
        return True
    return True
