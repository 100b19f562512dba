"""jobs.index as people run it: killed, run again, and trained on."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import omni
from jobs import index
from omni.corpus.index import build_index, read_index_folder
from omni.model.encoder.whisper import WhisperEncoder
from tests.corpus.test_sources import SHAPES, audio_of, make_corpus, same
from tests.helpers.long_recordings import bridges, uncovered, write_long
from tests.helpers.loopback_datasets import serve

ROOT = Path(omni.__file__).parents[1]


def command(out: Path, *arguments: Any) -> list[str]:
    return [sys.executable, "-m", "jobs.index", "--out", str(out), *map(str, arguments)]


def job(out: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The jobs in this process find Ray started, with one CPU: it is worker processes that take
    time."""
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=1, logging_level=logging.ERROR, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 30)
    return folder


def test_two_sources_one_index_and_nothing_is_done_twice(
    corpus: Path, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (corpus / "clips" / "0000.flac").read_bytes()
    table = pa.table({"id": ["x", "y"], "audio": [good, b"noise"], "text": ["hi", "ho"]})
    pq.write_table(table, tmp_path / "more.parquet")
    sources = ["--source", corpus / "corpus.jsonl", "--source", tmp_path / "more.parquet"]
    settings = [*sources, "--rows_per_part", 10, "--language", "fr"]
    arguments = ["--out", str(tmp_path / "out"), *map(str, settings)]
    assert index.main(arguments) == 0
    done = capsys.readouterr().out
    assert "4 of 4 parts" in done and "31 utterances" in done
    assert "en 30, fr 1" in done and "unreadable 1" in done
    assert re.search(r"\bspeakers +3\b", done)
    found = build_index([str(tmp_path / "out")])
    assert found.table["id"].to_pylist() == [f"u{n:04}" for n in range(30)] + ["x"]
    assert [(r.id, r.reason) for r in found.rejects] == [("y", "unreadable")]

    os.utime(corpus / "corpus.jsonl")
    (tmp_path / "more.parquet").unlink()
    pq.write_table(table.slice(0, 1), tmp_path / "more.parquet")
    assert index.main(arguments) == 0
    again = capsys.readouterr().out
    assert "1 of 4 parts" in again, "the lines of the manifest are the same"
    assert "unreadable" not in again
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 4


def test_long_recordings_are_cut_by_the_job(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    said = write_long(tmp_path / "in" / "talk.flac", 0.5)
    settings = ["--segment", "vad", "--longest_seconds", "10", "--out", str(tmp_path / "out")]
    assert index.main(["--source", f"folder:{tmp_path / 'in'}", *settings]) == 0
    done = capsys.readouterr().out
    assert re.search(rf"\bno text +{len(said)}\b", done)
    assert "python -m jobs.transcribe" in done
    rows = read_index_folder(tmp_path / "out")[0].to_pylist()
    spans = [(row["start"], row["duration"]) for row in rows]
    assert uncovered(said, spans) == [] and bridges(said, spans) == []
    assert max(duration for _, duration in spans) <= 10


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["--longest_seconds", "10"], "--longest_seconds: .*--segment"),
        (["--segment", "vad", "--longest_seconds", "0"], r"--longest_seconds: .*\b1\b.*\b0\b"),
        (["--rows_per_part", "0"], r"--rows_per_part: .*\b1\b.*\b0\b"),
    ],
)
def test_wrong_settings_exit_with_2(
    settings: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", "embedded:dev", "--out", str(tmp_path / "out"), *settings]
    assert index.main(arguments) == 2
    assert re.search(f"error: {named}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_wrong_input_exits_with_2_in_one_line(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"audio": "a.wav", "text": "a"}\n{"audio": "a.wav"}\n')
    assert index.main(["--out", str(tmp_path / "out"), "--source", str(manifest)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --source") and f"{manifest}:2: " in line and "'text'" in line
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.slow
def test_a_killed_job_goes_on_and_training_reads_its_index(tmp_path: Path) -> None:
    make_corpus(tmp_path, 200)
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    (tmp_path / "in").mkdir()
    source = SHAPES["hf parquet"][0](tmp_path, rows, tmp_path / "in")
    extra = SHAPES["webdataset"][0](tmp_path, rows, _folder(tmp_path / "wds"))
    out, settings = tmp_path / "out", ["--source", source, "--source", extra, "--number_ids"]
    running = subprocess.Popen(
        command(out, *settings), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not list(out.glob("parts/*.parquet")):
            assert running.poll() is None
            time.sleep(0.01)
    finally:  # also when the test itself runs out of time
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert not (out / "index.json").exists()
    made = len(list(out.glob("parts/*.parquet")))

    done = job(out, *settings)
    assert done.returncode == 0, done.stderr
    [(first, total)] = re.findall(r"\b(\d+) of (\d+) parts\b", done.stdout)
    assert 0 < int(first) <= int(total) - made + 2, "two tasks may have ended after the look"
    assert int(first) < int(total)
    found, plain = build_index([str(out)]), build_index([str(tmp_path / "corpus.jsonl")])
    assert len(found) == 400
    assert found.table["key"].to_pylist() == 2 * plain.table["key"].to_pylist()
    assert not list(out.glob("*/*.tmp"))

    (tmp_path / "small.yaml").write_text("model: {n_layer: 1, n_embd: 64, n_head: 1}")
    settings = ["--config", str(tmp_path / "small.yaml")]
    settings += ["--optim.steps", "3", "--optim.bin_positions", "512", "--data.max_rejects", "0"]
    settings += ["--data.train", str(out), "--run.storage", str(tmp_path / "runs")]
    trained = subprocess.run(
        [sys.executable, "-m", "jobs.train", *settings],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "ms"])
def test_200_utterances_of_a_hub(kind: str, tmp_path: Path) -> None:
    rows = make_corpus(tmp_path, 200)
    SHAPES["hf parquet"][0](tmp_path, rows, tmp_path)
    with serve("someone/speech", tmp_path / "hub") as (url, asked):
        done = hub_job(url, tmp_path, f"{kind}:someone/speech:train")
    assert done.returncode == 0, f"{done.stderr}\n{asked}"
    assert "3 of 3 parts" in done.stdout
    expected = build_index([str(tmp_path / "corpus.jsonl")])
    assert len(expected) == 200
    found = build_index([str(tmp_path / "out")])
    same(found, expected, True, speakers=True)
    for one, other in zip(audio_of(found), audio_of(expected), strict=True):
        assert np.array_equal(one, other), "and with the audio the features"


def hub_job(url: str, folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    places = {"HF_HOME": str(folder / "hf"), "MODELSCOPE_CACHE": str(folder / "ms")}
    return subprocess.run(
        command(folder / "out", "--source", source),
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, **places, "HF_ENDPOINT": url, "MODELSCOPE_ENDPOINT": url},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["hf", pytest.param("ms", marks=pytest.mark.slow)])
def test_a_hub_that_is_down_may_come_back(kind: str, tmp_path: Path) -> None:
    with serve("someone/speech", tmp_path) as (url, _):
        pass  # nobody listens there any more
    done = hub_job(url, tmp_path, f"{kind}:someone/speech:train")
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: --source: {kind}:someone/speech:train: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "ms"])
def test_a_dataset_that_no_hub_has_is_wrong_input(kind: str, tmp_path: Path) -> None:
    with serve("someone/speech", tmp_path) as (url, _):
        done = hub_job(url, tmp_path, f"{kind}:someone/else")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: --source: {kind}:someone/else: ")


@pytest.mark.slow
def test_a_hub_that_stops_to_serve_may_come_back(corpus: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (corpus / "corpus.jsonl").read_text().splitlines()]
    SHAPES["hf parquet"][0](corpus, rows, tmp_path)
    with serve("someone/speech", tmp_path / "hub", overloaded="00002-of-00003.parquet") as (url, _):
        done = hub_job(url, tmp_path, "hf:someone/speech:train")
    assert done.returncode == 1, done.stderr
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2, "what it served is kept"
    with serve("someone/speech", tmp_path / "hub") as (url, _):
        done = hub_job(url, tmp_path, "hf:someone/speech:train")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 parts" in done.stdout


@pytest.mark.slow
def test_200_utterances_through_all_sources(cluster: None, tmp_path: Path) -> None:
    make_corpus(tmp_path, 200)
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    expected = build_index([str(tmp_path / "corpus.jsonl")])
    encoder = WhisperEncoder("embedded")
    wanted = audio_of(expected)
    features = encoder.encode(wanted[::10])
    for shape, (write, bytes_too, speakers) in SHAPES.items():
        source = write(tmp_path, rows, _folder(tmp_path / "in"))
        arguments = ["--source", source, "--out", str(tmp_path / "out"), "--allow_absolute"]
        assert index.main(arguments) == 0, shape
        found = build_index([str(tmp_path / "out")])
        same(found, expected, bytes_too, speakers)
        audio = audio_of(found)
        for one, other in zip(audio, wanted, strict=True):
            assert np.array_equal(one, other), shape
        for one, other in zip(encoder.encode(audio[::10]), features, strict=True):
            assert (one - other).abs().max() < 1e-3
        shutil.rmtree(tmp_path / "in")
        shutil.rmtree(tmp_path / "out")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
