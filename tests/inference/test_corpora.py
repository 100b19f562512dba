"""A corpus is transcribed into a corpus: resumed by shard, each row once, with confidences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import transcribe as transcribe_job
from omni.audio.vad import Segmenting
from omni.checkpoint.base import checkpoint_folder
from omni.checkpoint.checkpoint import STATE_FILE
from omni.corpus.build import FEW_PARTS
from omni.corpus.index import build_index
from omni.corpus.sources import Options
from omni.inference.confidence import confidence_of
from omni.inference.corpora import transcribe_to_corpus
from omni.inference.decode_batch import Decoded
from omni.inference.shards import Decoder
from omni.model.decode import DecodingOptions
from omni.model.lm.sampling import Sampling
from tests.helpers.long_recordings import ASSETS, write_long

ROWS = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()][:6]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.inference.shards._SHARD_ROWS", 3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings without texts, one of which is damaged."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for row in ROWS:
        (folder / Path(row["audio"]).name).write_bytes((ASSETS / row["audio"]).read_bytes())
        lines.append({"id": row["id"], "audio": Path(row["audio"]).name, "text": ""})
    (folder / "bad.flac").write_bytes(b"no audio")
    lines.append({"id": "bad", "audio": "bad.flac", "text": ""})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _run(*arguments: object) -> int:
    return transcribe_job.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("wanted", ["parquet", "jsonl"])
def test_transcripts_are_a_corpus_whose_recordings_are_found(
    corpus: Path, tmp_path: Path, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels"
    # A recording that cannot be read is said with exit code 1; the others are there.
    assert _run(corpus / "all.jsonl", "--out", out, "--format", wanted, "--threads", 1) == 1
    assert "left out: 1 unreadable" in capsys.readouterr().out
    spec = out if wanted == "parquet" else out / "transcripts.jsonl"
    index = build_index([str(spec)], allow_absolute=True)
    assert not index.rejects
    assert [row["id"] for row in index.table.to_pylist()] == [row["id"] for row in ROWS]
    if wanted == "parquet":
        about = json.loads((out / "index.json").read_text())
        assert about["decoding"] == "joint, ctc_weight 0.5"
    known = build_index([str(spec)], allow_absolute=True).table["uri"].to_pylist()
    assert all(Path(uri).is_file() for uri in known) and all(index.table["text"].to_pylist())
    # What is finished is not done again: with a damaged shard, only that one.
    shards = sorted((out / "shards").glob("*/*.jsonl"))
    assert len(shards) == 2
    texts, times = index.table["text"].to_pylist(), [s.stat().st_mtime_ns for s in shards]
    shards[1].unlink()
    assert _run(corpus / "all.jsonl", "--out", out, "--format", wanted) == 1
    assert [s.stat().st_mtime_ns == t for s, t in zip(shards, times, strict=True)] == [True, False]
    again = build_index([str(spec)], allow_absolute=True)
    assert again.table["text"].to_pylist() == texts


def test_a_corpus_of_many_parts_needs_no_ray(corpus: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = DecodingOptions(max_new_tokens=1, decode="lm")
    decoder = Decoder(str(checkpoint_folder("omni-tiny")), options=options)
    made = transcribe_to_corpus(
        str(corpus / "all.jsonl"),
        tmp_path,
        decoder,
        Options(rows_per_part=1, segment=Segmenting()),
        actors=None,
        wanted="parquet",
        min_confidence=0.0,
        say=lines.append,
    )
    assert made.utterances == len(ROWS) > FEW_PARTS and made.unread == 1
    assert len(list((tmp_path / "corpus" / "parts").glob("*.parquet"))) == len(ROWS) + 1


def _texts(lines: str) -> dict[str, str]:
    return {row["id"]: row["text"] for row in map(json.loads, lines.splitlines()) if "text" in row}


def test_the_same_seed_draws_the_same_whatever_the_shards(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, short = tmp_path / "labels", ["--max_new_tokens", 8]
    drawn = ["--temperature", 1.2, "--top_p", 0.95, "--seed", 3]

    def to_corpus(*options: object) -> dict[str, str]:
        _run(corpus / "all.jsonl", "--out", out, "--format", "jsonl", *short, *options)
        return _texts((out / "transcripts.jsonl").read_text())

    def in_one(*options: object) -> dict[str, str]:
        capsys.readouterr()
        _run(out / "corpus", *short, *options)
        return _texts(capsys.readouterr().out)

    first = to_corpus(*drawn)
    assert first == in_one(*drawn) and len(first) == len(ROWS)
    folders = sorted((out / "shards").iterdir())
    assert len(folders) == 1
    times = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    # Shards of other settings are not taken for finished.
    assert to_corpus("--beam", 3) != first and len(list((out / "shards").iterdir())) == 2
    assert to_corpus(*drawn) == first
    assert {path: path.stat().st_mtime_ns for path in folders[0].iterdir()} == times


def test_finished_shards_are_named_by_the_settings_of_decoding(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"state")
    table = pa.table({"id": ["a"], "samples": [16_000]})
    every = [
        DecodingOptions(),
        DecodingOptions(beam=2),
        DecodingOptions(decode="lm"),
        DecodingOptions(sampling=Sampling(0.5)),
        DecodingOptions(sampling=Sampling(0.6)),
        DecodingOptions(sampling=Sampling(0.5, 0.9)),
        DecodingOptions(sampling=Sampling(0.5, seed=1)),
    ]
    names = [Decoder(str(tmp_path), options=o, language="de").identity(table) for o in every]
    assert len(set(names)) == len(every)
    assert names[0] == "b188828ac6d178464b67538c", "as before there were beams and draws"


def test_unsure_transcripts_are_left_out_and_counted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels"
    _run(corpus / "all.jsonl", "--out", out, "--format", "jsonl")
    lines = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    sure = sorted(line["confidence"] for line in lines)
    assert all(0 < value <= 1 for value in sure) and sure[0] < sure[-1]
    capsys.readouterr()
    least = (sure[2] + sure[3]) / 2
    _run(corpus / "all.jsonl", "--out", out, "--format", "jsonl", "--min_confidence", least)
    assert "left out: 3 low confidence" in capsys.readouterr().out
    kept = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert kept == [line for line in lines if line["confidence"] >= least]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 3 + 0 and {r["reason"] for r in rejects} == {"low confidence"}


def test_confidence_is_the_product_of_probability_and_agreement() -> None:
    sure = confidence_of(Decoded("a b c d", False, "joint", {"ctc": "a b c d"}, 0.0, 5))
    assert sure.value == 1.0
    half = confidence_of(Decoded("a", False, "joint", {"ctc": "a"}, -5 * 0.6931471805599453, 5))
    assert half.value == pytest.approx(0.5) and half.ctc_agreement == 1.0
    other = confidence_of(Decoded("abcd", False, "joint", {"ctc": "abxx"}, 0.0, 5))
    assert other.value == pytest.approx(0.5)
    alone = confidence_of(Decoded("a", False, "lm", {}, -0.6931471805599453, 1))
    assert (alone.value, alone.ctc_agreement) == (pytest.approx(0.5), None)
    assert confidence_of(Decoded("a", False)).value is None


@pytest.mark.parametrize("wanted", ["txt", "srt", "vtt", "json"])
def test_a_recording_is_written_with_the_times_of_its_spans(tmp_path: Path, wanted: str) -> None:
    path = tmp_path / "talk.flac"
    said = write_long(path, 0.15)
    assert _run(path, "--format", wanted, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / f"talk.{wanted}").read_text()
    if wanted == "json":
        found: dict[str, Any] = json.loads(text)
        assert len(found["segments"]) == len(said)
        for segment, (start, end) in zip(found["segments"], said, strict=True):
            assert abs(segment["start"] - start) < 0.4 and abs(segment["end"] - end) < 0.6
    elif wanted in ("srt", "vtt"):
        assert text.count(" --> ") == len(said)
    else:
        assert text.strip()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["embedded:dev"], "--out"),
        (["embedded:dev", "--out", "x", "--format", "srt"], "--format srt"),
        (["a.flac", "--actors", "2"], "--actors"),
        (["a.flac", "--top_p", "0.9"], "--top_p"),
        (["a.flac", "--seed", "1", "--temperature", "0"], "--seed"),
        (["a.flac", "--beam", "2", "--temperature", "1"], "--beam"),
        (["a.flac", "--beam", "2", "--decode", "ctc"], "--beam"),
        (["a.flac", "--temperature", "1", "--decode", "joint"], "--temperature"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments) == 2
    assert f"error: {named}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_evaluate_on_two_nodes_is_the_same_whoever_dies(tmp_path: Path) -> None:
    """200 utterances by 1 and by 4 actors, killed once: the same rows, each once, and figures."""
    from ray.cluster_utils import Cluster

    lines = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()][:200]
    corpus = tmp_path / "corpus.jsonl"
    for line in lines:
        line["audio"] = str(ASSETS / line["audio"])
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    cluster.add_node(num_cpus=4)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, omni.inference.shards as s; s._SHARD_ROWS = 10;"
        "from jobs.evaluate import main; sys.exit(main(sys.argv[1:]))"
    )

    def start(actors: int) -> subprocess.Popen[str]:
        out = tmp_path / f"{actors}"
        command = ["--checkpoint", "omni-tiny", "--data", str(corpus), "--allow_absolute"]
        command += ["--actors", str(actors), "--shards", f"{out}-shards", "--out", f"{out}.jsonl"]
        return subprocess.Popen(
            [sys.executable, "-c", code, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    results = {}
    try:
        for actors in (1, 4):
            process = start(actors)
            if actors == 4:
                shards = tmp_path / "4-shards"
                while len(list(shards.glob("*/*.jsonl"))) < 6:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.1)
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                whole = {p: p.stat().st_mtime_ns for p in shards.glob("*/*.jsonl")}
                assert len(whole) < 20
                process = start(actors)
            out, err = process.communicate(timeout=400)
            assert process.returncode == 0, err
            if actors == 4:
                assert all(p.stat().st_mtime_ns == t for p, t in whole.items())
                assert "shards were there already" in err
            rows = (tmp_path / f"{actors}.jsonl").read_text().splitlines()
            results[actors] = (json.loads(out), [json.loads(row) for row in rows])
    finally:
        cluster.shutdown()
    assert [row["id"] for row in results[1][1]] == [line["id"] for line in lines]
    assert results[1] == results[4]
