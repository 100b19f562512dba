"""Augmented training data: what the plan reserves, the feature cache, and interrupted runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from safetensors.torch import load_file

from omni.config import Config, parse_config
from omni.errors import ConfigError
from omni.plan.plan import Split
from omni.plan.plan_file import plan_path, read_plan_file
from omni.plan.sequences import sequence_positions
from omni.run.audit import audit
from omni.run.fill_cache import fill_cache
from omni.run.fingerprints import check_fingerprints
from omni.run.preflight import _needed
from omni.run.prepare import Prepared, prepare
from omni.run.rates import without_cache
from omni.stream.collate import collate
from omni.stream.feature_cache import FeatureCache
from omni.stream.schema import LOADED_SCHEMA, utterances
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import StreamSettings, stream_settings
from tests.helpers.whole_runs import ROOT, command, curve, embedded, ledger, run_job, write_manifest

POSITIONS = 128
ALL: dict[str, Any] = {
    "speed": [0.8, 1.0, 1.25],
    "noise": "embedded:test",
    "noise_probability": 0.5,
    "reverb_probability": 0.5,
    "telephone_probability": 0.3,
    "gain_probability": 0.5,
    "time_masks": 2,
    "freq_masks": 2,
}
SOME: dict[str, Any] = {"speed": [0.9, 1.0], "gain_probability": 0.3}


def _config(folder: Path, augment: dict[str, Any] | None, **run: Any) -> Config:
    return parse_config(
        {
            "run": {"storage": str(folder / "runs"), **run},
            "data": {
                "train": [str(write_manifest(folder / "train", embedded("train", 12)))],
                "dev": [str(write_manifest(folder / "dev", embedded("dev", 3)))],
                "allow_absolute": True,
            },
            "augment": augment or {},
            "tokenizer": {"vocab_size": 300},
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 32},
            "optim": {"bin_positions": POSITIONS, "bins_per_step": 2, "steps": 10},
        }
    )


def _settings(prepared: Prepared) -> StreamSettings:
    return stream_settings(prepared.config, prepared.encoder)


def _loaded(
    split: Split, bins: Sequence[int], settings: StreamSettings, cache: FeatureCache | None = None
) -> list[dict[str, Any]]:
    rows = [load_bin(split, number, settings, cache) for number in bins]
    for row in rows:
        del row["load_seconds"]
    return rows


def _encode(stage: EncodeStage, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows as one block."""
    block = [{**row, "load_seconds": 0.0} for row in rows]
    return stage(pa.Table.from_pylist(block, LOADED_SCHEMA)).to_pylist()


# -- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["trim", "full"])
def test_every_bin_holds_what_the_plan_reserved(tmp_path: Path, mode: str) -> None:
    """Positions of each epoch's speeds, bin by bin, against features that were really made."""
    config = _config(tmp_path, ALL)
    if mode == "full":
        config = config.model_copy(
            update={
                "encoder": config.encoder.model_copy(update={"mode": "full"}),
                "optim": config.optim.model_copy(update={"bin_positions": 1024}),
            }
        )
    prepared = prepare(config)
    split, settings = prepared.splits["train"], without_cache(_settings(prepared))
    plan, augmentation = split.plan, split.augmentation
    assert augmentation is not None and augmentation.speeds is not None
    stage = EncodeStage(settings)
    tokens = split.table["tokens"].to_pylist()
    seams, reserved = 0, 0
    for number in range(min(plan.bins, 2) if mode == "full" else plan.bins):
        [row] = _encode(stage, _loaded(split, [number], settings))
        epochs = plan.passes_of(number).tolist()
        seams += len(set(epochs)) > 1
        members = plan.bin(number).tolist()
        wanted = [
            int(augmentation.speeds.lengths(e)[n]) for n, e in zip(members, epochs, strict=True)
        ]
        found = [
            sequence_positions(frames, len(tokens[n]), config.model.stack)
            for n, frames in zip(members, row["frames"], strict=True)
        ]
        assert found == wanted and row["errors"] == [None] * len(members)
        reserved += sum(wanted)
        made = utterances(row, settings.codec)
        batch = collate([made], positions=config.optim.bin_positions, stack=4, frame_dim=384)
        assert int((batch.segments_BT > 0).sum()) == sum(wanted)
    if mode == "trim":
        assert plan.epoch(plan.bins) > 3 and seams >= 3
        assert prepared.filled == reserved / (plan.bins * POSITIONS) > 0.9


def test_an_utterance_that_would_outgrow_its_bin_keeps_its_speed(tmp_path: Path) -> None:
    config = _config(tmp_path, None)
    plain = prepare(config)
    longest = int(plain.lengths.max())
    optim = config.optim.model_copy(update={"bin_positions": longest})
    config = config.model_copy(update={"optim": optim})
    slow = _config(tmp_path, {"speed": [0.8]})
    split = prepare(slow.model_copy(update={"optim": optim})).splits["train"]
    assert split.augmentation is not None and split.augmentation.speeds is not None
    lengths = split.augmentation.speeds.lengths(0)
    for number, natural in enumerate(plain.lengths.tolist()):
        speed = split.augmentation.speeds.of(number, 0)
        assert speed == (0.8 if split.augmentation.speeds.positions[0, number] else 1.0)
        assert natural < lengths[number] <= longest if speed == 0.8 else lengths[number] == natural
    assert lengths.max() <= longest and (lengths > plain.lengths).sum() > 3
    assert split.augmentation.speeds.of(int(plain.lengths.argmax()), 0) == 1.0


