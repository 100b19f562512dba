"""Long recordings are cut at pauses of speech before the model hears them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import booleans, floats

from omni.audio.decode import AudioError, decode
from omni.inference.pieces import cut_at_pauses, fit_blocks, is_long
from tests.helpers.long_recordings import ASSETS

RATE = 16_000


def _noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)


@given(seconds=floats(0.01, 12), longest=floats(2, 4), in_blocks=booleans())
@settings(max_examples=8, deadline=None)
@example(seconds=2.5001, longest=2.0, in_blocks=True)
@example(seconds=21.7, longest=3.33, in_blocks=True)
def test_pieces_are_the_recording_and_none_is_too_long(
    seconds: float, longest: float, in_blocks: bool
) -> None:
    audio = _noise(seconds)
    blocks = np.array_split(audio, 7) if in_blocks else [audio]
    pieces = list(cut_at_pauses(blocks, longest))
    assert np.array_equal(np.concatenate(pieces), audio)
    most = round(longest * RATE)
    assert all(most // 2 <= len(piece) <= most for piece in pieces[:-1])
    assert not is_long(len(pieces[-1]), longest)


def test_a_recording_that_is_short_enough_stays_whole() -> None:
    assert len(list(cut_at_pauses([_noise(2.5)], 2.0))) == 1
    assert len(list(cut_at_pauses([_noise(2.5001)], 2.0))) == 2


def test_silence_is_cut_somewhere_too() -> None:
    pieces = list(cut_at_pauses([np.zeros(10 * RATE, np.float32)], 3.0))
    assert sum(map(len, pieces)) == 10 * RATE and max(map(len, pieces)) <= 3.75 * RATE


def test_cuts_fall_into_silence_where_there_is_some() -> None:
    """Five phrases of 1.6 s with pauses of 0.3 s: each pause is a place to cut."""
    pause = np.zeros(round(0.3 * RATE), np.float32)
    phrases = [_noise(1.6, seed) for seed in range(5)]
    audio = np.concatenate([part for phrase in phrases for part in (phrase, pause)])
    pieces = list(cut_at_pauses([audio], 2.5))
    cuts = np.cumsum([len(piece) for piece in pieces])[:-1]
    assert len(cuts) >= 3
    for cut in cuts:
        assert not audio[cut - 100 : cut + 100].any(), f"a cut at {cut / RATE:.2f} s"


def test_the_quietest_place_wins_over_the_last() -> None:
    audio = _noise(4.0)
    audio[round(1.2 * RATE) : round(1.5 * RATE)] *= 0.01
    audio[round(1.7 * RATE) : round(1.9 * RATE)] *= 0.5
    first = next(cut_at_pauses([audio], 2.0))
    assert 1.2 <= len(first) / RATE <= 1.5


def test_recordings_joined_to_a_minute_are_cut_between_words() -> None:
    """Each sample is in one piece, and no cut lies in what the prompts say."""
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    short = [row for row in rows if row["duration"] < 4]
    clips = [decode(ASSETS / row["audio"]) for row in short[:30]]
    audio, pause = np.zeros(0, np.float32), np.zeros(RATE // 10, np.float32)
    joints = []
    for clip in clips:
        audio = np.concatenate((audio, clip, pause))
        joints.append(len(audio))
        if len(audio) >= 60 * RATE:
            break
    blocks = np.array_split(audio, 13)
    pieces = list(cut_at_pauses(blocks, 12.0))
    assert np.array_equal(np.concatenate(pieces), audio)
    cuts = np.cumsum([len(piece) for piece in pieces])[:-1]
    assert len(cuts) >= len(audio) // (12 * RATE)
    loudest = np.abs(audio).max()
    for cut in cuts:
        near = np.abs(audio[cut - RATE // 40 : cut + RATE // 40]).max()
        assert near < 0.05 * loudest, f"sound at {cut / RATE:.2f} s"


def test_speech_in_noise_is_cut_where_nobody_speaks() -> None:
    """The quietest place is in a word here: the pauses are filled with louder noise."""
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    clips = [decode(ASSETS / row["audio"]) for row in rows if 2.5 < row["duration"] < 3.5][:2]
    noise = 0.1 * _noise(1.0)
    first, second = (0.3 * clip / np.abs(clip).max() for clip in clips)
    audio = np.concatenate((first, noise, second))
    cut = len(next(cut_at_pauses([audio], len(audio) / RATE / 1.3)))
    assert len(first) - RATE // 4 < cut < len(first) + len(noise) + RATE // 4


def test_a_stream_is_as_long_as_the_index_says() -> None:
    blocks = [np.ones(700, np.float32), np.ones(400, np.float32)]
    assert sum(map(len, fit_blocks(iter(blocks), 1000))) == 1000
    assert sum(map(len, fit_blocks(iter(blocks), 1300))) == 1100
    with pytest.raises(AudioError, match="length mismatch"):
        list(fit_blocks(iter(blocks), 2000))
