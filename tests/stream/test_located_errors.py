"""An unexpected error in a stage of the stream names bin, utterance and recording in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from omni.corpus.index import build_index
from omni.errors import LocatedError
from omni.plan.plan import Members
from omni.stream import stages
from omni.stream.schema import LOADED_SCHEMA
from omni.stream.stages import EncodeStage, load_bin


def _fails(*_: object, **__: object) -> Any:
    raise KeyError("of the test")


class _Split:
    """A split of one bin with one utterance."""

    name, augmentation = "train", None

    def __init__(self, table: pa.Table) -> None:
        nothing = pa.nulls(len(table))
        for name in ("tokens", "supervised", "transcript_tokens", "task_number"):
            table = table.append_column(name, nothing)
        self.table = table

    def members(self, number: int) -> Members:
        return Members(np.array([0]), np.array([0]), np.array([0]))


@pytest.fixture
def split(tmp_path: Path) -> _Split:
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(tmp_path / "a.wav", np.stack((noise, -noise), axis=1), 16_000)
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "x", "id": "one"}\n')
    return _Split(build_index([str(tmp_path / "m.jsonl")]).table)


class _Settings:
    class config:  # noqa: N801
        class locations:  # noqa: N801
            pass

        class data:  # noqa: N801
            loader_rate = None

        encoder = None

    encoder = {"dtype": None}


def test_loading_names_the_recording_and_notes_its_channel(
    split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "register_credentials", lambda locations: None)
    monkeypatch.setattr(stages, "fit", _fails)
    with pytest.raises(
        LocatedError, match=r"^bin 7, utterance one \(.*a\.wav\): KeyError: "
    ) as got:
        load_bin(split, 7, _Settings(), None)  # type: ignore[arg-type]
    assert "\n" not in str(got.value)
    seen: list[np.ndarray] = []

    def log_mel(recording: Any, fetched: Any, settings: Any, notes: list[str]) -> bytes:
        row = recording.row
        seen.append(stages.decode_with_retry(row["uri"], samples=row["samples"], notes=notes))
        return b"mel"

    monkeypatch.setattr(stages, "_log_mel", log_mel)
    row = load_bin(split, 7, _Settings(), None)  # type: ignore[arg-type]
    [note] = row["notes"]
    assert note is not None and note.startswith("one channel instead of the mean\nchannel 1 of 2")
    assert row["errors"] == [None] and np.abs(seen[0]).max() > 0.1


def test_encoding_names_the_bins_and_utterances(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = EncodeStage.__new__(EncodeStage)
    monkeypatch.setattr(stage, "_encode", _fails)
    rows = [
        {"bin": number, "ids": ["kept", f"new-{number}"], "mels": [[None], [b"mel"]]}
        for number in (4, 5)
    ]
    table = pa.Table.from_pylist(rows, LOADED_SCHEMA)
    with pytest.raises(LocatedError, match=r"^bins 4, 5, utterances new-4, new-5: KeyError: "):
        stage(table)
