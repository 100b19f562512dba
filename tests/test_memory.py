"""A recording's length costs time, not memory: transcribed whole, cut by voice activity, or
trained on span by span."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import omni
from omni.audio.decode import decode
from tests.helpers.long_recordings import bridges, uncovered, write_long

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
GAP = np.zeros(4_800, np.float32)
SLACK = {20: 40, 60: 60, 120: 150}  # MB by minutes; their samples alone are 77, 230 and 460

_TRANSCRIBE = """
import resource, sys
import torch
from omni.audio.decode import decode_blocks
from omni.stream.codec import FeatureCodec
from omni.inference.transcriber import Transcriber
from omni.model.chat_template import Template
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.model.encoder.whisper import WhisperEncoder
torch.set_num_threads(1)
tokenizer = SpeechTokenizer.train(["you are entering conference number seven"], 300)
gpt = GPTConfig(256, tokenizer.vocab_size, 1, 1, 1, 64, "L")
model = OmniModel(OmniConfig(gpt, 384, stack=8)).eval()
model.init_weights(0)
encoder = WhisperEncoder("embedded", mode="trim", dtype=torch.bfloat16)
speech = Transcriber(encoder, FeatureCodec(384), model, Template(tokenizer), "", False, 4.0)
words = len(speech.text_of(decode_blocks(sys.argv[1])).text)
assert words > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

_LOAD = """
import resource, sys
from omni.config import load_config
from omni.stream.stream_settings import stream_settings
from omni.run.prepare import prepare
from omni.run.rates import loaded_blocks, without_cache
overrides = ["--data.train", sys.argv[1] + ".jsonl", "--run.storage", sys.argv[1] + ".runs"]
config = load_config("configs/scratch.yaml", [*overrides, "--optim.steps", "5"])
prepared = prepare(config)
settings = without_cache(stream_settings(config, prepared.encoder))
plan = prepared.splits["train"].plan
blocks, _ = loaded_blocks(prepared.splits["train"], range(plan.bins - 5, plan.bins), settings)
assert all(e is None for b in blocks for row in b["errors"].to_pylist() for e in row)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


_CUT = """
import json, resource, sys
import torch
from pathlib import Path
from omni.audio.vad import speech_spans
torch.set_num_threads(1)
Path(sys.argv[1] + ".json").write_text(json.dumps(speech_spans(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

_IN_ARCHIVE = """
import resource, sys
from pathlib import Path
from omni.audio.decode import decode
from omni.corpus.built_index import finish
from omni.corpus.index import build_index
from omni.corpus.index_row import span_of
from omni.corpus.build_part import write_part
from omni.corpus.sources import Options, open_source
options = Options()
source = open_source(sys.argv[1] + ".tar", options)
tasks = [(source, part) for part in source.parts()]
write_part(*tasks[0], options, Path(sys.argv[1] + ".index"))
finish(tasks, Path(sys.argv[1] + ".index"))
[row] = build_index([sys.argv[1] + ".index"]).table.to_pylist()
assert row["length"] > 8 << 20 and len(decode(row["uri"], span_of(row))) == 2 * 16_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


def _recording(folder: Path, minutes: int) -> Path:
    """Prompts one after another as one file, and a manifest of their spans."""
    path = folder / f"{minutes}.flac"
    if path.exists():
        return path
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    clips = [(decode(ASSETS / row["audio"]), row["text"]) for row in rows]
    spans, at = [], 0
    with soundfile.SoundFile(path, "w", 16_000, 1, format="FLAC") as file:
        while at < minutes * 60 * 16_000:
            audio, text = clips[len(spans) % len(clips)]
            span = {"offset": at / 16_000, "duration": len(audio) / 16_000}
            spans.append({"id": str(len(spans)), "audio": path.name, "text": text, **span})
            for part in (audio, GAP):
                file.write(part)
                at += len(part)
    manifest = Path(f"{path}.jsonl")
    manifest.write_text("".join(json.dumps(span) + "\n" for span in spans))
    return path


def _peak(script: str, path: Path) -> int:
    """Megabytes that a process held at most."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(omni.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow  # The encoder reads 25 minutes and more.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("minutes", [20, 60])
def test_a_long_recording_is_written_down_in_flat_memory(recording: Path, minutes: int) -> None:
    # Five minutes fill the groups of pieces that are in memory together.
    base = _peak(_TRANSCRIBE, _recording(recording, 5))
    assert _peak(_TRANSCRIBE, _recording(recording, minutes)) < base + SLACK[minutes]


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [20, 120])
def test_spans_of_a_long_recording_are_loaded_in_flat_memory(recording: Path, minutes: int) -> None:
    base = _peak(_LOAD, _recording(recording, 5))
    assert _peak(_LOAD, _recording(recording, minutes)) < base + SLACK[minutes]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["flac", "wav"])
def test_an_hour_is_cut_by_voice_activity_in_flat_memory(recording: Path, ending: str) -> None:
    peaks = {}
    for minutes in (5, 60):
        path = recording / f"cut-{minutes}.{ending}"
        said = write_long(path, minutes)
        peaks[minutes] = _peak(_CUT, path)
        spans = json.loads(Path(f"{path}.json").read_text())
        assert uncovered(said, spans) == [] and bridges(said, spans) == []
    assert peaks[60] < peaks[5] + SLACK[60]


@pytest.mark.parametrize("minutes", [20, pytest.param(120, marks=pytest.mark.slow)])
def test_a_span_in_an_archive_is_read_in_flat_memory(recording: Path, minutes: int) -> None:
    """Near the end of a recording that a tar holds."""
    peaks = {}
    for length in (5, minutes):
        path = recording / f"archived-{length}.wav"
        write_long(path, length)
        span = {"text": "a", "offset": length * 60 - 10, "duration": 2.0}
        path.with_suffix(".json").write_text(json.dumps(span))
        with tarfile.open(f"{path}.tar", "w") as tar:
            tar.add(path, "talk.wav")
            tar.add(path.with_suffix(".json"), "talk.json")
        peaks[length] = _peak(_IN_ARCHIVE, path)
    assert peaks[minutes] < peaks[5] + SLACK[minutes] / 2
