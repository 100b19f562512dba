"""Benchmarks measure what they say they measure. How fast it is, only jobs.bench says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Reference

from jobs import bench
from omni.audio.decode import decode, measure
from omni.audio.logmel import clip_mel
from omni.bench import growth_chart
from omni.bench.baselines import (
    budget_for,
    encode_trimmed,
    length_batches,
    reference_encoder,
)
from omni.bench.cache_speed import bench_cache
from omni.bench.corpus_speed import bench_corpus, repeat_files
from omni.bench.encode_speed import encoder_flops, typical_clips
from omni.bench.peer import Peer
from omni.bench.prepared_run import take_sample
from omni.bench.process_alone import alone
from omni.bench.process_tree import ProcessTree
from omni.bench.step_speed import padded_batch
from omni.bench.timing import Result, alternate, describe_machine, ratio_of
from omni.bench.whole_run import for_timing, steps_of_epochs
from omni.config import Config, load_config
from omni.corpus.index import build_index
from omni.model.encoder.weights import EMBEDDED_WHISPER
from omni.model.encoder.whisper import WhisperEncoder
from omni.run.prepare import make_worker_spec, prepare
from omni.run.rates import Trainer, audio_seconds
from omni.storage.path import as_path
from tests.helpers.loopback_s3 import s3_bucket, server_requests

SMALL = ["--model.n_layer", "1", "--model.n_embd", "64", "--model.n_head", "1"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    overrides = ["--run.storage", str(tmp_path), "--optim.ctc_weight", "0.0", *SMALL]
    return load_config("configs/scratch.yaml", overrides)


def test_things_are_measured_in_turns_after_one_round_that_does_not_count() -> None:
    calls: list[str] = []
    taken = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "abababab"
    assert [len(seconds) for seconds in taken.values()] == [3, 3]


def test_a_ratio_compares_within_rounds() -> None:
    # The machine became ten times slower in the last two rounds; the ratio did not.
    taken = {"slow": [2.0, 20.0, 20.0], "fast": [1.0, 10.0, 10.0]}
    assert ratio_of(taken, "slow", "fast") == 2.0


@pytest.mark.parametrize("frames", [75, 1500])
def test_the_flops_of_the_encoder_are_those_that_torch_counts(frames: int) -> None:
    settings = WhisperConfig.from_pretrained(EMBEDDED_WHISPER)
    settings.max_source_positions = frames
    settings._attn_implementation = "eager"
    with torch.device("meta"):
        encoder = Reference(settings)
        mel = torch.empty(1, settings.num_mel_bins, 2 * frames)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(mel)
    counted = counter.get_total_flops()
    assert encoder_flops(settings, frames) == pytest.approx(counted, rel=1e-6)


def test_typical_clips_have_the_lengths_of_the_corpus(config: Config) -> None:
    chosen = np.array([measure(path, span) for path, span in typical_clips(config, 24)])
    table = prepare(config).splits["train"].table
    everything = table["samples"].to_numpy()
    assert len(chosen) == 24
    for share in (0.1, 0.5, 0.9):
        wanted = np.quantile(everything, share)
        assert abs(np.quantile(chosen, share) - wanted) < 0.15 * wanted


def test_a_timed_job_covers_two_epochs_and_evaluates_next_to_nothing(config: Config) -> None:
    first, second = steps_of_epochs(config, 2)
    timed = for_timing(config, second)
    plan = prepare(timed).splits["train"].plan
    assert first == plan.epoch_ends[0] and second == plan.epoch_ends[1] == plan.bins
    assert timed.train.log_every == 1 and timed.eval.max_utterances == 1


def test_padded_and_packed_batches_hold_the_same_work(config: Config) -> None:
    sample = take_sample(config, 2, seconds=0)
    members = [u for bin in sample.bins() for u in bin]
    padded = padded_batch(sample, members)
    packed = sample.layout.batch(sample.bins())
    count = [(b.targets_BT >= 0).sum() for b in (padded, packed)]
    assert count[0] == count[1]
    assert (padded.segments_BT > 0).sum() == (packed.segments_BT > 0).sum()
    torch.testing.assert_close(padded.audio_NF, packed.audio_NF)
    assert padded.tokens_BT.shape[0] == len(members)


def test_a_trainer_alone_repeats_its_steps_and_touches_no_run(config: Config) -> None:
    sample = take_sample(config, 3, seconds=0)
    trainer = Trainer(make_worker_spec(sample.prepared), sample.encoded, torch.device("cpu"))
    audio = [trainer.step() for _ in range(6)]
    assert audio[:3] == audio[3:] == [audio_seconds(block) for block in sample.encoded]
    assert not config.run_dir.exists()


def test_a_step_that_blocks_do_not_divide_is_filled_up_as_in_training(tmp_path: Path) -> None:
    geometry = ["--optim.bins_per_step", "3", "--optim.bins_per_block", "2"]
    storage = ["--run.storage", str(tmp_path)]
    sample = take_sample(load_config("configs/scratch.yaml", [*geometry, *storage, *SMALL]), 6, 0)
    trainer = Trainer(make_worker_spec(sample.prepared), sample.encoded, torch.device("cpu"))
    assert trainer.blocks_per_step == 2 and len(sample.encoded) == 4
    assert sum(trainer.step() for _ in range(2)) == sum(map(audio_seconds, sample.encoded))


@pytest.mark.slow  # It encodes windows of 30 s in fp32.
def test_the_peer_does_the_same_work(config: Config) -> None:
    """Same loss on the same utterances as omni in `full` mode, by weights that hear the audio."""
    peer = Peer(prepare(config), trim=False)
    peer.batch_size = 2
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in peer._model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.05, generator=generator)
    assert peer._step() == 2
    assert peer.difference_to_omni() < 5e-3
    rows = [peer._rows[0], peer._rows[1]]
    batch = peer._batch(rows)
    assert batch.audio_mask_BT.sum(dim=1).tolist() == [375, 375], "30 s each"


def test_a_careful_peer_encodes_what_the_model_is_given(config: Config) -> None:
    """Real length, in a batch with longer ones, as transformers' own forward gives it."""
    source, device = config.encoder.weights, torch.device("cpu")
    model = reference_encoder(source, torch.float32, device)
    clips = [decode(path, span) for path, span in typical_clips(config, 3)]
    mels = [clip_mel(clip, 80, "trim", 0.5) for clip in clips]
    together = encode_trimmed(model, mels)
    ours = WhisperEncoder(source, mode="trim", margin_seconds=0.5, dtype=torch.float32)
    alone = ours.encode(clips)
    assert len({len(features) for features in alone}) == 3
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[: len(other)], other, atol=2e-3, rtol=1e-3)


