"""A run is without encoders once the cache holds all that they could add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from omni.config import parse_config
from omni.corpus.index_row import recordings
from omni.plan.plan import Split
from omni.run.encoder_need import needs_encoder
from omni.run.prepare import Prepared, prepare
from omni.stream.feature_cache import FeatureCache
from omni.stream.stream_settings import StreamSettings, stream_settings
from tests.helpers.whole_runs import embedded, write_manifest


def _prepared(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Prepared:
    values = {
        "run": {"storage": str(folder / "runs")},
        "data": {
            "train": str(write_manifest(folder / "train", rows)),
            "dev": str(write_manifest(folder / "dev", embedded("dev", 4))),
            "allow_absolute": True,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
        "optim": {"bin_positions": 128, "bins_per_step": 1, "steps": 4, "warmup_steps": 1},
        **sections,
    }
    return prepare(parse_config(values))


def _keys(split: Split, members: Iterable[int]) -> list[str]:
    rows = split.table.take(pa.array(members, pa.int64())).to_pylist()
    return [recording["key"] for row in rows for recording in recordings(row)]


def _put(settings: StreamSettings, keys: list[str]) -> None:
    assert settings.cache is not None
    cache = FeatureCache(settings.cache)
    cache.put(dict.fromkeys(keys, b"features"))
    cache.flush()


def test_whatever_is_left_in_the_plan_counts_and_nothing_else(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, embedded("train", 16))
    splits, settings = prepared.splits, stream_settings(prepared.config, prepared.encoder)
    train, plan = splits["train"], splits["train"].plan
    assert needs_encoder(splits, settings, 0), "there is no cache yet"
    assert needs_encoder(splits, replace(settings, cache=None), 4)
    later = set(plan.members[plan.starts[2] :].tolist())
    first = set(plan.members[: plan.starts[2]].tolist()) - later
    assert first and later
    _put(settings, _keys(train, later))
    assert needs_encoder(splits, settings, 2), "dev is missing"
    _put(settings, _keys(splits["dev"], range(4)))
    assert not needs_encoder(splits, settings, 2)
    assert needs_encoder(splits, settings, 0)
    _put(settings, _keys(train, first))
    assert not needs_encoder(splits, settings, 0)


def test_recordings_that_cannot_be_decoded_need_no_encoder(tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    soundfile.write(broken, np.full(16_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    parts = [{"audio": str(broken), "text": "a"}, {"audio": embedded("train", 9)[8]["audio"]}]
    talk = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]}
    rows = [*embedded("train", 8), {"audio": str(broken), "text": "no sound", "id": "broken"}]
    for more in ([], [talk]):
        prepared = _prepared(tmp_path / str(len(more)), [*rows, *more])
        splits, settings = prepared.splits, stream_settings(prepared.config, prepared.encoder)
        keys = [key for s in splits.values() for key in _keys(s, range(s.table.num_rows))]
        [no_sound] = _keys(splits["train"], [8])
        kept = [key for key in keys if key != no_sound]
        assert len(kept) == len(keys) - 1 - len(more)
        _put(settings, kept[:-1])
        assert needs_encoder(splits, settings, 0)
        _put(settings, kept)
        assert not needs_encoder(splits, settings, 0)


def test_changed_audio_is_encoded_in_every_epoch(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, embedded("train", 8), augment={"gain_probability": 0.5})
    splits, settings = prepared.splits, stream_settings(prepared.config, prepared.encoder)
    for split in splits.values():
        _put(settings, _keys(split, range(split.table.num_rows)))
    assert splits["train"].augmentation is not None and needs_encoder(splits, settings, 0)
