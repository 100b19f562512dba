"""Synthetic speech: takes, levels, shards, continuing, and what may not be in omni-tiny's data.

Real programs speak where they are installed; hibari is a development dependency.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import synthesize as job
from omni.augment.plug_in import check_effect
from omni.config import load_config, shipped_configs
from omni.corpus.build import index_few
from omni.corpus.index import build_index, read_index_folder
from omni.corpus.sources import Options
from omni.errors import ConfigError
from omni.metrics.score import normalize
from omni.recipes.exclusion import HELD_OUT
from omni.recipes.noise import FaintNoise
from omni.recipes.synthesize import Recipe, parse_mixture, synthesize
from omni.recipes.takes import (
    MIXTURE,
    VOICES,
    SpeechError,
    Take,
    draw_take,
    finish,
    order_of,
)  # fmt: skip
from omni.recipes.voices import SOURCES, missing, speak

pytestmark = pytest.mark.unit
TAKE = Take("flite", "slt", 1.0, 50, -20.0, 0.1, 0.2, 0)
GLOSSES = [f'a {colour} thing of some use; "she saw the {colour} house"' for colour in
           ("red", "green", "blue", "white", "black")]  # fmt: skip


def needs(program: str) -> pytest.MarkDecorator:
    absent = missing([program])
    return pytest.mark.skipif(bool(absent), reason=absent.get(program, ""))


# -- takes ---------------------------------------------------------------------------------------


def test_a_take_depends_on_seed_and_number_alone() -> None:
    takes = [draw_take(0, n, MIXTURE) for n in range(400)]
    assert takes == [draw_take(0, n, dict(reversed(MIXTURE.items()))) for n in range(400)]
    assert takes != [draw_take(1, n, MIXTURE) for n in range(400)]
    for name, share in MIXTURE.items():
        assert sum(t.program == name for t in takes) / 400 == pytest.approx(share, abs=0.08)
    assert {t.voice for t in takes if t.program == "flite"} == set(VOICES["flite"])
    assert {draw_take(0, n, {"flite": 2}).program for n in range(20)} == {"flite"}


def test_each_sentence_is_spoken_once_before_any_twice() -> None:
    passes = [[order_of(50, 3, n) for n in range(p * 50, p * 50 + 50)] for p in range(3)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("rate", [16000, 22050, 24000])
def test_speech_gets_its_level_and_its_silences(rate: int) -> None:
    tone = 0.9 * np.sin(np.arange(2 * rate) * 0.1).astype(np.float32)
    padded = np.concatenate([np.zeros(rate), tone, np.zeros(rate)])
    text = "x" * 30
    audio = finish(padded, rate, TAKE, text)
    assert audio.dtype == np.int16
    assert len(audio) / 16000 == pytest.approx(2.0 + 0.1 + 0.2, abs=0.03)
    assert not audio[:1500].any() and not audio[-3000:].any()
    level = np.sqrt(np.mean(np.square(audio[2000:33000] / 32768)))
    assert 20 * np.log10(level) == pytest.approx(-20.0, abs=0.2)
    loud = finish(padded, rate, replace(TAKE, level_db=3.0), text)
    assert np.abs(loud).max() / 32768 == pytest.approx(0.98, abs=0.01)


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros(16000), "no speech"),
        (np.zeros(10), "no speech"),
        (np.full(16000, np.nan), "not finite"),
        (np.sin(np.arange(160000)), "implausible pace"),
        (np.sin(np.arange(3200)), "implausible pace"),
    ],
)
def test_audio_that_cannot_be_the_sentence_is_an_error(audio: np.ndarray, reason: str) -> None:
    with pytest.raises(SpeechError, match=reason):
        finish(audio, 16000, TAKE, "A short sentence.")


# -- programs ------------------------------------------------------------------------------------


def test_missing_programs_are_named_once_with_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(missing(["flite", "espeak-ng"])) == {"flite", "espeak-ng"}
    with pytest.raises(ConfigError) as raised:
        synthesize(Recipe(0, {"flite": 1, "espeak-ng": 2}), tmp_path / "out", 1.0, 1, print)
    for name in ("flite", "espeak-ng"):
        assert str(raised.value).count(SOURCES[name][0]) == 1
    assert not (tmp_path / "out").exists()


def test_a_command_without_the_voices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both programs would speak with another voice, and report success."""
    for name, listed in (("flite", "Voices available: kal slt"), ("espeak-ng", "Pty Language")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{listed}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = missing(["flite", "espeak-ng"])
    assert "kal16" in found["flite"] and "en-us" in found["espeak-ng"]


def test_a_command_that_does_not_run_says_why_and_not_that_it_lacks_a_voice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flite", "espeak-ng"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'libasound.so.2: cannot open' >&2\nexit 127\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = missing(["flite", "espeak-ng"])
    assert set(found) == {"flite", "espeak-ng"}
    assert all("libasound.so.2" in reason and "voice" not in reason for reason in found.values())


@pytest.mark.parametrize("program", [pytest.param(name, marks=needs(name)) for name in VOICES])
def test_each_program_speaks_every_voice_again_alike(program: str, tmp_path: Path) -> None:
    text = "The old man who lives by the sea."
    take = draw_take(0, 0, {program: 1})
    audio, rate = speak(text, take, tmp_path)
    assert np.array_equal(audio, speak(text, take, tmp_path)[0])
    assert 1.0 < len(finish(audio, rate, take, text)) / 16000 < 5.0
    slow, _ = speak(text, replace(take, speed=0.85), tmp_path)
    fast, _ = speak(text, replace(take, speed=1.15), tmp_path)
    assert 1.15 < len(slow) / len(fast) < 1.6


@pytest.mark.parametrize(
    "text", ["hibari", "hibari=0", "hibari=x", "hibari=nan", "mbrola=1", "", "hibari=-1"]
)
def test_a_wrong_mixture_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_mixture(text)
    with pytest.raises(SystemExit) as ended:
        job.main(["--out", "x", "--hours", "1", "--mixture", text])
    assert ended.value.code == 2


# -- shards --------------------------------------------------------------------------------------

SPOKEN_BY = next((name for name in ("espeak-ng", "flite", "hibari") if not missing([name])), "")
spoken = pytest.mark.skipif(not SPOKEN_BY, reason="no voice program is installed")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    from omni.recipes.wordnet import FILES

    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("  1 Free to use.  \n")
    with (folder / FILES[0]).open("a") as file:
        for gloss in [*GLOSSES, "you will now be placed into the conference"]:
            file.write(f"00000001 03 n 01 thing 0 000 | {gloss}  \n")
    return Recipe(7, {SPOKEN_BY or "flite": 1.0}, folder, (), per_shard=2)


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("[!.]*") if path.is_file()}


