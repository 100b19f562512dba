"""What augmentation does to real recordings, and that it always does the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import omni
from omni.audio.decode import AudioError, decode
from omni.audio.logmel import clip_mel, log_mel
from omni.audio.windows import HOP, SAMPLING_RATE, plan_windows
from omni.augment import effects
from omni.augment.augment import Augmentation, augment, mask_windows, spec_augment
from omni.augment.noise import Clips, read_clips
from omni.augment.speed import Speeds, changed_length, names_of, speed_of
from omni.config import AugmentConfig
from omni.corpus.manifest import ManifestError

CORPUS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROWS = [json.loads(line) for line in (CORPUS / "train.jsonl").read_text().splitlines()][:200:40]
SPEECH = [decode(CORPUS / row["audio"]) for row in ROWS]
EVERYTHING: dict[str, Any] = {
    "speed": [0.9, 1.1],
    "noise": ["embedded:test"],
    "noise_probability": 1,
    "reverb_probability": 1,
    "telephone_probability": 1,
    "gain_probability": 1,
    "time_masks": 2,
    "freq_masks": 2,
}

speech = pytest.mark.parametrize("audio", SPEECH, ids=[row["id"] for row in ROWS])


def _seeded(*entropy: int) -> np.random.Generator:
    return np.random.default_rng(entropy)


def _band(audio: np.ndarray, low: float, high: float) -> float:
    """Energy between two frequencies."""
    hertz = np.fft.rfftfreq(len(audio), 1 / SAMPLING_RATE)
    energy = np.abs(np.fft.rfft(audio)) ** 2
    return float(energy[(hertz >= low) & (hertz < high)].sum())


# -- effects -----------------------------------------------------------------------------------


@speech
@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 1.37])
def test_speed_changes_length_as_announced(audio: np.ndarray, speed: float) -> None:
    changed = effects.change_speed(audio, speed)
    assert changed.dtype == np.float32 and changed.shape == (changed_length(len(audio), speed),)
    assert len(changed) == pytest.approx(len(audio) / speed, abs=1)
    assert effects.power(changed) == pytest.approx(effects.power(audio), rel=0.1)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_pitch_and_tempo_alike(speed: float) -> None:
    times = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    tone = np.sin(2 * np.pi * 440 * times).astype(np.float32) * (times < 0.5)
    changed = effects.change_speed(tone.astype(np.float32), speed)
    spectrum = np.abs(np.fft.rfft(changed))
    peak = np.fft.rfftfreq(len(changed), 1 / SAMPLING_RATE)[spectrum.argmax()]
    assert peak == pytest.approx(440 * speed, rel=0.01)
    loud = np.flatnonzero(np.abs(changed) > 0.5)[-1] / SAMPLING_RATE
    assert loud == pytest.approx(0.5 / speed, abs=0.005)


@pytest.mark.parametrize("samples", [1, 2, 80, 81])
@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 2.0])
def test_the_shortest_recordings_have_the_length_that_was_announced(
    samples: int, speed: float
) -> None:
    audio = SPEECH[0][1000 : 1000 + samples]
    assert len(effects.change_speed(audio, speed)) == changed_length(samples, speed) >= 1
    assert len(effects.telephone(audio)) == samples
    assert len(effects.reverberate(audio, effects.made_response(_seeded(0), 0.3, 0))) == samples


@speech
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5])
def test_the_ratio_to_the_noise_is_the_one_asked_for(audio: np.ndarray, snr_db: float) -> None:
    noise = read_clips(["embedded:test"], "noise").excerpt(_seeded(1), len(audio))
    mixed = effects.mix(audio, noise, snr_db)
    added = mixed.astype(np.float64) - audio
    measured = 10 * np.log10(effects.power(audio) / effects.power(added))
    assert mixed.dtype == np.float32 and measured == pytest.approx(snr_db, abs=0.01)


def test_silence_has_no_ratio_and_no_room() -> None:
    audio, silence = SPEECH[0], np.zeros_like(SPEECH[0])
    assert effects.mix(audio, silence, 10) is audio
    assert effects.mix(silence, audio, 10) is silence
    assert effects.reverberate(audio, silence[:100]) is audio
    assert not effects.reverberate(silence, effects.made_response(_seeded(0), 0.3, 0)).any()
    assert not effects.telephone(silence).any()


@speech
def test_a_room_keeps_length_power_and_place(audio: np.ndarray) -> None:
    response = effects.made_response(_seeded(2), 0.5, 5.0)
    late = np.concatenate((np.zeros(200, np.float32), response))
    wet = effects.reverberate(audio, response)
    assert wet.dtype == np.float32 and wet.shape == audio.shape
    assert effects.power(wet) == pytest.approx(effects.power(audio), rel=1e-5)
    # The direct sound is where it was, also where a response begins with silence.
    assert np.allclose(effects.reverberate(audio, late), wet, atol=1e-5)
    lags = [np.dot(audio[100:-100], wet[100 + k : len(wet) - 100 + k]) for k in range(-100, 101)]
    assert abs(int(np.argmax(lags)) - 100) <= 2


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_a_made_room_decays_by_60_decibels_in_its_time(seconds: float) -> None:
    response = effects.made_response(_seeded(3), seconds, 3.0).astype(np.float64)
    tail = response[1:]
    assert response[0] == 1.0
    assert 10 * np.log10(1 / np.square(tail).sum()) == pytest.approx(3.0, abs=1e-3)
    quarter = len(tail) // 4
    first, last = (effects.power(t) for t in (tail[:quarter], tail[-quarter:]))
    assert 10 * np.log10(first / last) == pytest.approx(45, abs=2)


@speech
def test_a_telephone_has_no_energy_outside_its_band(audio: np.ndarray) -> None:
    heard = effects.telephone(audio)
    assert heard.dtype == np.float32 and heard.shape == audio.shape
    whole = _band(heard, 0, 8001)
    assert _band(heard, 3600, 8001) < 1e-6 * whole
    assert _band(heard, 0, 150) < 1e-6 * whole
    # Inside it is the recording, with the noise of 8 bits (about 38 dB under the voice).
    assert _band(heard, 500, 3200) == pytest.approx(_band(audio, 500, 3200), rel=0.02)
    clean = audio
    for _ in range(2):
        clean = effects._convolve(clean, effects._telephone_band(), effects._TAPS // 2)
    noise = effects.power(heard - clean) / effects.power(clean)
    assert -45 < 10 * np.log10(noise) < -30


def test_gain_is_in_decibels_and_does_not_clip() -> None:
    loud = effects.gain(SPEECH[0], 20.0)
    assert np.allclose(loud, 10 * SPEECH[0], rtol=1e-6) and np.abs(loud).max() > 1


# -- masks -------------------------------------------------------------------------------------


def test_masks_have_the_sizes_that_were_allowed() -> None:
    mel = log_mel(SPEECH[0], 80).numpy()
    frames = mel.shape[1]
    widths: set[int] = set()
    for seed in range(60):
        settings = AugmentConfig(time_masks=1, time_mask_seconds=0.3, time_mask_share=1)
        masked = spec_augment(mel, settings, _seeded(seed))
        columns = np.flatnonzero((masked != mel).any(axis=0))
        assert len(columns) <= 30
        if len(columns):
            assert columns[-1] - columns[0] + 1 == len(columns)
            assert np.allclose(masked[:, columns], mel.mean(), atol=1e-5)
        widths.add(len(columns))
        rows = spec_augment(mel, AugmentConfig(freq_masks=2, freq_mask_bins=9), _seeded(seed))
        assert (rows != mel).any(axis=1).sum() <= 18
    assert {0, 30} & widths and len(widths) > 15, "widths are drawn from 0 to the limit"
    share = AugmentConfig(time_masks=1, time_mask_seconds=30, time_mask_share=0.1)
    most = max((spec_augment(mel, share, _seeded(s)) != mel).any(axis=0).sum() for s in range(60))
    assert 0 < most <= int(0.1 * frames)


@pytest.mark.parametrize("mode", ["trim", "full"])
def test_masks_leave_the_padding_of_a_window_alone(mode: Any) -> None:
    audio = np.tile(SPEECH[0], 40)[: 33 * SAMPLING_RATE]  # two windows
    mel = clip_mel(audio, 80, mode, 0.5).numpy()
    windows = plan_windows(len(audio), mode, 0.5)
    augmentation = Augmentation(AugmentConfig(time_masks=9, freq_masks=1, time_mask_share=0.9), 0)
    [change] = augmentation.change(0, ["key"], 0)
    masked = mask_windows(mel, windows, augmentation.settings, change)
    first = 0
    for window in windows:
        last = first + window.padded // HOP
        real = first + (window.stop - window.start) // HOP
        assert (masked[:, first:real] != mel[:, first:real]).any()
        assert np.array_equal(masked[:, real:last], mel[:, real:last])
        first = last
    assert first == mel.shape[1]


# -- draws -------------------------------------------------------------------------------------


def _everything(seed: int = 0, **changed: Any) -> Augmentation:
    settings = AugmentConfig.model_validate({**EVERYTHING, **changed})
    speeds = Speeds(
        tuple(settings.speed),
        np.ones((len(settings.speed), 3), np.int32),
        np.ones(3, np.int64),
        names_of(["a", "b", "c"]),
        seed,
    )
    return Augmentation(settings, seed, speeds, read_clips(["embedded:test"], "noise"))


def _made(augmentation: Augmentation, number: int, epoch: int) -> tuple[bytes, bytes]:
    """What becomes of one recording and of its log-mel."""
    [change] = augmentation.change(number, ["abc"[number]], epoch)
    audio = augment(SPEECH[0], change, augmentation)
    mel = log_mel(audio, 80).numpy()
    return audio.tobytes(), spec_augment(mel, augmentation.settings, change.places).tobytes()


def test_seed_epoch_and_recording_decide_about_every_bit() -> None:
    one = _made(_everything(), 1, 4)
    assert _made(_everything(), 1, 4) == one
    for other in (
        _made(_everything(), 1, 5),
        _made(_everything(), 2, 4),
        _made(_everything(1), 1, 4),
    ):
        assert other[0] != one[0] and other[1] != one[1]


def test_recordings_of_one_utterance_share_their_speed_and_nothing_else() -> None:
    first, second = _everything().change(1, ["b", "b"], 0)
    assert first.speed == second.speed and first.snr_db != second.snr_db


def test_one_effect_more_leaves_the_others_as_they_were() -> None:
    [every] = _everything().change(0, ["a"], 2)
    [fewer] = _everything(reverb_probability=0, telephone_probability=0).change(0, ["a"], 2)
    assert not fewer.reverb and not fewer.telephone
    assert (fewer.snr_db, fewer.gain_db) == (every.snr_db, every.gain_db)
    assert fewer.noise.random() == every.noise.random()


def test_what_is_drawn_follows_its_probabilities() -> None:
    settings = AugmentConfig(
        noise=["n"], noise_probability=0.25, reverb_probability=0.5, gain_probability=0.1
    )
    augmentation = Augmentation(settings, 7)
    drawn = [c for epoch in range(2000) for c in augmentation.change(0, ["key"], epoch)]
    assert np.mean([c.snr_db is not None for c in drawn]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([c.reverb for c in drawn]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([c.clean for c in drawn]) == pytest.approx(settings.clean_share, abs=0.04)
    assert all(5 <= c.snr_db <= 20 for c in drawn if c.snr_db is not None)
    assert not any(c.telephone or c.masks for c in drawn)


def test_speeds_are_drawn_evenly_and_alike_for_one_or_all() -> None:
    keys = [f"recording {n}" for n in range(3000)]
    factors = (0.9, 1.0, 1.1)
    positions = np.array([[12], [0], [8]], np.int32).repeat(3000, axis=1)
    positions[1], positions[0, :50] = 10, 0  # the first ones are too long at 0.9
    speeds = Speeds(factors, positions, np.full(3000, 10), names_of(keys), seed=3)
    for epoch in range(3):
        drawn = np.array([speed_of(factors, 3, key, epoch) for key in keys])
        for factor in factors:
            assert np.mean(drawn == factor) == pytest.approx(1 / 3, abs=0.03)
        given = np.array([speeds.of(n, epoch) for n in range(len(keys))])
        assert np.array_equal(given[50:], drawn[50:])
        assert set(given[:50].tolist()) == {1.0, 1.1}
        assert np.array_equal(speeds.lengths(epoch), [{0.9: 12, 1.0: 10, 1.1: 8}[s] for s in given])
    assert (speeds.lengths(0) != speeds.lengths(1)).any()
    assert (speeds.shortest == 8).all()


# -- corpora -----------------------------------------------------------------------------------


def test_an_excerpt_has_the_length_that_is_asked_for(
    record: Callable[..., Path], manifest: Callable[..., str]
) -> None:
    record("long.wav", 3.0, rate=8_000)
    record("short.wav", 0.3)
    for name in ("long.wav", "short.wav"):
        clips = read_clips([manifest({"audio": name}, name=f"{name}.jsonl")], "noise")
        for samples in (1, 4_801, 16_000, 100_000):
            excerpts = [clips.excerpt(_seeded(seed), samples) for seed in range(3)]
            assert all(e.shape == (samples,) and e.dtype == np.float32 for e in excerpts)
            assert samples == 1 or not np.array_equal(excerpts[0], excerpts[1])
            assert np.array_equal(excerpts[0], clips.excerpt(_seeded(0), samples))
    assert read_clips([manifest({"audio": "short.wav", "offset": 0.1, "duration": 0.1})], "noise")


@pytest.mark.parametrize(
    "row, named",
    [
        ("{", "JSON"),
        ('{"text": "no audio"}', r"\baudio\b"),
        ({"audio": "absent.wav"}, r"missing: .*absent\.wav"),
        ({"audio": "../absent.wav"}, r"'audio'.*'\.\./absent\.wav'"),
        ({"audio": "tone.wav", "offset": "1"}, "'offset'.*'1'"),
        ({"audio": "tone.wav", "offset": 5, "duration": 1}, r"span outside the file: .*tone\.wav"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    record: Callable[..., Path], manifest: Callable[..., str], row: Any, named: str
) -> None:
    record("tone.wav")
    with pytest.raises(ManifestError, match=rf"corpus\.jsonl:1\b.*{named}"):
        read_clips([manifest(row)], "noise")


def test_a_noise_that_cannot_be_decoded_names_itself(
    record: Callable[..., Path], manifest: Callable[..., str]
) -> None:
    path = record("tone.wav", 2.0)
    clips = read_clips([manifest({"audio": "tone.wav"})], "noise")
    soundfile.write(path, np.full(32_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"noise: not finite: .*tone\.wav"):
        clips.excerpt(_seeded(0), 16_000)
    assert Clips("noise").identity == Clips("reverb").identity != clips.identity
