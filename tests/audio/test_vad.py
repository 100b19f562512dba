"""Voice activity finds what was said in a recording, however it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from omni.audio.decode import AudioError, AudioSpan, decode, decode_blocks
from omni.audio.vad import Segmenting, speech_spans
from tests.helpers.long_recordings import SLACK, Times, bridges, uncovered, write_long


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Times]:
    path = tmp_path_factory.mktemp("long") / "long.flac"
    return path, write_long(path, 2)


@pytest.fixture(scope="module")
def spans(long: tuple[Path, Times]) -> Times:
    return speech_spans(long[0])


def test_every_prompt_is_found_and_none_are_joined(long: tuple[Path, Times], spans: Times) -> None:
    said = long[1]
    assert len(said) > 15
    assert uncovered(said, spans) == [] and bridges(said, spans) == []
    speech = sum(end - start for start, end in said)
    assert sum(d for _, d in spans) < speech + 2 * SLACK * len(said), "pauses are left out"


def test_spans_are_in_order_apart_and_no_longer_than_asked(long: tuple[Path, Times]) -> None:
    how = Segmenting(longest=5.0, shortest=0.1, silence=0.3, padding=0.05)
    spans = speech_spans(long[0], how)
    assert max(d for _, d in spans) <= 5.0 and min(d for _, d in spans) >= 0.1
    assert max(d for _, d in spans) > 3.0
    ends = [a + d for a, d in spans]
    assert all(end <= a for end, (a, _) in zip(ends, spans[1:], strict=False))
    assert spans[0][0] >= 0 and ends[-1] <= soundfile.info(long[0]).duration
    assert uncovered(long[1], spans) == []


@pytest.mark.parametrize("seconds", [0.077, 1e4])
def test_spans_do_not_depend_on_blocks(
    long: tuple[Path, Times], spans: Times, seconds: float
) -> None:
    assert speech_spans(long[0].read_bytes(), block_seconds=seconds) == spans


def test_other_rates_and_channels_give_the_same_times(
    tmp_path: Path, long: tuple[Path, Times], spans: Times
) -> None:
    said = write_long(tmp_path / "stereo.wav", 0.5, rate=44_100, channels=2)
    found = speech_spans(tmp_path / "stereo.wav")
    assert len(said) > 5 and uncovered(said, found) == [] and bridges(said, found) == []


def test_a_part_of_a_recording_is_looked_at_alone(long: tuple[Path, Times], spans: Times) -> None:
    (_, before), (start, _), (_, end), (after, _) = long[1][4:8]
    within = AudioSpan((before + start) / 2, (end + after) / 2 - (before + start) / 2)
    found = speech_spans(long[0], within=within)
    expected = [(a, d) for a, d in spans if start - 0.5 < a < end]
    assert len(found) == len(expected) == 2
    assert np.allclose(found, expected, atol=0.07), "two of the model's chunks"


def test_silence_and_hum_are_no_speech(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hum = 0.1 * np.sin(2 * np.pi * 50 * np.arange(40 * 16_000) / 16_000)
    for name, sound in (("noise", rng.normal(0, 1e-3, len(hum))), ("hum", hum)):
        soundfile.write(tmp_path / f"{name}.wav", sound, 16_000)
        assert speech_spans(tmp_path / f"{name}.wav") == []
    soundfile.write(tmp_path / "silence.wav", 0 * hum, 16_000)
    with pytest.raises(AudioError, match=r"silence\.wav") as caught:
        speech_spans(tmp_path / "silence.wav")
    assert caught.value.reason == "silent"


def test_what_cannot_be_read_is_an_audio_error(tmp_path: Path, long: tuple[Path, Times]) -> None:
    data = long[0].read_bytes()
    for wrong, reason in ((b"no sound", "unreadable"), (data[: len(data) // 2], "unreadable")):
        with pytest.raises(AudioError) as caught:
            speech_spans(wrong)
        assert caught.value.reason == reason


def test_the_process_keeps_its_threads(long: tuple[Path, Times]) -> None:
    before = torch.get_num_threads()
    speech_spans(long[0], within=AudioSpan(0.0, 1.0))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"longest": 0.5}, r"^longest_seconds\b.*\b1\b.*\b0\.5\b"),
        ({"longest": 2.0, "padding": 1.0}, r"^longest_seconds\b.*\b2\.35\b.*\b2\b"),
        ({"silence": -1.0}, r"^silence_seconds\b.*\b0\b.*-1\b"),
        ({"shortest": float("nan")}, r"^shortest_seconds\b.*\b0\b.*\bnan\b"),
    ],
)
def test_wrong_limits_name_the_field(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Segmenting(**settings)


# -- blocks of a part ------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_blocks_of_a_span_are_what_decode_returns(tmp_path: Path, rate: int) -> None:
    noise = np.random.default_rng(rate).uniform(-0.5, 0.5, 3 * rate)
    soundfile.write(tmp_path / "noise.flac", noise, rate)
    for span in (AudioSpan(0.5, 1.3), AudioSpan(1.1), AudioSpan(0.0, 2.0)):
        blocks = list(decode_blocks(tmp_path / "noise.flac", 0.2, span))
        assert len(blocks) > 5
        assert np.array_equal(np.concatenate(blocks), decode(tmp_path / "noise.flac", span))
    with pytest.raises(AudioError, match=r"noise\.flac") as caught:
        list(decode_blocks(tmp_path / "noise.flac", 0.2, AudioSpan(2.5, 1.0)))
    assert caught.value.reason == "span outside the file"
