"""Damaged and foreign input in small; `python -m tests.fuzz` does a thousand, with recordings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni.config import Config, load_config, parse_config
from omni.corpus.index import build_index
from omni.corpus.manifest import ManifestError
from omni.corpus.tar import TarError, read_tar
from omni.errors import ConfigError
from tests.fuzz.targets import TARGETS

FIELDS = [
    f"{section}.{name}"
    for section, field in Config.model_fields.items()
    for name in field.annotation.model_fields  # type: ignore[union-attr]
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
ROW_FIELDS = ["audio", "text", "id", "offset", "duration", "messages", "task"]
QUIET = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kind", TARGETS)
def test_damage_is_answered(kind: str, tmp_path: Path) -> None:
    count = {"bombs": 15, "terminal": 10}.get(kind, 25)
    answers = [TARGETS[kind](tmp_path, random.Random(seed)) for seed in range(count)]
    left_out = ("cache shard", "checkpoint", "recording", "addresses", "bombs")
    noticed = "rejected" if kind in left_out else "refused"
    noticed = "accepted" if kind == "terminal" else noticed  # Texts of any characters are texts.
    # Most faults are of a row, or of no matter.
    least = {"corpus": 8, "recording": 5, "bombs": 8, "terminal": 8}.get(kind, 20)
    assert answers.count(noticed) >= least, "damage went unnoticed"


@QUIET
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_of_a_setting_is_taken_or_refused_by_name(field: str, value: object) -> None:
    section, _, name = field.partition(".")
    try:
        parse_config({section: {name: value}}).to_yaml()
    except ConfigError as error:
        assert str(error).startswith(section)


@QUIET
@given(arguments=st.lists(st.text(max_size=12) | st.sampled_from([f"--{f}" for f in FIELDS])))
def test_any_command_line_is_taken_or_refused(arguments: list[str]) -> None:
    try:
        load_config(None, arguments)
    except ConfigError as error:
        assert any(argument.removeprefix("--") in str(error) for argument in arguments)


@QUIET
@given(row=st.dictionaries(st.sampled_from(ROW_FIELDS), VALUES))
def test_any_manifest_row_is_a_reject_or_a_named_error(tmp_path: Path, row: object) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ManifestError, match="manifest.jsonl"):
        build_index([str(path)])  # no such recording exists: nothing can be accepted


@QUIET
@given(data=st.binary(max_size=2_000))
def test_any_bytes_are_no_shard(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    try:
        assert list(read_tar(path)) == []
    except TarError as error:
        assert str(path) in str(error)
