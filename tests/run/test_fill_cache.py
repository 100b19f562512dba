"""The cache is filled ahead of training, by a job that can be killed at any moment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import omni
from jobs import encode
from omni.metrics.run_files import read_events
from omni.stream.codec import FeatureCodec
from omni.stream.feature_cache import FeatureCache
from tests.stream.test_feature_cache import write_old

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROOT = Path(omni.__file__).parents[1]
ROWS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 recordings, of which only decoding finds out that one is no sound, and one row twice."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "audio": str(ASSETS / row["audio"])} for row in rows[: ROWS - 1]]
    broken = folder / "broken.wav"
    soundfile.write(broken, np.full(16_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    rows.append({"audio": str(broken), "text": "silence", "id": "broken"})
    rows.append({**rows[0], "id": "again"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "small.yaml").write_text("model: {n_layer: 1, n_embd: 64, n_head: 1}")
    return path


def _command(job: str, corpus: Path, storage: Path, *overrides: str) -> list[str]:
    settings = ["--config", str(corpus.with_name("small.yaml"))]
    settings += ["--data.train", str(corpus), "--data.dev", "embedded:dev"]
    settings += ["--data.allow_absolute", "true", "--run.storage"]
    return [sys.executable, "-m", f"jobs.{job}", *settings, str(storage), *overrides]


def _run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_killed_job_goes_on_and_training_encodes_nothing(corpus: Path, tmp_path: Path) -> None:
    compact = ["--encoder.format", "int8"]
    job = subprocess.Popen(
        _command("encode", corpus, tmp_path, *compact),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not list(tmp_path.glob("cache/*/keys/*.keys")):
            assert job.poll() is None
            time.sleep(0.02)
    finally:  # also when the test itself runs out of time
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()

    done = _run("encode", corpus, tmp_path, *compact)
    assert done.returncode == 0, done.stderr
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    cache = FeatureCache(folder)
    distinct = ROWS + len((ASSETS / "dev.jsonl").read_text().splitlines())
    [before] = map(int, re.findall(rf"^\s*{distinct} utterances, (\d+) ", done.stdout, re.M))
    assert 0 < before < distinct, "the second command found some of it"
    kept = len(cache)
    assert f" {kept - before:,} utterances" in done.stdout
    assert f" {kept:,} of {distinct:,}" in done.stdout
    assert kept == distinct - 1 and "1 not finite" in done.stdout
    whole = cache.get(cache)
    codec = FeatureCodec(384, format="int8")
    assert len(whole) == kept and all(codec.frames(data) > 0 for data in whole.values())

    steps = ["--optim.steps", "3", "--optim.bin_positions", "512", "--run.name", "after"]
    trained = _run("train", corpus, tmp_path, *compact, *steps)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "after" / "summary.json").read_text())
    assert summary["cached_fraction"] == 1.0
    assert summary["encoder_audio_seconds_per_second"] is None
    assert "no encoders" in summary["throughput_verdict"]
    [attempt] = [e for e in read_events(tmp_path / "after") if e["event"] == "attempt"]
    assert attempt["encoders"] == 0, "the recording that is no sound asks for none"
    assert len(FeatureCache(folder)) == kept


@pytest.mark.slow
def test_a_large_corpus_is_encoded_window_by_window(corpus: Path, tmp_path: Path) -> None:
    """All rows are in no process at the same time; what two windows share is encoded once."""
    done = _run("encode", corpus, tmp_path, "--data.window_utterances", "25")
    assert done.returncode == 0, done.stderr
    assert f"{ROWS + 1} utterances of training, window by window" in done.stdout
    counts = re.findall(r"^\s*(\d+) utterances, (\d+) already in ", done.stdout, re.M)
    dev = len((ASSETS / "dev.jsonl").read_text().splitlines())
    assert [int(rows) for rows, _ in counts][0] == dev and len(counts) == 4
    assert sum(int(rows) for rows, _ in counts) == dev + ROWS + 1
    assert sum(int(cached) for _, cached in counts) == 1, "the row that is there twice"
    [folder] = [path for path in (tmp_path / "cache").iterdir() if (path / "keys").is_dir()]
    assert len(FeatureCache(folder)) == dev + ROWS - 1 and "1 not finite" in done.stdout


@pytest.mark.slow
def test_a_full_cache_stops_the_job_and_names_the_setting(corpus: Path, tmp_path: Path) -> None:
    done = _run("encode", corpus, tmp_path, "--data.cache_gb", "0.004")
    assert done.returncode == 1
    [last] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "0.004 GB" in last and "data.cache_gb" in last
    stored = sum(path.stat().st_size for path in tmp_path.glob("cache/*/*.bin"))
    assert 2_000_000 < stored <= 4_000_000


def test_caches_are_compacted_by_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of all encoders, also as version 0.1 left them; what else is there stays."""
    items = {f"{n:032x}": bytes([n]) * 100 for n in range(12)}
    (tmp_path / "cache" / "indexes" / "x").mkdir(parents=True)
    for encoder in ("one", "other"):
        for shard in range(3):
            part = {key: items[key] for key in list(items)[4 * shard : 4 * shard + 4]}
            write_old(tmp_path / "cache" / encoder, f"shard{shard}", part)
    arguments = ["--config", "scratch", "--run.storage", str(tmp_path), "--compact"]
    for _ in range(2):
        assert encode.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("12 keys of 3 tables in one, 3 shards in 1") == 2
    assert said.count("nothing to compact") == 2
    for encoder in ("one", "other"):
        assert FeatureCache(tmp_path / "cache" / encoder).get(items) == items
    assert list((tmp_path / "cache" / "indexes").iterdir()) == [tmp_path / "cache/indexes/x"]


@pytest.mark.parametrize("cache", ["null", "nowhere://bucket", "s3://"])
def test_no_place_for_the_cache_is_a_wrong_config(corpus: Path, tmp_path: Path, cache: str) -> None:
    done = _run("encode", corpus, tmp_path, "--data.cache", cache)
    assert done.returncode == 2 and done.stderr.startswith("error: data.cache: ")
