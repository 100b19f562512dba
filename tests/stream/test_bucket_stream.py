"""The load stage reads recordings from a bucket as it reads them from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni.config import Config, parse_config
from omni.run.prepare import Prepared, prepare
from omni.storage import path as places
from omni.storage.path import ObjectPath, as_path
from omni.stream.stages import load_bin
from omni.stream.stream_settings import stream_settings
from tests.helpers.loopback_s3 import s3_bucket
from tests.helpers.whole_runs import embedded


def _config(storage: Path, train: str) -> Config:
    return parse_config(
        {
            "run": {"storage": str(storage)},
            "data": {"train": [train], "dev": ["embedded:dev"], "cache": None},
            "tokenizer": {"vocab_size": 300},
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 32},
            "optim": {"bin_positions": 512, "bins_per_step": 1, "steps": 3},
        }
    )


def _loaded(prepared: Prepared) -> list[dict[str, Any]]:
    settings = stream_settings(prepared.config, prepared.encoder)
    return [load_bin(prepared.splits["train"], number, settings, None) for number in range(2)]


def test_utterances_of_a_bucket_are_those_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_bucket("stream") as uri:
        there = as_path(uri) / "corpus"
        assert isinstance(there, ObjectPath)
        lines = []
        for number, row in enumerate(embedded("train", 12)):
            name = f"{number:04}{Path(row['audio']).suffix}"
            (tmp_path / name).write_bytes(Path(row["audio"]).read_bytes())
            (there / name).upload(tmp_path / name)
            lines.append(json.dumps({**row, "audio": name}) + "\n")
        (tmp_path / "m.jsonl").write_text("".join(lines))
        (there / "m.jsonl").upload(tmp_path / "m.jsonl")
        here = prepare(_config(tmp_path / "runs", str(tmp_path / "m.jsonl")))
        far = prepare(_config(tmp_path / "runs", (there / "m.jsonl").uri))
        assert far.fingerprints == here.fingerprints
        wanted = _loaded(here)

        # A loader is another process: all that it knows of the bucket is in the settings.
        monkeypatch.setattr(places, "_known", {})
        found = _loaded(far)
        for one, other in zip(found, wanted, strict=True):
            for column in ("mels", "keys", "ids", "errors", "samples"):
                assert one[column] == other[column], column
            assert all(name.startswith("s3://stream/corpus/") for name in one["uris"])

        gone = found[0]["uris"][0]
        (there / gone.rpartition("/")[2]).unlink()
        first, *others = _loaded(far)[0]["errors"]
        assert first.startswith("missing\n") and gone in first
        assert others == [None] * len(others), "the others keep their places"