def test_batches_of_similar_lengths_fill_their_budget() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 300).tolist()
    batches = length_batches(lengths, 512)
    assert sorted(n for batch in batches for n in batch) == list(range(300))
    padded = [len(batch) * max(lengths[n] for n in batch) for batch in batches]
    assert max(padded) <= 512 and sum(lengths) > 0.9 * sum(padded)
    budget = budget_for(lengths, 20)
    assert len(length_batches(lengths, budget)) <= 20 < len(length_batches(lengths, budget - 1))


def test_the_cpu_time_of_a_tree_holds_that_of_its_children() -> None:
    code = "import time; b = time.process_time()\nwhile time.process_time() - b < 0.5: pass"
    parent = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {code!r}])"
    job = subprocess.Popen([sys.executable, "-c", parent])
    tree, used = ProcessTree(job.pid), 0.0
    while job.poll() is None:
        used = tree.cpu_seconds()
        time.sleep(0.01)
    assert 0.4 < used < 2


def test_repeated_files_are_a_corpus_of_their_own(tmp_path: Path) -> None:
    index = build_index([str(repeat_files(tmp_path / "corpus", 2_000))])
    assert len(index) == 2_000 and not index.rejects
    once = build_index(["embedded:train"])
    assert index.table["text"][: len(once)].equals(once.table["text"])
    assert index.table["samples"].to_pylist()[len(once)] == once.table["samples"][0].as_py()


def _hold(count: int) -> int:
    return int(np.ones(count, np.uint8).sum())


@pytest.mark.slow  # It holds 2.5 GB.
def test_a_peak_is_that_of_the_call_alone() -> None:
    here = np.ones(1_500_000_000, np.uint8)  # which a child must not be said to hold
    little, much = alone(_hold, 1), alone(_hold, 1_000_000_000)
    assert len(here) == 1_500_000_000, "held until both have returned"
    assert little.value == 1 and much.value == 1_000_000_000
    assert little.peak_gb < 1 and 0.9 < much.peak_gb - little.peak_gb < 1.1