def test_each_recording_of_a_conversation_is_changed(tmp_path: Path) -> None:
    first, second = embedded("train", 2)
    asked = [{"audio": first["audio"]}, {"audio": second["audio"]}]
    said = {"role": "assistant", "content": "Two."}
    row = {"id": "two", "messages": [{"role": "user", "content": asked}, said]}
    config = _config(tmp_path, {"speed": [0.8], "gain_probability": 1})
    write_manifest(tmp_path / "train", [row])
    prepared = prepare(config)
    split, settings = prepared.splits["train"], without_cache(_settings(prepared))
    assert split.augmentation is not None and split.augmentation.speeds is not None
    for number in range(2):
        [encoded] = _encode(EncodeStage(settings), _loaded(split, [number], settings))
        [frames], [tokens] = encoded["frames"], split.table["tokens"].to_pylist()
        [reserved] = split.augmentation.speeds.lengths(number)
        assert sequence_positions(frames, len(tokens), 4) == reserved > prepared.lengths[0]


def test_a_bin_is_made_alike_whenever_and_in_whatever_company(tmp_path: Path) -> None:
    """Which is all that a resumed stream, or one with another number of workers, changes."""
    prepared, again = prepare(_config(tmp_path, ALL)), prepare(_config(tmp_path, ALL))
    settings = without_cache(_settings(prepared))
    bins = range(prepared.splits["train"].plan.bins)
    forwards = _loaded(prepared.splits["train"], bins, settings)
    backwards = _loaded(again.splits["train"], bins[::-1], settings)
    assert forwards == backwards[::-1]
    mels: dict[tuple[int, int], bytes] = {}
    for number, row in enumerate(forwards):
        epochs = prepared.splits["train"].plan.passes_of(number).tolist()
        for member, epoch, made in zip(row["numbers"], epochs, row["mels"], strict=True):
            mels[member, epoch] = made[0]
    assert len(set(mels.values())) == len(mels) > 3 * 12, "no epoch is like another"
    other = prepare(_config(tmp_path, ALL, seed=1))
    assert not set(mels.values()) & {
        made[0] for row in _loaded(other.splits["train"], bins, settings) for made in row["mels"]
    }


def test_held_out_audio_is_never_changed(tmp_path: Path) -> None:
    augmented, plain = prepare(_config(tmp_path, ALL)), prepare(_config(tmp_path, None))
    settings = without_cache(_settings(plain))
    assert augmented.splits["dev"].augmentation is None
    for number in range(plain.splits["dev"].plan.bins):
        rows = [_loaded(p.splits["dev"], [number], settings) for p in (augmented, plain)]
        assert rows[0] == rows[1] and None not in rows[0][0]["keys"]


def test_the_plan_is_made_again_from_its_file(tmp_path: Path) -> None:
    prepared = prepare(_config(tmp_path, ALL))
    plan, run_dir = prepared.splits["train"].plan, prepared.config.run_dir
    run_dir.mkdir(parents=True)
    prepared.write_plan_file()
    again = read_plan_file(plan_path(run_dir, plan.fingerprint)).plan(10)
    assert again.fingerprint == plan.fingerprint
    assert np.array_equal(again.members, plan.members)
    assert np.array_equal(again.starts, plan.starts)


def test_only_what_changes_lengths_changes_the_plan(tmp_path: Path) -> None:
    plain = prepare(_config(tmp_path, None))
    gain = prepare(_config(tmp_path, {"gain_probability": 0.5}))
    speed = prepare(_config(tmp_path, {"speed": [0.9, 1.0]}))
    assert plain.splits["train"].augmentation is None and plain.fingerprints["augment"] == ""
    assert gain.fingerprints["plan"] == plain.fingerprints["plan"] != speed.fingerprints["plan"]
    check_fingerprints(plain, {k: v for k, v in plain.fingerprints.items() if k != "augment"})
    for prepared, saved, named in (
        (gain, plain, ["augment"]),
        (plain, gain, ["augment"]),
        (speed, plain, ["plan", "augment"]),
    ):
        with pytest.raises(ConfigError) as caught:
            check_fingerprints(prepared, saved.fingerprints)
        assert re.findall(r"--run\.override_fingerprint (\S+)", str(caught.value)) == named


@pytest.mark.parametrize("name", ["noise", "reverb"])
def test_a_corpus_that_is_not_there_is_a_wrong_config(tmp_path: Path, name: str) -> None:
    config = _config(tmp_path, {name: "/nowhere.jsonl", f"{name}_probability": 0.5})
    with pytest.raises(ConfigError, match=rf"^augment\.{name}: /nowhere\.jsonl: "):
        prepare(config)


