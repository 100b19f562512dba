"""Recordings whose headers are wrong, as pipes, recorders, `cat` and hostile authors make them."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable

import numpy as np
import soundfile

from omni.audio.av_stream import AVStream
from omni.audio.container import find_layout

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)


def _encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def _any(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    kind = rng.choice(["WAV", "FLAC", "OGG", "MP3", "OPUS", "AIFF", "AU", "CAF", "W64"])
    if kind == "OPUS":
        return _encoded(samples, rng.choice([8_000, 16_000, 48_000]), "OGG", "OPUS")
    if kind == "MP3" and rate < 16_000:
        rate = 16_000
    return _encoded(samples, rate, kind)


def piped_flac(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    """The number of samples in the header is 0, as in a pipe, or any other."""
    data = bytearray(_encoded(samples, rate, "FLAC"))
    number = rng.choice([0, 1, len(samples) // 2, len(samples) * 10, 1 << 35])
    data[21] = data[21] & 0xF0 | number >> 32
    data[22:26] = (number & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(data)


def piped_wav(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    data = bytearray(_encoded(samples, rate, "WAV"))
    sizes = [0, 0xFFFF_FFFF, 0x7FFF_FFFF, 0x8000_0000, 2, len(data) // 2, len(data) * 2]
    data[40:44] = struct.pack("<I", rng.choice(sizes))
    if rng.random() < 0.7:
        data[4:8] = struct.pack("<I", rng.choice(sizes))
    return bytes(data)


def joined(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    """Two or three files of one kind, one after another."""
    kind = rng.choice(["WAV", "FLAC", "MP3", "VORBIS", "OPUS"])
    data = b""
    for _ in range(rng.randint(2, 3)):
        part = samples[: rng.randint(len(samples) // 2, len(samples))]
        if kind == "VORBIS":
            data += _encoded(part, rng.choice(RATES), "OGG", "VORBIS")
        elif kind == "OPUS":
            data += _encoded(part, rng.choice([8_000, 16_000, 48_000]), "OGG", "OPUS")
        else:
            data += _encoded(part, max(rate, 16_000), kind)
    return data


def without_xing(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    """MP3 of variable bit rate whose first frame, which says how many follow, is gone."""
    noise = np.random.default_rng(rng.randrange(1 << 30)).uniform(-0.5, 0.5, len(samples) // 2)
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", max(16_000, rate), 1, format="MP3", bitrate_mode="VARIABLE"
    ) as writer:
        writer.write(np.concatenate((noise, samples) if rng.random() < 0.5 else (samples, noise)))
    data = file.getvalue()
    second = data.find(data[:2], 24)
    return data[second:] if second > 0 else data


def cut_off(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    data = _any(samples, rate, rng)
    return data[: int(len(data) * rng.uniform(0.05, 0.98))]


def levels(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    """Silence, opposite channels, floats in the range of integers, values that are no numbers."""
    kind = rng.randrange(5)
    if kind == 0:
        samples = np.full_like(samples, rng.choice([0.0, 0.25]))
    elif kind == 1:
        samples = np.stack((samples, -samples), axis=1)
    elif kind == 2:
        samples = samples * 32_768
    elif kind == 3:
        samples = samples.copy()
        samples[rng.randrange(len(samples))] = rng.choice([np.nan, np.inf, 1e30])
    else:
        samples = np.stack((samples, 0 * samples), axis=1)
    return _encoded(samples, rate, "WAV", "FLOAT")


def bomb(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    """A small file that claims, or unpacks to, very much."""
    if rng.random() < 0.5:
        silence = np.zeros((rng.choice([50_000, 400_000]), rng.choice([1, 8])), np.int16)
        return _encoded(silence, rng.choice([655_350, 96_000, 8_000]), "FLAC")
    data = bytearray(_encoded(samples, rate, "WAV"))
    data[22:24] = struct.pack("<H", rng.choice([1, 2, 255, 65_535]))
    data[24:28] = struct.pack("<I", rng.choice([1, 999, 700_000, 0xFFFF_FFFF]))
    return bytes(data)


KINDS: dict[str, Callable[[np.ndarray, int, random.Random], bytes]] = {
    f.__name__: f for f in (piped_flac, piped_wav, joined, without_xing, cut_off, levels, bomb)
}


def wrong_header(samples: np.ndarray, rate: int, rng: random.Random) -> bytes:
    """Write a recording with one of the wrong headers."""
    return rng.choice(list(KINDS.values()))(samples, rate, rng)


def disagreement(data: bytes, seconds: float) -> str | None:
    """Say how FFmpeg disagrees with the `seconds` of a recording; None: it does not, or cannot.

    It hears the whole file, and the links that `find_layout` names one by one: it gives up in the
    middle of joined files of other rates, and reads the first of joined WAV files only. The longer
    of both counts: less than that would be lost audio.
    """
    layout = find_layout(io.BytesIO(data), len(data))
    pieces = [link.head + data[link.offset : link.offset + link.length] for link in layout.links]
    opinions = [_seconds(data), _sum([_seconds(piece) for piece in pieces]) if pieces else None]
    heard = [opinion for opinion in opinions if opinion is not None]
    # FFmpeg keeps the delay of the encoder of each joined MP3.
    if not heard or abs(max(heard) - seconds) <= 0.15 * max(1, len(pieces)) + 0.02 * seconds:
        return None
    return f"omni hears {seconds:.3f} s, FFmpeg {max(heard):.3f} s"


def _sum(seconds: list[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) if len(known) == len(seconds) else None


def _seconds(data: bytes) -> float | None:
    try:
        stream = AVStream(io.BytesIO(data))
        frames = sum(len(block) for block in stream.blocks(0, None, 1 << 20))
    except Exception:  # of FFmpeg, which refuses more than libsndfile does
        return None
    return frames / stream.rate
