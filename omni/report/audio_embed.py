"""Recordings inside a page: audio and log-mel pictures as data URIs, waveforms as SVG paths."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from omni.audio.decode import AudioError, AudioSpan, decode
from omni.audio.logmel import log_mel
from omni.audio.windows import HOP, SAMPLING_RATE
from omni.storage.path import literal_path

_WHOLE = AudioSpan()
_EMBED_BYTES = 300_000  # a larger file is decoded, to the span that the page plays
_EMBED_SECONDS = 60  # of decoded audio: an hour of WAV would make a page of 150 MB
_OGG, _WAV = "audio/ogg", "audio/wav"
_MIME = {".opus": _OGG, ".ogg": _OGG, ".mp3": "audio/mpeg", ".flac": "audio/flac", ".wav": _WAV}
_PICTURE_SECONDS = 30  # what a picture shows at most
_N_MELS = 80
_COLUMNS = 600  # of a waveform
# Dark to bright, each step as much lighter as the one before: red, green, blue of five stops.
_STOPS = [(8, 8, 30), (78, 18, 108), (178, 48, 88), (245, 130, 40), (252, 246, 180)]


@dataclass(frozen=True)
class Audio:
    """Audio as a data URI, or why there is none."""

    src: str = ""
    error: str = ""


def embed(path: str, span: AudioSpan = _WHOLE, samples: np.ndarray | None = None) -> Audio:
    """Embed a recording: the bytes of a small file, else its span as WAV.

    samples: the decoded span, if it is known.
    """
    file = literal_path(path)
    mime = _MIME.get(file.suffix.lower(), "")
    try:
        if not file.is_file():
            raise AudioError("missing", f"no such file: {path}")
        if mime and span == _WHOLE and file.stat().st_size < _EMBED_BYTES:
            data = file.read_bytes()
        else:
            mime, wav = _WAV, io.BytesIO()
            audio = decode(file, span) if samples is None else samples
            audio = audio[: _EMBED_SECONDS * SAMPLING_RATE]
            soundfile.write(wav, audio, SAMPLING_RATE, subtype="PCM_16", format="WAV")
            data = wav.getvalue()
    except (OSError, TypeError, ValueError) as error:  # of which AudioError is one
        return Audio(error=str(error))
    return Audio(_data(mime, data))


def embed_row(row: Mapping[str, Any]) -> Audio:
    """Embed the recording of a row of transcripts.

    audio: the file. start, duration: seconds in it. bytes: offset and length in an archive.
    """
    try:
        extent = row.get("bytes")
        inside = None if extent is None else (int(extent[0]), int(extent[1]))
        span = AudioSpan(float(row.get("start") or 0), row.get("duration"), inside)
    except (TypeError, ValueError, LookupError) as error:
        return Audio(error=f"no span of a recording: {error}")
    return embed(str(row.get("audio") or ""), span)


def waveform(samples: np.ndarray) -> tuple[str, int]:
    """Return SVG path data of (S,) fp32 at 16 kHz, the range of each column, and its columns.

    The path is 100 high, which is full scale.
    """
    shown = samples[: _PICTURE_SECONDS * SAMPLING_RATE]
    parts = [p for p in np.array_split(shown, min(_COLUMNS, len(shown) or 1)) if len(p)]
    ranges = [(float(np.clip(p.min(), -1, 1)), float(np.clip(p.max(), -1, 1))) for p in parts]
    path = "".join(
        f"M{x} {50 - 50 * high:.1f}V{50 - 50 * low + 0.5:.1f}"
        for x, (low, high) in enumerate(ranges)
    )
    return path, len(ranges)


def mel_picture(samples: np.ndarray) -> str:
    """Return the log-mel of (S,) fp32 at 16 kHz as PNG, low frequencies at the bottom."""
    shown = samples[: _PICTURE_SECONDS * SAMPLING_RATE]
    padded = max(-(-len(shown) // HOP), 3) * HOP  # the transform reflects edges of 200 samples
    mel = log_mel(shown, _N_MELS, padded).numpy()[::-1]
    low, high = float(mel.min()), float(mel.max())
    levels = np.round(255 * (mel - low) / max(high - low, 1e-6)).astype(np.uint8)
    stops = np.linspace(0, 255, len(_STOPS))
    colours = [np.interp(np.arange(256), stops, [c[i] for c in _STOPS]) for i in range(3)]
    picture = Image.fromarray(np.ascontiguousarray(levels))  # grey: putpalette makes it indexed
    picture.putpalette(np.stack(colours, axis=1).round().astype(np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return _data("image/png", file.getvalue())


def _data(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
