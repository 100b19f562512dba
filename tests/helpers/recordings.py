"""Small real recordings and manifests for tests of the data path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omni.audio.windows import encoder_frames
from omni.corpus.index import build_index
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.sequences import sequence_positions


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Write a tone to a file; the name's ending and soundfile's arguments choose the format."""

    def write(
        name: str, seconds: float = 1.0, rate: int = 16_000, hertz: float = 440.0, **how: Any
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        times = np.arange(round(seconds * rate)) / rate
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * times), rate, **how)
        return path

    return write


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or raw lines) as a manifest; returns its path as a config would name it."""

    def write(*rows: dict[str, Any] | str, name: str = "corpus.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return write


@pytest.fixture(scope="session")
def embedded_lengths() -> np.ndarray:
    """Positions of each embedded training utterance, as the smoke configuration lays them out."""
    table = build_index(["embedded:train"]).table
    texts = table["text"].to_pylist()
    ids = SpeechTokenizer.train(texts, 512).encode_batch(texts)
    return np.array(
        [
            sequence_positions([encoder_frames(samples, "trim")], len(text) + 3, 4)
            for samples, text in zip(table["samples"].to_pylist(), ids, strict=True)
        ]
    )
