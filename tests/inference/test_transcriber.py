"""Long recordings are cut in quiet places before the model hears them."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis.strategies import booleans, floats

from omni.inference.transcriber import cut_at_quiet

RATE = 16_000


def _noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)


@given(seconds=floats(0.01, 12), longest=floats(2, 4), in_blocks=booleans())
@settings(max_examples=30, deadline=None)
@example(seconds=2.0001, longest=2.0, in_blocks=True)
@example(seconds=61.7, longest=3.33, in_blocks=True)
def test_pieces_are_the_recording_and_none_is_too_long(
    seconds: float, longest: float, in_blocks: bool
) -> None:
    audio = _noise(seconds)
    blocks = np.array_split(audio, 7) if in_blocks else [audio]
    pieces = list(cut_at_quiet(blocks, longest))
    assert np.array_equal(np.concatenate(pieces), audio)
    most = round(longest * RATE)
    assert max(len(piece) for piece in pieces) <= most
    assert all(len(piece) >= most // 2 for piece in pieces[:-1])


def test_a_recording_that_is_short_enough_stays_whole() -> None:
    assert len(list(cut_at_quiet([_noise(2.0)], 2.0))) == 1
    assert len(list(cut_at_quiet([_noise(2.0001)], 2.0))) == 2


def test_silence_is_cut_somewhere_too() -> None:
    pieces = list(cut_at_quiet([np.zeros(10 * RATE, np.float32)], 3.0))
    assert sum(map(len, pieces)) == 10 * RATE and max(map(len, pieces)) <= 3 * RATE


def test_cuts_fall_into_silence_where_there_is_some() -> None:
    """Five phrases of 1.6 s with pauses of 0.3 s: each pause is a place to cut."""
    pause = np.zeros(round(0.3 * RATE), np.float32)
    phrases = [_noise(1.6, seed) for seed in range(5)]
    audio = np.concatenate([part for phrase in phrases for part in (phrase, pause)])
    pieces = list(cut_at_quiet([audio], 2.5))
    cuts = np.cumsum([len(piece) for piece in pieces])[:-1]
    assert len(cuts) == 4
    for cut in cuts:
        assert not audio[cut - 100 : cut + 100].any(), f"a cut at {cut / RATE:.2f} s"


def test_the_quietest_place_wins_over_the_last() -> None:
    audio = _noise(4.0)
    audio[round(1.2 * RATE) : round(1.5 * RATE)] *= 0.01
    audio[round(1.7 * RATE) : round(1.9 * RATE)] *= 0.5
    first = next(cut_at_quiet([audio], 2.0))
    assert 1.2 <= len(first) / RATE <= 1.5
