"""Endings of file names whose recordings can be decoded, and the library that decodes them."""

from __future__ import annotations

import functools
import importlib.util

LIBSNDFILE_ENDINGS = (
    "wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "snd", "caf", "w64",
    "rf64", "sph", "voc",
)  # fmt: skip
"""Read by libsndfile, in every installation."""

AV_ENDINGS = (
    "m4a", "m4b", "mp4", "mov", "3gp", "aac", "webm", "mka", "mkv", "weba", "wma", "amr", "ac3",
    "eac3", "mp2", "ape", "wv", "tta", "spx", "dsf", "ts", "flv", "avi", "mpga",
)  # fmt: skip
"""Read by PyAV (FFmpeg), where it is installed: pip install 'nanochat-omni[av]'."""

AUDIO_ENDINGS = (*LIBSNDFILE_ENDINGS, *AV_ENDINGS)
"""Endings of recordings; without PyAV those of `AV_ENDINGS` are rejected by name."""

INSTALL_AV = "pip install 'nanochat-omni[av]'"


@functools.cache
def has_av() -> bool:
    """Check whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def readable_endings() -> tuple[str, ...]:
    """Return the endings that this installation decodes, in lower case and without a dot."""
    return AUDIO_ENDINGS if has_av() else LIBSNDFILE_ENDINGS


def is_audio(name: str) -> bool:
    """Check whether a file name has the ending of a recording, decodable here or not."""
    return name.rpartition(".")[2].lower() in AUDIO_ENDINGS