@pytest.mark.slow
def test_a_large_corpus_is_indexed_prepared_and_planned(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = config.data.model_copy(update={"window_utterances": 20_000})
    config = config.model_copy(update={"data": data})
    result = bench_corpus(config, rows=1_500, planned=200_000, sizes=[40_000])
    names = [row["name"] for row in result.figures]
    assert {"jobs.index", "40,000 rows, again", "200,000 utterances", "its process"} <= set(names)
    assert all(row["value"] > 0 for row in result.figures)
    assert result.ratio["corpus.index_vs_one_process"] > 0
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_the_cache_suite_reads_what_it_wrote(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setenv("TMPDIR", str(node))  # of the processes that measure
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    with s3_bucket("bench") as uri, server_requests() as requests:
        data = config.data.model_copy(update={"cache": uri})
        result = bench_cache(config.model_copy(update={"data": data}), sizes=[30_000], reads=9)
        assert not list(as_path(uri).iterdir()), "nothing is left in the bucket"
    shards = -(-30_000 // (2**30 // 76_800))
    [row] = [row for row in result.figures if row["name"] == "30,000 keys"]
    assert f"{shards} shards" in row["note"]
    assert all(row["value"] > 0 for row in result.figures if not row["name"].endswith("memory"))
    assert result.ratio["cache.reads_together"] > 0
    assert [p["size"] for p in result.growth if p["curve"] == "again"] == [30_000]
    tables = [n for n, request in enumerate(requests) if re.match(r"GET .*\.keys$", request)]
    features = [n for n, request in enumerate(requests) if re.match(r"PUT .*\.bin$", request)]
    assert min(tables) < min(features), "the first opening fetches the table"
    assert not [path for path in node.rglob("*") if path.is_file()], "nor on the node"


@pytest.mark.parametrize("wrong", [["encode", "--sizes", "5"], ["cache", "--sizes", "5", "0"]])
def test_sizes_are_for_the_suites_that_grow(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(wrong) == 2
    assert "--sizes: " in capsys.readouterr().err


def test_growth_is_drawn_over_a_logarithmic_size(tmp_path: Path) -> None:
    result, other = (Result("corpus", {}) for _ in range(2))
    for size, seconds in ((1_000, 2.0), (1_000_000, 3.0)):
        result.add_point("Starting & preparing", "s", "first time", size, seconds)
        other.add_point("Memory", "GB", "driver", size, 0.5)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, written in zip(files, (result, other), strict=True):
        file.write_text(json.dumps(written.to_dict()))
    out = tmp_path / "growth.svg"
    assert growth_chart.main([str(out), *map(str, files)]) == 0
    root = ElementTree.parse(out).getroot()
    space = "{http://www.w3.org/2000/svg}"
    titles = [text.text for text in root.iter(f"{space}text") if text.get("class") == "title"]
    assert titles == ["Starting & preparing, s", "Memory, GB"]
    wrong = tmp_path / "encode.json"
    wrong.write_text(json.dumps(Result("encode", {}).to_dict()))
    with pytest.raises(SystemExit, match="2"):
        growth_chart.main([str(out), str(wrong)])
    values = [path.get("data-values") for path in root.iter(f"{space}path")]
    assert {"1000,2 1000000,3", "1000,0.5 1000000,0.5"} <= set(values)


def test_results_are_a_table_and_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Result("encode", describe_machine(torch.device("cpu"), 1))
    result.add("encoder trim", 133.7, "audio-s/s", "omni")
    result.ratio["encode.vs_best"] = 27.71
    asked: list[Any] = []

    def run_suite(name: str, config: Config, sizes: list[int] | None) -> Result:
        asked.append((name, config.encoder.threads, sizes))
        return result

    monkeypatch.setattr("omni.bench.run_suite", run_suite)
    out = tmp_path / "new" / "encode.json"
    assert bench.main(["encode", "--out", str(out), "--encoder.threads", "2"]) == 0
    assert asked == [("encode", 2, None)]
    written = json.loads(out.read_text())
    assert written["ratio"] == {"encode.vs_best": 27.71}
    assert written["figures"][0]["value"] == 133.7 and written["machine"]["threads"] == 1
    printed = capsys.readouterr().out
    for row in (("encoder trim", "134"), ("encode.vs_best", "27.7")):
        assert any(all(word in line for word in row) for line in printed.splitlines())


def test_a_wrong_suite_or_config_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["everything"])
    assert caught.value.code == 2
    assert bench.main(["encode", "--config", "nowhere.yaml"]) == 2
    assert bench.main(["encode", "--encoder.modus", "trim"]) == 2
    assert "encoder.modus" in capsys.readouterr().err
