"""What a file holds is read from its structure where its header is wrong or silent about it.

The small files beside this one were written by FFmpeg; some of them are changed here as recorders,
pipes and `cat` leave them.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni.audio.container import streamed_wav_length
from omni.audio.decode import AudioError, AudioSpan, decode, decode_blocks, measure

FILES = Path(__file__).parent / "files"
Record = Callable[..., Path]
ONE, THREE_QUARTERS = 16_000, 12_000  # samples of first.* and second.*


def _tone(seconds: float, hertz: float, rate: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def _encoded(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", **how: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **how)
    return file.getvalue()


def _hertz(audio: np.ndarray) -> int:
    return round(int(np.abs(np.fft.rfft(audio)).argmax()) * 16_000 / len(audio))


def _reason(read: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        read(data)
    return caught.value.reason


# -- lengths that the header does not have -----------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_flac_of_a_pipe_is_read_to_its_end(tmp_path: Path, rate: int) -> None:
    data = (FILES / "pipe.flac").read_bytes()
    if rate != 16_000:  # A header of a pipe has 0 in the 36 bits of the number of samples.
        whole = bytearray(_encoded(_tone(1, 440, rate), rate, "FLAC"))
        whole[21] &= 0xF0
        whole[22:26] = bytes(4)
        data = bytes(whole)
    path = tmp_path / "pipe.flac"
    path.write_bytes(data)
    assert measure(path) == measure(data) == len(decode(path)) == ONE
    assert _hertz(decode(path)) == 440
    assert np.array_equal(np.concatenate(list(decode_blocks(path, 0.1))), decode(path))
    span = AudioSpan(0.25, 0.5)
    assert measure(path, span) == len(decode(path, span)) == 8_000
    if rate == 16_000:
        assert np.array_equal(decode(path, span), decode(path)[4_000:12_000])


def test_a_flac_whose_header_says_too_little_is_read_to_its_end_and_one_too_much_refused() -> None:
    data = bytearray(_encoded(_tone(1, 440), kind="FLAC"))
    data[22:26] = (8_000).to_bytes(4, "big")
    assert measure(bytes(data)) == len(decode(bytes(data))) == ONE
    data[22:26] = (1 << 31).to_bytes(4, "big")  # 37 hours
    assert _reason(measure, bytes(data)) in ("shorter than its header says", "unreadable")


def test_an_mp3_of_variable_bit_rate_without_a_header_is_read_to_its_end() -> None:
    data = (FILES / "vbr-without-header.mp3").read_bytes()
    audio = decode(data)
    # 114 frames of 576 samples, less the delay of the decoder.
    assert measure(data) == len(audio) == pytest.approx(114 * 576, abs=576)
    assert _hertz(audio[32_000:48_000]) == 200


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_FFFF, 0x8000_0000])
def test_a_wav_of_a_pipe_is_read_to_its_end(size: int) -> None:
    data = bytearray(_encoded(_tone(1, 440)))
    data[4:8] = data[40:44] = struct.pack("<I", size)
    assert measure(bytes(data)) == len(decode(bytes(data))) == ONE
    data[4:8] = struct.pack("<I", len(data) - 8)  # Some fill in this size alone.
    assert measure(bytes(data)) == ONE


def test_a_wav_that_is_truly_empty_is_empty() -> None:
    data = _encoded(np.zeros(0))
    extra = data + b"LIST\x04\x00\x00\x00INFO"
    assert _reason(measure, data) == _reason(measure, extra) == "empty"


def test_rf64_and_caf_of_a_pipe_are_read_to_their_end() -> None:
    wav = _encoded(_tone(1, 440))
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 0, 0, 0, 0)
    rf64 = b"RF64\xff\xff\xff\xffWAVE" + sizes + wav[12:40] + b"\xff\xff\xff\xff" + wav[44:]
    caf = bytearray(_encoded(_tone(1, 440), kind="CAF", subtype="PCM_16"))
    at = caf.index(b"data")
    caf[at + 4 : at + 12] = b"\xff" * 8
    for data in (rf64, bytes(caf)):
        assert measure(data) == len(decode(data)) >= ONE
        assert _hertz(decode(data)[:ONE]) == 440


# -- joined files ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["opus", "mp3", "flac", "wav", "vorbis"])
@pytest.mark.parametrize("twice", [False, True], ids=["others", "twice the same"])
def test_joined_files_are_heard_as_one(tmp_path: Path, ending: str, twice: bool) -> None:
    """`cat first second`: Ogg streams with equal serial numbers, of icecast with others."""
    first, second = _tone(1, 440), _tone(0.75, 660)
    if ending in ("opus", "mp3"):
        parts = [(FILES / f"{name}.{ending}").read_bytes() for name in ("first", "second")]
    elif ending == "vorbis":
        parts = [_encoded(tone, kind="OGG", subtype="VORBIS") for tone in (first, second)]
    else:
        parts = [_encoded(tone, kind=ending.upper()) for tone in (first, second)]
    if twice:
        parts[1] = parts[0]
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(b"".join(parts))
    audio = decode(path)
    length = ONE + (ONE if twice else THREE_QUARTERS)
    assert measure(path) == len(audio) == length
    assert _hertz(audio[:ONE]) == 440
    assert _hertz(audio[ONE + 800 : -800]) == pytest.approx(440 if twice else 660, abs=2)
    assert np.array_equal(audio, np.concatenate([decode(part) for part in parts]))
    assert np.array_equal(np.concatenate(list(decode_blocks(path, 0.3))), audio)


def test_a_span_may_lie_across_joined_files_of_different_rates() -> None:
    data = _encoded(_tone(1, 440, 44_100), 44_100, "OGG", subtype="VORBIS")
    data += _encoded(_tone(1, 660), 16_000, "OGG", subtype="VORBIS")
    assert measure(data) == len(decode(data)) == 2 * ONE
    across = decode(data, AudioSpan(0.5, 1.0))
    assert measure(data, AudioSpan(0.5, 1.0)) == len(across) == ONE
    assert _hertz(across[:8_000]) == 440 and _hertz(across[8_000:]) == 660
    assert _hertz(decode(data, AudioSpan(1.25, 0.5))) == 660
    with pytest.raises(AudioError, match=r"of 2\.000 s"):
        measure(data, AudioSpan(1.5, 0.75))


def test_a_streamed_wav_in_an_ark_ends_where_the_next_begins() -> None:
    tones = [_tone(1, 440), _tone(0.75, 660)]
    ark, offsets = b"", []
    for number, tone in enumerate(tones):
        data = bytearray(_encoded(tone))
        data[4:8] = data[40:44] = b"\xff" * 4
        ark += f"utt-{number} ".encode()
        offsets.append(len(ark))
        ark += data
    for offset, tone in zip(offsets, tones, strict=True):
        keys = ["utt-0", "utt-1", "1"]
        length = streamed_wav_length(io.BytesIO(ark), offset, len(ark), keys)
        assert length == 44 + 2 * len(tone)
        assert len(decode(ark[offset:][:length])) == len(tone)
    assert streamed_wav_length(io.BytesIO(_encoded(tones[0])), 0, 32_044) is None


# -- files that are not whole ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "CAF", "W64", "NIST", "MP3", "OPUS"])
def test_a_file_that_was_cut_off_is_refused_by_the_index(kind: str) -> None:
    if kind == "OPUS":
        data = _encoded(np.random.default_rng(0).uniform(-0.5, 0.5, 80_000), 16_000, "OGG",
                        subtype="OPUS")  # fmt: skip
    else:
        data = _encoded(_tone(5, 440), kind=kind)
    assert measure(data) == 80_000
    cut = data[: int(len(data) * 0.4)]
    assert _reason(measure, cut) == "shorter than its header says"


def test_a_span_of_a_cut_file_is_good_where_it_is_whole() -> None:
    cut = _encoded(_tone(5, 440))[:80_000]
    assert measure(cut, AudioSpan(0.5, 1.0)) == len(decode(cut, AudioSpan(0.5, 1.0))) == ONE
    assert _reason(lambda d: measure(d, AudioSpan(2.0, 1.0)), cut) == "span outside the file"
    assert _reason(lambda d: measure(d, AudioSpan(2.0)), cut) == "shorter than its header says"


def _pages(data: bytes) -> list[bytes]:
    return [b"OggS" + page for page in data.split(b"OggS")[1:]]


def test_pages_that_are_lost_are_noticed_and_foreign_bytes_skipped() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000)
    pages = _pages(_encoded(noise, 16_000, "OGG", subtype="OPUS"))
    assert len(pages) > 8 and measure(b"".join(pages)) == 160_000
    lost = b"".join(pages[:5] + pages[6:])
    assert _reason(measure, lost) == "parts are missing"
    assert _reason(lambda d: measure(d, AudioSpan(0.0, 1.0)), lost) == "parts are missing"
    foreign = b"".join([*pages[:5], bytes(3_000), *pages[5:]])
    assert measure(foreign) == len(decode(foreign)) == 160_000
    assert _reason(measure, b"".join(pages[4:])) == "unreadable"  # without its headers


def test_an_mp3_recorded_from_its_middle_is_decoded_to_know() -> None:
    data = (FILES / "vbr-without-header.mp3").read_bytes()[1_000:]
    assert measure(data) == len(decode(data)) > 40_000


def test_a_webm_that_was_cut_off_is_refused_by_the_index() -> None:
    pytest.importorskip("av")
    data = (FILES / "tone.webm").read_bytes()
    assert _reason(measure, data[: len(data) // 3]) == "shorter than its header says"


def test_data_behind_the_size_of_a_wav_is_noticed() -> None:
    data = bytearray(_encoded(_tone(2, 440)))
    data[40:44] = struct.pack("<I", 8_000)
    assert _reason(measure, bytes(data)) == "longer than its header says"
    trailer = _encoded(_tone(2, 440)) + b"TAG" + bytes(125)
    assert measure(trailer) == 32_000


def test_one_missing_byte_is_no_fault() -> None:
    assert measure(_encoded(_tone(1, 440))[:-1]) == ONE - 1


@pytest.mark.parametrize(("rate", "channels"), [(655_350, 8), (384_000, 8), (500, 1)])
def test_a_header_of_an_implausible_rate_is_refused_before_anything_is_decoded(
    rate: int, channels: int
) -> None:
    data = bytearray(_encoded(np.zeros((1000, channels)), 16_000))
    data[24:28] = struct.pack("<I", rate)
    assert _reason(measure, bytes(data)) == _reason(decode, bytes(data)) == "implausible header"


def test_decoding_stops_at_a_recording_that_is_longer_than_in_the_index() -> None:
    data = _encoded(_tone(300, 440), kind="FLAC")
    with pytest.raises(AudioError) as caught:
        decode(data, samples=ONE)
    assert caught.value.reason == "length mismatch"


# -- levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.3, 1e-5])
def test_silence_is_refused(value: float) -> None:
    data = _encoded(np.full(ONE, value), subtype="FLOAT")
    assert measure(data) == ONE
    assert _reason(decode, data) == "silent"
    assert _reason(lambda d: list(decode_blocks(d)), data) == "silent"
    assert len(decode(data, allow_silence=True)) == ONE


def test_floats_in_the_range_of_integers_are_refused() -> None:
    tone = _tone(1, 440)
    assert _reason(decode, _encoded(32_768 * tone, subtype="FLOAT")) == "not in [-1, 1]"
    assert np.abs(decode(_encoded(3 * tone, subtype="FLOAT"))).max() == pytest.approx(1.5)


def _stereo(left: np.ndarray, right: np.ndarray) -> bytes:
    return _encoded(np.stack((left, right), axis=1), subtype="FLOAT")


def test_of_channels_that_cancel_out_the_loudest_is_taken() -> None:
    voice = np.random.default_rng(0).normal(0, 0.1, ONE).astype(np.float32)
    notes: list[str] = []
    audio = decode(_stereo(-0.5 * voice, voice), notes=notes)
    assert np.array_equal(audio, voice)
    assert notes == ["one channel instead of the mean\nchannel 2 of 2: their mean cancels out"]
    blocks = list(decode_blocks(_stereo(-0.5 * voice, voice), 0.1))
    assert len(blocks) > 5 and np.array_equal(np.concatenate(blocks), audio)


def test_channels_of_two_speakers_and_a_silent_channel_are_averaged() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0, 0.1, (2, ONE)).astype(np.float32)
    for left, right in ((one, other), (one, 0 * one), (one, one), (one, -0.2 * one)):
        notes: list[str] = []
        audio = decode(_stereo(left, right), notes=notes)
        assert np.array_equal(audio, np.stack((left, right), 1).mean(axis=1)) and not notes


# -- other containers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tone.m4a", "tone.webm"])
def test_what_libsndfile_cannot_read_is_decoded_with_pyav(name: str) -> None:
    pytest.importorskip("av")
    audio = decode(FILES / name)
    assert measure(FILES / name) == len(audio) == pytest.approx(ONE, abs=400)
    assert _hertz(audio[:ONE]) == 440 and np.abs(audio).max() == pytest.approx(0.5, abs=0.15)
    part = decode(FILES / name, AudioSpan(0.25, 0.5))
    assert len(part) == 8_000 and np.allclose(part[500:-500], audio[4_500:11_500], atol=2e-3)


def test_without_pyav_the_reject_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.audio.recording.has_av", lambda: False)
    monkeypatch.setattr("omni.audio.av_stream.has_av", lambda: False)
    with pytest.raises(AudioError, match=r"pip install 'nanochat-omni\[av\]'") as caught:
        measure(FILES / "tone.m4a")
    assert caught.value.reason == "unreadable"


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    """FFmpeg reads playlists and scripts that name files and hosts; none of them is opened."""
    pytest.importorskip("av")
    secret = tmp_path / "secret.wav"
    secret.write_bytes(_encoded(_tone(1, 440)))
    lines = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "list.m4a": f"ffconcat version 1.0\nfile {secret}\n",
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AudioError) as caught:
            decode(tmp_path / name)
        assert caught.value.reason == "unreadable"


def test_importing_the_decoder_does_not_load_pyav() -> None:
    assert "omni.audio.decode" in sys.modules
    source = Path(sys.modules["omni.audio.av_stream"].__file__ or "").read_text()
    assert "\nimport av" not in source
