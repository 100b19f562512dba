"""The embedded Whisper encoder and recordings of the embedded corpus, shared by the model tests."""

from __future__ import annotations

import json

import numpy as np
import pytest

from omni.audio.decode import decode
from omni.model.download import ASSETS
from omni.model.encoder.whisper import WhisperEncoder

CORPUS = ASSETS / "prompts-en"


@pytest.fixture(scope="session")
def clips() -> list[np.ndarray]:
    """The 55 recordings of the dev split, 0.6 to 6 s, 95 s in all: (S,) fp32 at 16 kHz."""
    rows = [json.loads(line) for line in (CORPUS / "dev.jsonl").read_text().splitlines()]
    return [decode(CORPUS / row["audio"]) for row in rows]


@pytest.fixture(scope="session")
def trim() -> WhisperEncoder:
    return WhisperEncoder("embedded", mode="trim")


@pytest.fixture(scope="session")
def full() -> WhisperEncoder:
    return WhisperEncoder("embedded", mode="full")
