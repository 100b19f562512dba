"""Utterances of several tasks about one recording: it is decoded once per bin, and encoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from omni.config.load import parse_config
from omni.run.prepare import prepare
from omni.stream import stages
from omni.stream.schema import LOADED_SCHEMA
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import stream_settings


def test_a_recording_of_several_tasks_is_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {
        name: {"prompt": f"{name}?", "answer": "{{ 'long' if seconds > 1 else 'short' }}"}
        for name in ("one", "two")
    }
    prepared = prepare(
        parse_config(
            {
                "run": {"storage": str(tmp_path)},
                "data": {"train": "embedded:test", "dev": "embedded:test", "tasks": tasks},
                "tokenizer": {"vocab_size": 300},
                "optim": {"bin_positions": 512, "steps": 4},
            }
        )
    )
    settings = stream_settings(prepared.config, prepared.encoder)
    split, cache = prepared.splits["dev"], settings.open_cache()
    decoded: list[str] = []
    real = stages.decode_with_retry
    monkeypatch.setattr(
        stages, "decode_with_retry", lambda uri, *a, **k: decoded.append(uri) or real(uri, *a, **k)
    )
    encode, samples = EncodeStage(settings), 0
    for number in range(split.plan.bins):
        decoded.clear()
        row = load_bin(split, number, settings, cache)
        assert len(decoded) == len(set(decoded))
        [done] = encode(pa.Table.from_pylist([row], LOADED_SCHEMA)).to_pylist()
        samples += done["encoded_samples"]
        assert all(done["frames"])
    keys, first = np.unique(split.table["key"].to_pylist(), return_index=True)
    assert split.table.num_rows == 3 * len(keys)
    assert samples == split.table["samples"].to_numpy()[first].sum()
