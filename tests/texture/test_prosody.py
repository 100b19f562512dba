"""Measures of prosody on tones of known pitch and on real speech that is changed in known ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import soxr

from omni.audio.decode import decode
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.index import build_index
from omni.texture.prosody import Prosody, _Energies, _Voice, measure_prosody


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Five seconds of real speech without a pause of its own."""
    table = build_index(["embedded:dev"]).table
    rows = sorted(table.to_pylist(), key=lambda row: -row["samples"])
    clips = (decode(row["uri"]) for row in rows)
    return next(clip for clip in clips if measure_prosody([clip]).pauses == 0)


@pytest.fixture(scope="module")
def measured(speech: np.ndarray) -> Prosody:
    found = measure_prosody([speech])
    assert found.speech_seconds > 2
    return found


@pytest.mark.parametrize("hertz", [80.0, 150.0, 220.0, 400.0])
def test_f0_of_tones_with_harmonics(hertz: float) -> None:
    times = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    waves = [np.sin(2 * np.pi * n * hertz * times) / n for n in range(1, 8) if n * hertz < 7000]
    voice = _Voice()
    for block in np.array_split((0.2 * sum(waves)).astype(np.float32), 7):
        voice.push(block)
    hz, confidence = voice.frames()
    voiced = hz[confidence >= 0.5]
    assert len(voiced) > 50 and np.median(voiced) == pytest.approx(hertz, rel=0.01)


def test_the_level_of_a_sine_of_full_scale_is_minus_three_decibels() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(SAMPLING_RATE) / SAMPLING_RATE).astype(np.float32)
    energies = _Energies()
    for block in np.array_split(tone, 11):
        energies.push(block)
    assert energies.level_db([(0, SAMPLING_RATE)]) == pytest.approx(-3.01, abs=0.01)


@pytest.mark.parametrize("kind", ["tone", "noise", "shortest"])
def test_what_is_not_speech_has_no_measures(kind: str) -> None:
    times = np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    audio = {
        "tone": 0.3 * np.sin(2 * np.pi * 200 * times),
        "noise": 0.01 * np.random.default_rng(0).normal(size=len(times)),
        "shortest": np.full(1, 0.1),
    }[kind].astype(np.float32)
    assert measure_prosody([audio]) == Prosody(seconds=len(audio) / SAMPLING_RATE)


def test_blocks_do_not_change_measures(speech: np.ndarray, measured: Prosody) -> None:
    found = measure_prosody(np.array_split(speech, 13))
    assert found.pitch_hz == pytest.approx(measured.pitch_hz, rel=1e-4)
    assert found.pitch_semitones == pytest.approx(measured.pitch_semitones, abs=1e-2)
    assert replace(found, pitch_hz=0, pitch_semitones=0) == replace(
        measured, pitch_hz=0, pitch_semitones=0
    )
    assert measure_prosody([speech]) == measured


def test_half_the_amplitude_is_six_decibels_less(speech: np.ndarray, measured: Prosody) -> None:
    found = measure_prosody([speech / 2])
    assert found.level_db == pytest.approx(measured.level_db - 6.02, abs=0.2)  # type: ignore[operator]
    assert found.pitch_hz == pytest.approx(measured.pitch_hz, rel=0.02)


def test_faster_speech_is_higher_and_shorter(speech: np.ndarray, measured: Prosody) -> None:
    found = measure_prosody([soxr.resample(speech, 5 * SAMPLING_RATE, 4 * SAMPLING_RATE)])
    assert found.pitch_hz == pytest.approx(1.25 * measured.pitch_hz, rel=0.03)  # type: ignore[operator]
    assert found.pitch_semitones == pytest.approx(measured.pitch_semitones, abs=0.5)
    assert found.speech_seconds == pytest.approx(measured.speech_seconds / 1.25, rel=0.05)


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_a_silence_between_words_is_a_pause(
    seconds: float, speech: np.ndarray, measured: Prosody
) -> None:
    gap = np.zeros(round(seconds * SAMPLING_RATE), np.float32)
    found = measure_prosody([np.concatenate([speech, gap, speech])])
    assert found.pauses == 1
    around = 2 * measured.seconds - 2 * measured.speech_seconds  # what is no speech in the clip
    assert seconds - 0.1 < found.pause_seconds < seconds + around + 0.1
    assert found.speech_seconds == pytest.approx(2 * measured.speech_seconds, rel=0.05)
    assert found.level_db == pytest.approx(measured.level_db, abs=0.3)