@spoken
def test_a_killed_job_continues_with_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    def make(out: Path, hours: float) -> list[str]:
        lines: list[str] = []
        synthesize(recipe, out, hours, 1, lines.append)
        return [line.partition(":")[0] for line in lines if line.startswith("shard")]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    made = make(whole, 8 / 3600)
    assert len(made) >= 2
    make(killed, 0.1 / 3600)
    (killed / ".shard-00001.tar.x.tmp").write_bytes(b"half a shard")
    (killed / "stats" / "shard-00001.json").write_bytes(b"{")  # written just before the tar
    assert make(killed, 8 / 3600) == made[1:]
    assert _files(killed) == _files(whole)
    assert make(killed, 8 / 3600) == []

    held_out = {normalize("you will now be placed into the conference")}
    texts = (whole / "sentences.txt").read_text().splitlines()
    assert len(texts) == 10 and not held_out & set(map(normalize, texts))
    assert json.loads((whole / "recipe.json").read_text())["left_out"] == {"excluded": 1}
    readme = (whole / "README.md").read_text()
    assert SPOKEN_BY in readme and "seed 7" in readme
    assert "Free to use." in (whole / "LICENSES").read_text()

    for other in (replace(recipe, seed=8), replace(recipe, per_shard=3)):
        with pytest.raises(ConfigError, match="choose another folder"):
            synthesize(other, whole, 1.0, 1, print)

    index_few(f"wds:{whole}", tmp_path / "index", Options())
    table, rejects = read_index_folder(tmp_path / "index")
    assert not rejects
    assert len(table) == 2 * len(made)
    assert set(table["text"].to_pylist()) <= set(texts)
    assert set(table["language"].to_pylist()) == {"en"}
    assert all(name.startswith(SPOKEN_BY) for name in table["speaker"].to_pylist())


@spoken
@pytest.mark.slow
def test_several_processes_make_the_files_of_one(recipe: Recipe, tmp_path: Path) -> None:
    made = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        synthesize(recipe, out, 8 / 3600, processes, lambda line: None)
        made.append(_files(out) | {path.name: b"" for path in out.glob("stats/*")})
    assert made[0] == made[1]
    assert sum(name.endswith(".tar") for name in made[0]) >= 2


def test_a_shard_with_many_failures_stops_the_job(recipe: Recipe, tmp_path: Path) -> None:
    from omni.recipes.shards import Order, make_shard

    (tmp_path / "stats").mkdir()
    order = Order(0, 0, {"espeak-ng": 1.0}, [(n, "A sentence of words.") for n in range(2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(RuntimeError, match="2 of 2 sentences .* did not start"):
            make_shard(order, tmp_path)
    assert not list(tmp_path.glob("*shard*"))


# -- omni-tiny -----------------------------------------------------------------------------------


def test_no_held_out_recording_or_sentence_is_in_the_training_data_of_omni_tiny() -> None:
    config = load_config(shipped_configs()["omni-tiny"])
    assert (*config.data.dev, *config.data.test) == HELD_OUT
    names = [str(getattr(entry, "source", entry)) for entry in config.data.train]
    embedded = [name for name in names if name.startswith("embedded:")]
    assert embedded == ["embedded:train"]
    assert not any(word in name for name in names for word in ("fotaq", "drascula", "dialogue"))
    train, *held_out = (build_index([spec]) for spec in (*embedded, *HELD_OUT))
    # The normaliser reads "oh" and "o", which are in train, as the digit of "zero" in dev.
    same = {("embedded:dev", normalize): {"0"}}
    for name, index in zip(HELD_OUT, held_out, strict=True):
        assert len(index)
        for column, of in (("key", str), ("text", normalize), ("text", _letters)):
            mine, theirs = (set(map(of, i.table[column].to_pylist())) for i in (train, index))
            assert mine & theirs == same.get((name, of), set()), (name, column)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def test_faint_noise_is_an_effect_of_the_config() -> None:
    config = load_config(shipped_configs()["omni-tiny"])
    (name,) = config.augment.effects
    assert name == f"{FaintNoise.__module__}:{FaintNoise.__name__}"
    check_effect(name)
    audio = np.sin(np.arange(16001) * 0.05).astype(np.float32)
    for seed in range(5):
        noise = FaintNoise()(audio, np.random.default_rng(seed)) - audio
        ratio = 10 * np.log10(np.mean(audio**2) / np.mean(noise**2))
        assert 9.9 < ratio < 40.1
    assert not FaintNoise()(np.zeros(100, np.float32), np.random.default_rng(0)).any()
