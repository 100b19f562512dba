"""The load stage reads recordings from a bucket as it reads them from disk."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from omni.config import Config, parse_config
from omni.run.prepare import Prepared, prepare
from omni.storage import path as places
from omni.storage.path import ObjectPath, as_path
from omni.storage.s3_client import read_start
from omni.stream.stages import load_bin
from omni.stream.stream_settings import stream_settings
from tests.helpers.loopback_s3 import s3_bucket, server_requests
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

        # Nothing but one request for each recording, whether its neighbour is unusable or not.
        with server_requests() as requests:
            again = _loaded(far)
        assert [row["mels"] for row in again] == [row["mels"] for row in wanted]
        names = [uri.rpartition("/")[2] for row in wanted for uri in row["uris"]]
        assert sorted(requests) == sorted(f"GET corpus/{name}" for name in names)

        gone = found[0]["uris"][0]
        (there / gone.rpartition("/")[2]).unlink()
        first, *others = _loaded(far)[0]["errors"]
        assert first.startswith("missing\n") and gone in first
        assert others == [None] * len(others), "the others keep their places"


def test_recordings_of_an_archive_in_a_bucket_take_a_request_each(tmp_path: Path) -> None:
    rows = embedded("train", 12)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, row in enumerate(rows):
            (tmp_path / f"{number:04}.txt").write_text(row["text"])
            tar.add(row["audio"], f"{number:04}.opus")
            tar.add(tmp_path / f"{number:04}.txt", f"{number:04}.txt")
    with s3_bucket("archive") as uri:
        there = as_path(uri) / "shard.tar"
        there.upload(tmp_path / "shard.tar")  # type: ignore[union-attr]
        here = prepare(_config(tmp_path / "runs", str(tmp_path / "shard.tar")))
        far = prepare(_config(tmp_path / "runs", there.uri))  # type: ignore[union-attr]
        wanted = _loaded(here)
        with server_requests() as requests:
            found = _loaded(far)
        assert [row["mels"] for row in found] == [row["mels"] for row in wanted]
        used = sum(len(row["ids"]) for row in found)
        assert requests == ["HEAD shard.tar", *["GET shard.tar"] * used]


@pytest.mark.parametrize("size", [0, 1, 1000, 1001, 5000])
def test_the_start_of_an_object_is_all_of_a_small_one(tmp_path: Path, size: int) -> None:
    with s3_bucket("starts") as uri:
        there = as_path(uri) / "a.bin"
        assert isinstance(there, ObjectPath)
        there.write_bytes(bytes(range(250)) * 20 if size == 5000 else bytes(size))
        found = read_start(there, 1000)
        assert found == (bytes(size) if size <= 1000 else None)
        with pytest.raises(OSError):
            read_start(there.with_name("b.bin"), 1000)


def test_a_recording_that_utterances_share_is_asked_for_once(tmp_path: Path) -> None:
    """Also where it is unusable: those after it are still fetched ahead, and once."""
    rows = embedded("train", 12)
    with s3_bucket("shared") as uri:
        there = as_path(uri)
        assert isinstance(there, ObjectPath)
        lines = []
        for number, row in enumerate(rows):
            name = f"{number:04}.opus"
            (tmp_path / name).write_bytes(Path(row["audio"]).read_bytes())
            (there / name).upload(tmp_path / name)
            lines += [{**row, "audio": name}, {**row, "audio": name, "id": f"again-{number}"}]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (there / "m.jsonl").upload(tmp_path / "m.jsonl")
        config = _config(tmp_path / "runs", (there / "m.jsonl").uri)
        prepared = prepare(config)
        settings = stream_settings(prepared.config, prepared.encoder)
        split = prepared.splits["train"]
        row = load_bin(split, 0, settings, None)
        shared = [key for [key] in row["keys"]]
        assert len(set(shared)) < len(shared), "a bin holds both utterances of a recording"
        # One of them decodes to nothing usable now.
        twice = next(uri for uri in row["uris"] if row["uris"].count(uri) == 2)
        (there / twice.rpartition("/")[2]).write_bytes(b"no sound")
        with server_requests() as requests:
            found = load_bin(split, 0, settings, None)
        assert [error is not None for error in found["errors"]] == [
            name == twice for name in found["uris"]
        ]
        assert len(requests) == len(set(row["uris"])), requests
