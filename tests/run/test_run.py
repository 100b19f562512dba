"""Whole runs on a real Ray: killed and continued, on one worker and on two, with bad recordings.

Everything here goes through `python -m jobs.train`, as a user does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from safetensors.torch import load_file

from jobs import evaluate, train, transcribe
from omni.metrics.run_files import read_events
from tests.helpers.whole_runs import (
    ROOT,
    command,
    curve,
    embedded,
    ledger,
    lines,
    run_job,
    write_manifest,
)


def test_a_run_leaves_what_a_person_reads(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    promised = {
        *("steps", "train_loss", "dev_loss", "dev_wer", "test_wer", "shuffled_audio_gap"),
        *("audio_seconds_per_second", "tokens_per_second", "data_wait_fraction"),
        *("encoder_audio_seconds_per_second", "wall_seconds", "rejects"),
    }
    assert promised <= summary.keys()
    assert summary["steps"] == 50
    assert summary["rejects"] == {}
    assert summary["dev_decoders"] == {"joint": 8}
    assert min(summary["dev_lm_wer"], summary["dev_ctc_wer"]) > 0
    evaluations = [r for r in lines(undisturbed / "metrics.jsonl") if r["kind"] == "eval"]
    assert all(row["dev_decoders"] == {"joint": 2} for row in evaluations)
    assert all({"dev_lm_wer", "dev_ctc_wer"} <= row.keys() for row in evaluations)
    losses = curve(undisturbed)
    assert sorted(losses) == list(range(1, 51))
    assert losses[50] < losses[1] - 1
    assert "<html" in (undisturbed / "report.html").read_text()
    assert (undisturbed / "checkpoints" / "last").resolve().name == "step-000050"
    # Every bin of the plan was trained once, and with the first epoch's bins every utterance.
    bins = sum((bins for bins, _ in ledger(undisturbed).values()), Counter())
    assert bins == Counter(range(200))
    seen = sum((utterances for _, utterances in ledger(undisturbed).values()), Counter())
    assert sorted(seen) == list(range(60))
    assert max(seen.values()) - min(seen.values()) <= 1


def _started_until(step: int, config: Path, storage: Path) -> subprocess.Popen[bytes]:
    """A run that has logged a step."""
    process = subprocess.Popen(
        command(config, storage), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = storage / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count('"kind": "train"') < step:
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_killed_stopped_and_continued_is_bit_for_bit_the_undisturbed_run(
    tiny: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    target = random.SystemRandom().randint(2, 30)
    print(f"killing at step {target}")
    process = _started_until(target, tiny, tmp_path)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    assert not (run / "summary.json").exists()

    process = _started_until(target + 8, tiny, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    reached = max(curve(run))
    assert (run / "checkpoints" / "last").resolve().name == f"step-{reached:06d}"
    assert "Not finished" in (run / "report.html").read_text()

    run_job(tiny, tmp_path, "--eval.examples", "1", "--data.block_seconds", "9")
    changes = [row for row in lines(run / "events.jsonl") if row["event"] == "setting"]
    assert {(row["name"], row["before"], row["after"]) for row in changes} == {
        ("eval.examples", 2, 1),
        ("data.block_seconds", 0.5, 9.0),
    }
    assert {row["step"] for row in changes} == {reached}
    assert "eval.examples" in (run / "report.html").read_text()
    attempts = [row for row in read_events(run) if row["event"] == "attempt"]
    assert attempts[-1]["steps_per_block"] >= 8, "blocks of any length bring the same steps"
    drivers = [row for row in lines(run / "events.jsonl") if row["event"] == "started"]
    walls = [row["wall_seconds"] for row in drivers]
    summary = json.loads((run / "summary.json").read_text())
    assert walls[0] == 0 and walls == sorted(walls) and summary["wall_seconds"] > walls[2] > 0
    assert summary["train_seconds"] < summary["wall_seconds"]
    expected = load_file(undisturbed / "checkpoints" / "last" / "model.safetensors")
    found = load_file(run / "checkpoints" / "last" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].numpy().tobytes() == found[name].numpy().tobytes(), name
    assert curve(run) == curve(undisturbed)
    assert ledger(run) == ledger(undisturbed)


@pytest.mark.slow
def test_two_workers_on_two_nodes_train_what_one_worker_trains(
    tiny: Path, undisturbed: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    cluster.add_node(num_cpus=3)
    try:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        done = subprocess.run(
            command(tiny, tmp_path, "--train.workers", "2", "--encoder.actors", "2"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        cluster.shutdown()
    run = tmp_path / "run"
    assert ledger(run) == ledger(undisturbed)
    one, two = curve(undisturbed), curve(run)
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3
    assert json.loads((run / "summary.json").read_text())["workers"] == 2


def test_the_finished_run_scores_and_transcribes(
    undisturbed: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = undisturbed / "checkpoints" / "best"
    manifest = tiny.parent / "dev" / "manifest.jsonl"
    out = tmp_path / "rows.jsonl"
    arguments = ["--checkpoint", str(checkpoint), "--data", str(manifest), "--out", str(out)]
    assert evaluate.main(arguments) == 2, "its recordings lie elsewhere"
    assert "data.allow_absolute" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--allow_absolute"]) == 0
    scored = json.loads(capsys.readouterr().out)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert scored["wer"] == summary["dev_wer"]
    assert scored["cer"] == summary["dev_cer"]
    for decoder in ("lm", "ctc"):
        assert evaluate.main([*arguments, "--allow_absolute", "--decode", decoder]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert alone["wer"] == scored[f"{decoder}_wer"] == summary[f"dev_{decoder}_wer"]
    assert evaluate.main([*arguments, "--allow_absolute"]) == 0
    capsys.readouterr()
    assert [row["id"] for row in lines(out)] == [row["id"] for row in lines(manifest)]

    stereo = tmp_path / "stereo-96k.wav"
    clip, rate = soundfile.read(lines(manifest)[0]["audio"], dtype="float32")
    long = np.tile(clip, 20)
    soundfile.write(stereo, np.stack([long, long], axis=1), rate)
    files = [str(stereo), str(tmp_path / "none.wav")]
    code = transcribe.main(["--checkpoint", str(checkpoint), *files])
    assert code == 1
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert written[0]["audio"] == str(stereo)
    assert isinstance(written[0]["text"], str)
    assert "missing" in written[1]["error"]

    arguments = ["--checkpoint", str(checkpoint), "--segment", "vad", str(stereo)]
    assert transcribe.main(arguments) == 0
    spans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert spans and all(isinstance(row["text"], str) for row in spans)
    times = [0.0, *(t for r in spans for t in (r["offset"], r["offset"] + r["duration"]))]
    assert times == sorted(times) and times[-1] <= len(long) / rate + 0.01


def test_a_finished_run_is_shown_and_left_as_it_is(tiny: Path, undisturbed: Path) -> None:
    before = (undisturbed / "summary.json").read_text()
    done = run_job(tiny, undisturbed.parent)
    assert "complete" in done.stdout
    assert (undisturbed / "summary.json").read_text() == before


def test_continuing_with_another_corpus_is_refused(
    undisturbed: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [
        *("--config", str(tiny), "--run.name", "run", "--run.storage", str(undisturbed.parent)),
        *("--data.train", "embedded:train"),
    ]
    assert train.main(other) == 2
    assert "data.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--optim.learning_rate", "1"], "optim.learning_rate"),
        (["--train.workers", "many"], "train.workers"),
        (["--encoder.weights", "no/such/folder"], "encoder.weights"),
        (["--model.n_head", "3"], "model"),
    ],
)
def test_a_wrong_setting_exits_2_before_ray_starts(
    tiny: Path,
    tmp_path: Path,
    overrides: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    arguments = ["--config", str(tiny), "--run.storage", str(tmp_path), *overrides]
    assert train.main(arguments) == 2
    assert named in capsys.readouterr().err
    assert not ray.is_initialized()
    assert not (tmp_path / "omni" / "config.yaml").exists()


def _bad_recordings(folder: Path) -> dict[str, tuple[dict[str, Any], str | None]]:
    """Rows by what is wrong with them, with the reason that must be counted (None: usable)."""
    folder.mkdir(parents=True, exist_ok=True)
    clip, rate = soundfile.read(embedded("train", 1)[0]["audio"], dtype="float32")
    rows: dict[str, tuple[dict[str, Any], str | None]] = {}

    def add(name: str, reason: str | None, text: str = "A recording.", file: str = "") -> Path:
        path = folder / (file or f"{name}.wav")
        rows[name] = ({"id": name, "audio": str(path), "text": text}, reason)
        return path

    for name, share, reason in (
        ("truncated", 2, "shorter than its header says"),
        ("stump", 500, "unreadable"),
    ):
        flac = add(name, reason, file=f"{name}.flac")
        soundfile.write(flac, clip, rate)
        whole = flac.read_bytes()
        flac.write_bytes(whole[: len(whole) // share])
    soundfile.write(add("zero samples", "empty"), clip[:0], rate)
    broken = clip.copy()
    broken[100] = np.nan
    soundfile.write(add("nan samples", "not finite"), broken, rate, subtype="FLOAT")
    add("text file", "unreadable").write_text("this is not a recording\n" * 50)
    add("absent", "missing", file="absent.wav")
    soundfile.write(add("empty text", "empty text", text="  "), clip, rate)
    soundfile.write(add("long text", "longer than a bin", text="word " * 800), clip, rate)
    soundfile.write(add("20 minutes", "longer than a bin"), np.zeros(8000 * 1200, "float32"), 8000)
    soundfile.write(add("stereo", None), np.stack([clip, clip], axis=1), rate)
    soundfile.write(add("8 bit", None), clip, rate, subtype="PCM_U8")
    soundfile.write(add("96 kHz", None), np.repeat(clip, 2), 96_000)
    soundfile.write(add("5 ms", None), clip[: rate // 200], rate)
    return rows


@pytest.mark.ray
def test_bad_recordings_are_counted_and_the_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    bad = _bad_recordings(tmp_path / "bad")
    rows = [row for row, _ in bad.values()] + embedded("train", 30)
    manifest = write_manifest(tmp_path / "mixed", rows)
    run_job(
        tiny,
        tmp_path,
        *("--data.train", str(manifest), "--data.max_rejects", "0.5", "--optim.steps", "6"),
    )
    run = tmp_path / "run"
    rejects = lines(run / "rejects.jsonl")
    reasons = {row["id"]: row["reason"] for row in rejects}
    assert reasons == {name: reason for name, (_, reason) in bad.items() if reason is not None}
    # NaN samples show only when the recording is decoded.
    assert {row["id"] for row in rejects if "step" in row} == {"nan samples"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rejects"] == dict(Counter(reasons.values()))
    assert summary["steps"] == 6
    # The ledger counts rows of the index: those that it accepted, whether a bin held them or not.
    early = {r["id"] for r in rejects if "step" not in r and r["reason"] != "longer than a bin"}
    ids = [row["id"] for row in rows if row["id"] not in early]
    trained = {ids[number] for _, utterances in ledger(run).values() for number in utterances}
    assert not trained & reasons.keys()
    assert {name for name, (_, reason) in bad.items() if reason is None} <= trained


@pytest.mark.slow
def test_too_many_unreadable_recordings_stop_the_run(tiny: Path, tmp_path: Path) -> None:
    rows = embedded("train", 10)
    clip, rate = soundfile.read(rows[0]["audio"], dtype="float32")
    clip[10] = np.nan
    for number in range(10):
        path = tmp_path / f"nan-{number}.wav"
        soundfile.write(path, clip, rate, subtype="FLOAT")
        rows.append({"id": f"nan-{number}", "audio": str(path), "text": "No."})
    manifest = write_manifest(tmp_path / "mixed", rows)
    overrides = ("--data.train", str(manifest), "--data.max_rejects", "0.2")
    done = subprocess.run(
        command(tiny, tmp_path, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 1
    assert "data.max_rejects" in done.stderr.splitlines()[-1]
    assert len(lines(tmp_path / "run" / "rejects.jsonl")) > 4


@pytest.mark.slow
def test_a_full_cache_is_said_and_training_goes_on_with_compact_features(
    tiny: Path, tmp_path: Path
) -> None:
    """The limit holds, what it leaves out is encoded again, and the encoders' number is chosen."""
    limits = ["--data.cache_gb", "0.001", "--encoder.format", "int8", "--encoder.actors", "auto"]
    done = run_job(tiny, tmp_path, *limits, "--optim.steps", "12")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 12 and 0 < summary["cached_fraction"] < 1
    stored = sum(path.stat().st_size for path in tmp_path.glob("cache/*-int8/*.bin"))
    assert 500_000 < stored <= 1_000_000
    notes = [r["text"] for r in lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "note"]
    assert len(notes) == 2
    assert notes[0].startswith("encoder.actors auto: 1 ")
    assert "0.001 GB" in notes[1] and "data.cache_gb" in notes[1]
    assert all(note in done.stdout for note in notes)
    checkpoint = tmp_path / "run" / "checkpoints" / "best"
    arguments = ["--checkpoint", str(checkpoint), "--data", "embedded:dev"]
    assert evaluate.main(arguments) == 0