def test_every_node_is_to_see_the_corpora(tmp_path: Path) -> None:
    needed = _needed(prepare(_config(tmp_path, ALL)))
    assert needed.keys() == {"data.train", "augment.noise"}
    assert Path(needed["augment.noise"]).is_file()


# -- the cache ---------------------------------------------------------------------------------


def test_the_cache_neither_gives_nor_takes_what_is_changed(tmp_path: Path) -> None:
    prepared, plain = prepare(_config(tmp_path, SOME)), prepare(_config(tmp_path, None))
    split = prepared.splits["train"]
    bins = range(split.plan.bins)
    expected = _encode(
        EncodeStage(without_cache(_settings(prepared))),
        _loaded(split, bins, without_cache(_settings(prepared))),
    )

    # A cache that is filled as the rows pass: only what an epoch left as it is, under its key.
    folder = tmp_path / "features"
    settings = replace(_settings(prepared), cache=str(folder))
    stage = EncodeStage(settings)
    loaded = _loaded(split, bins, settings, FeatureCache(folder))
    keys = [key for row in loaded for of_row in row["keys"] for key in of_row]
    clean = {key for key in keys if key is not None}
    assert 0 < len(clean) <= 12 and 0 < keys.count(None) < len(keys)
    found = _encode(stage, loaded)
    assert [row["features"] for row in found] == [row["features"] for row in expected]
    stage._cache.flush()
    assert set(FeatureCache(folder)) == clean

    # What lies in it is what a run without augmentation makes, and such a run reads it.
    whole = plain.splits["train"]
    rows = _loaded(whole, range(whole.plan.bins), settings, FeatureCache(folder))
    kept = {
        key: made[0]
        for row in rows
        for [key], made in zip(row["keys"], row["features"], strict=True)
        if made[0] is not None
    }
    assert kept.keys() == clean
    fresh = _encode(stage, _loaded(whole, range(whole.plan.bins), settings))
    stage._cache.flush()
    full = FeatureCache(folder)
    assert len(full) == 12 and full.get(clean) == kept and fresh

    # A full cache is read for what is clean, and for nothing else.
    again = _loaded(split, bins, settings, full)
    for row in again:
        for [key], [feature], [mel] in zip(row["keys"], row["features"], row["mels"], strict=True):
            assert (key is None) == (feature is None) == (mel is not None)
    assert [r["features"] for r in _encode(stage, again)] == [r["features"] for r in expected]
    stage._cache.flush()
    assert len(FeatureCache(folder)) == 12, "and nothing was added"


def _augment_notes(config: Config) -> list[str]:
    return [note for note in prepare(config).notes if note.startswith("augment: ")]


def test_a_cache_that_serves_little_is_said_once(tmp_path: Path) -> None:
    assert _augment_notes(_config(tmp_path, None)) == []
    [note] = _augment_notes(_config(tmp_path, ALL))
    assert re.search(r"\bdev\b", note) and "%" not in note
    [note] = _augment_notes(_config(tmp_path, SOME))
    assert re.search(r"\bdev\b.*\b35%", note)
    config = _config(tmp_path, ALL)
    data = config.data.model_copy(update={"cache": None})
    assert _augment_notes(config.model_copy(update={"data": data})) == []


@pytest.mark.slow
def test_the_encode_job_leaves_out_what_nobody_would_read(tmp_path: Path) -> None:
    said: list[str] = []
    done = fill_cache(_config(tmp_path, ALL), said.append)
    assert done["utterances"] == done["encoded"] == 3
    assert said[0].startswith("augment")
    assert fill_cache(_config(tmp_path, SOME), said.append)["kept"] == 15


# -- whole runs --------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_augmented_run_killed_and_continued_is_the_undisturbed_one(
    tiny: Path, tmp_path: Path
) -> None:
    settings = ["--augment.noise", "embedded:test"]
    for name, value in ALL.items():
        if name != "noise":
            settings += [f"--augment.{name}", json.dumps(value)]
    settings += ["--optim.steps", "30"]
    done = run_job(tiny, tmp_path / "whole", *settings)
    assert len(re.findall(r"^.*\baugment: .*\bfeature cache\b", done.stdout, re.M)) == 1

    process = subprocess.Popen(
        command(tiny, tmp_path / "killed", *settings),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count('"kind": "train"') < 17:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    assert not (tmp_path / "killed" / "run" / "summary.json").exists()
    run_job(tiny, tmp_path / "killed", *settings)

    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    expected = load_file(whole / "checkpoints" / "last" / "model.safetensors")
    found = load_file(killed / "checkpoints" / "last" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].numpy().tobytes() == found[name].numpy().tobytes(), name
    assert curve(killed) == curve(whole) and len(curve(whole)) == 30
    assert ledger(killed) == ledger(whole)
    checked = audit(killed)
    assert checked.problems == [] and checked.attempts == 2 and checked.epochs > 1
