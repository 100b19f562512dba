"""Long recordings of which it is known who speaks when: embedded prompts with pauses between."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import soundfile
import soxr

import omni
from omni.audio.decode import decode

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
RATE = 16_000
SLACK = 0.35  # seconds: a prompt's own silence at its ends, and what a soft consonant hides
Times = list[tuple[float, float]]


def write_long(
    path: Path, minutes: float, rate: int = RATE, channels: int = 1, pauses: tuple[float, ...] = ()
) -> Times:
    """Write a recording of about `minutes`; returns start and end of each prompt in seconds.

    pauses: between prompts, in seconds, over and over; 1 to 2.5 s where none are given.
    """
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    clips = (decode(ASSETS / rows[n % len(rows)]["audio"]) for n in itertools.count())
    spoken: Times = []
    start = 0.0
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for clip, pause in zip(clips, itertools.cycle(pauses or (1.0, 1.7, 2.5)), strict=False):
            if start > minutes * 60:
                return spoken
            if rate != RATE:
                clip = soxr.resample(clip, RATE, rate)
            spoken.append((start, start + len(clip) / rate))
            sound = np.concatenate((clip, np.zeros(round(pause * rate), np.float32)))
            file.write(np.repeat(sound[:, None], channels, axis=1))
            start += len(sound) / rate
    raise AssertionError("the clips do not end")


def uncovered(said: Times, spans: Times) -> list[tuple[float, float]]:
    """Prompts whose beginning or end no span reaches."""
    return [
        (start, end)
        for start, end in said
        if not any(a <= start + SLACK and a + d > start for a, d in spans)
        or not any(a + d >= end - SLACK and a < end for a, d in spans)
    ]


def bridges(said: Times, spans: Times) -> list[tuple[float, float]]:
    """Spans that hold sound of two prompts."""
    return [(a, d) for a, d in spans if sum(a < end and a + d > start for start, end in said) != 1]
