"""Recordings of many formats become 16 kHz mono; bad ones become an AudioError with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import omni
from omni.audio.decode import AudioError, AudioSpan, decode, decode_blocks, fit, measure
from omni.audio.windows import FRAME

Record = Callable[..., Path]
CLIPS = sorted((Path(omni.__file__).parent / "assets" / "prompts-en" / "audio").glob("*.opus"))
FORMATS: dict[str, dict[str, Any]] = {
    "8-bit.wav": {"subtype": "PCM_U8"},
    "16-bit.wav": {"subtype": "PCM_16"},
    "24-bit.wav": {"subtype": "PCM_24", "rate": 44_100},
    "float.wav": {"subtype": "FLOAT", "rate": 48_000},
    "96-khz.wav": {"rate": 96_000},
    "8-khz.wav": {"rate": 8_000},
    "5-ms.wav": {"seconds": 0.005},
    "5-ms-of-44.1-khz.wav": {"seconds": 0.005, "rate": 44_100},
    "lossless.flac": {"rate": 22_050},
    "vorbis.ogg": {"format": "OGG", "subtype": "VORBIS", "rate": 44_100},
    "opus-16-khz.opus": {"format": "OGG", "subtype": "OPUS"},
    "opus-48-khz.opus": {"format": "OGG", "subtype": "OPUS", "rate": 48_000},
}


@pytest.fixture(params=FORMATS)
def any_recording(request: pytest.FixtureRequest, record: Record) -> Path:
    return record(request.param, **{"seconds": 0.7313, **FORMATS[request.param]})


def test_every_format_decodes_to_what_was_recorded(any_recording: Path) -> None:
    audio = decode(any_recording)
    seconds = soundfile.info(str(any_recording)).duration
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert len(audio) == pytest.approx(seconds * 16_000, abs=1)
    middle = audio[len(audio) // 4 : -len(audio) // 4]
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(audio)) / 16_000)
    if len(audio) > 10 * FRAME:  # lossy codecs need a while to be true to a tone
        assert np.abs(middle - tone[len(audio) // 4 : -len(audio) // 4]).max() < 0.06


def test_the_header_tells_the_decoded_length(any_recording: Path) -> None:
    measured, decoded = measure(any_recording), len(decode(any_recording))
    assert abs(measured - decoded) <= FRAME
    if soundfile.info(str(any_recording)).samplerate == 16_000:
        assert measured == decoded


def test_the_header_tells_the_length_of_the_embedded_clips() -> None:
    chosen = CLIPS[::20]
    assert len(chosen) > 10
    assert [measure(clip) for clip in chosen] == [len(decode(clip)) for clip in chosen]


def test_bytes_decode_like_their_file(any_recording: Path) -> None:
    assert np.array_equal(decode(any_recording.read_bytes()), decode(any_recording))


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = np.sin(np.arange(16_000) / 10)
    soundfile.write(tmp_path / "stereo.wav", np.stack((left, 0 * left), 1), 16_000, "FLOAT")
    audio = decode(tmp_path / "stereo.wav")
    assert measure(tmp_path / "stereo.wav") == len(audio) == 16_000
    assert np.allclose(audio, left / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_a_resampled_tone_keeps_frequency_and_loudness(record: Record, rate: int) -> None:
    audio = decode(record("tone.wav", rate=rate, hertz=1_000, subtype="FLOAT"))
    spectrum = np.abs(np.fft.rfft(audio))
    assert spectrum.argmax() == 1_000  # one second: bins are Hz
    assert np.abs(audio[2_000:-2_000]).max() == pytest.approx(0.5, rel=0.01)


def test_a_tone_above_8_khz_does_not_fold_back(record: Record) -> None:
    audio = decode(record("high.wav", rate=48_000, hertz=10_000, subtype="FLOAT"))
    assert np.abs(audio[2_000:-2_000]).max() < 1e-3


# -- spans -------------------------------------------------------------------------------------


def test_a_span_is_that_part_of_the_file(record: Record) -> None:
    path = record("long.wav", 2.0, hertz=443.7)  # no period fits the spans
    part = decode(path, AudioSpan(0.5, 0.75))
    assert np.array_equal(part, decode(path)[8_000:20_000])
    assert measure(path, AudioSpan(0.5, 0.75)) == 12_000


def test_a_span_without_a_duration_goes_to_the_end(record: Record) -> None:
    path = record("long.wav", 2.0, hertz=443.7)
    assert measure(path, AudioSpan(1.25)) == 12_000
    assert np.array_equal(decode(path, AudioSpan(1.25)), decode(path)[20_000:])


@pytest.mark.parametrize("ending, how", [("flac", {}), ("ogg", {"subtype": "VORBIS"})])
def test_spans_are_found_in_compressed_files(
    record: Record, ending: str, how: dict[str, str]
) -> None:
    path = record(f"long.{ending}", 2.0, hertz=443.7, **how)
    part = decode(path, AudioSpan(0.5, 0.75))
    assert measure(path, AudioSpan(0.5, 0.75)) == len(part)
    assert np.allclose(part, decode(path)[8_000:20_000], atol=1e-4)


def test_a_span_of_another_rate_is_measured_at_16_khz(record: Record) -> None:
    path = record("long.wav", 2.0, rate=44_100, hertz=443.7)
    part = decode(path, AudioSpan(0.5, 0.75))
    assert measure(path, AudioSpan(0.5, 0.75)) == len(part) == 12_000
    assert np.allclose(part[500:-500], decode(path)[8_500:19_500], atol=1e-3)


@pytest.mark.parametrize(
    "span",
    [
        AudioSpan(0.5, 0.6),
        AudioSpan(1.5),
        AudioSpan(1.5, 0.1),
        AudioSpan(-0.1, 0.5),
        AudioSpan(0.2, -0.1),
        AudioSpan(0.2, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", [measure, decode])
def test_a_span_outside_the_file_is_rejected(
    record: Record, read: Callable[..., object], span: AudioSpan
) -> None:
    with pytest.raises(AudioError, match=r"of 1\.000 s") as caught:
        read(record("short.wav", 1.0), span)
    assert caught.value.reason == "span outside the file"


def test_a_span_may_end_a_few_ms_after_the_file(record: Record) -> None:
    """Manifests round to milliseconds; what there is of the span is used."""
    path = record("short.wav", 1.0)
    span = AudioSpan(0.5, 0.505)
    assert measure(path, span) == len(decode(path, span)) == 8_000


# -- fit ---------------------------------------------------------------------------------------


def test_audio_is_cut_or_padded_within_a_frame() -> None:
    audio = np.ones(16_000, np.float32)
    assert np.array_equal(fit(audio, 16_000), audio)
    assert np.array_equal(fit(audio, 16_000 - FRAME), audio[:-FRAME])
    longer = fit(audio, 16_000 + FRAME)
    assert np.array_equal(longer[:16_000], audio)
    assert len(longer) == 16_000 + FRAME and not longer[16_000:].any()
    assert longer.dtype == np.float32


@pytest.mark.parametrize("samples", [16_000 - FRAME - 1, 16_000 + FRAME + 1, 1])
def test_more_than_a_frame_is_another_file(samples: int) -> None:
    with pytest.raises(AudioError, match=r"\b1\.000 s\b") as caught:
        fit(np.ones(16_000, np.float32), samples)
    assert caught.value.reason == "length mismatch"


# -- bad recordings ----------------------------------------------------------------------------


def _refusal(read: Callable[..., object], path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        read(path)
    assert path.name in caught.value.detail, "the detail names the file"
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def _cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_no_file(tmp_path: Path) -> None:
    assert _refusal(measure, tmp_path / "nothing.wav") == "missing"
    assert _refusal(decode, tmp_path / "nothing.wav") == "unreadable"


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    assert _refusal(measure, tmp_path / "folder.wav") == "missing"
    assert _refusal(decode, tmp_path / "folder.wav") == "unreadable"


@pytest.mark.parametrize("content", [b"", b"so this is text\n" * 100, b"RIFF\x24\x00\x00\x00WAVE"])
def test_a_file_that_is_no_recording(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "claims-to-be.wav"
    path.write_bytes(content)
    assert _refusal(measure, path) == _refusal(decode, path) == "unreadable"
    with pytest.raises(AudioError, match=r"^unreadable: .*\bbytes\b"):
        decode(content)


def test_a_recording_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "silent.wav"
    soundfile.write(path, np.zeros(0), 16_000)
    assert _refusal(measure, path) == _refusal(decode, path) == "empty"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    samples = np.zeros(16_000, np.float32)
    samples[100] = value
    path = tmp_path / "broken.wav"
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    assert measure(path) == 16_000  # the header cannot know
    assert _refusal(decode, path) == "not finite"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_flac_is_noticed_although_its_header_is_whole(
    record: Record, share: float
) -> None:
    path = _cut(record("cut.flac"), share)
    if share < 0.9:
        assert _refusal(measure, path) == "shorter than its header says"
    else:
        assert measure(path) == 16_000  # The header of the last frame is there.
    assert _refusal(decode, path) == "unreadable"


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_truncated_ogg_is_noticed_by_its_header(
    record: Record, subtype: str, share: float
) -> None:
    path = _cut(record("cut.ogg", rate=48_000, format="OGG", subtype=subtype), share)
    assert _refusal(measure, path) == _refusal(decode, path) == "unreadable"


def test_a_wav_cut_in_its_header_is_unreadable(record: Record) -> None:
    path = record("cut.wav")
    path.write_bytes(path.read_bytes()[:40])
    assert _refusal(measure, path) == _refusal(decode, path) == "unreadable"


def test_a_wav_cut_in_its_samples_is_refused_by_the_index_and_decoded_as_far_as_it_goes(
    record: Record,
) -> None:
    path = _cut(record("cut.wav"), 0.5)
    assert _refusal(measure, path) == "shorter than its header says"
    assert len(decode(path)) == pytest.approx(8_000, abs=50)


def test_a_recording_too_short_for_one_sample_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "click.wav"
    soundfile.write(path, np.ones(1), 96_000)
    assert _refusal(measure, path) == _refusal(decode, path) == "empty"


# -- in blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_blocks_are_the_whole_file_to_the_last_bit(
    tmp_path: Path, rate: int, channels: int
) -> None:
    noise = np.random.default_rng(rate).uniform(-0.5, 0.5, (round(3.3 * rate), channels))
    soundfile.write(tmp_path / "noise.flac", noise, rate)
    blocks = list(decode_blocks(tmp_path / "noise.flac", seconds=0.5))
    assert len(blocks) >= 6 and max(map(len, blocks)) <= 0.6 * 16_000
    assert np.array_equal(np.concatenate(blocks), decode(tmp_path / "noise.flac"))


def test_blocks_fail_for_the_reasons_that_decode_has(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a recording")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    late = np.zeros(32_000, dtype=np.float32)
    late[-1] = np.nan
    soundfile.write(tmp_path / "late.wav", late, 16_000, subtype="FLOAT")
    for name, reason in (("text", "unreadable"), ("empty", "empty"), ("late", "not finite")):
        with pytest.raises(AudioError) as caught:
            list(decode_blocks(tmp_path / f"{name}.wav", seconds=0.5))
        assert caught.value.reason == reason
