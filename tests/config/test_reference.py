"""Every setting has a sentence, and the generated reference is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from omni.config.reference import PAGE, SCHEMA, page, schema, sections, settings_of
from omni.config.settings import SourceConfig, TaskConfig

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, type[BaseModel]] = {
    **sections(),
    "source": SourceConfig,
    "task": TaskConfig,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_one_sentence(section: str) -> None:
    assert SECTIONS[section].__doc__
    for setting in settings_of(SECTIONS[section]):
        name = f"{section}.{setting.name}"
        assert setting.sentence.endswith("."), f"{name}: write a sentence below the field"
        assert "\n" not in setting.sentence, f"{name}: one line"


@pytest.mark.parametrize(("path", "made"), [(PAGE, page), (SCHEMA, schema)])
def test_generated_files_are_up_to_date(path: Path, made: Any) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == made(), "run `make settings`"


def test_the_schema_accepts_the_configs_and_names_what_is_wrong() -> None:
    validator = jsonschema.Draft202012Validator(yaml.safe_load(schema()))
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        validator.validate(yaml.safe_load(path.read_text()))
    for wrong in (
        {"optim": {"warmup": 3}},
        {"optim": {"steps": 0}},
        {"encoder": {"mode": "trimmed"}},
        {"data": {"train": [{"source": "a", "wieght": 1}]}},
    ):
        assert list(validator.iter_errors(wrong)), wrong
    validator.validate({"data": {"train": "a.jsonl", "dev": ["b.jsonl"]}, "train": {"workers": 2}})
    validator.validate({"train": {"workers": [1, 4]}, "encoder": {"actors": "auto"}})


def test_types_are_written_as_ranges() -> None:
    types = {s.name: s.type for s in settings_of(SECTIONS["augment"])}
    assert types["reverb_seconds"] == "pair of number in (0, 5]"
    assert types["time_masks"] == "integer ≥ 0"
    defaults = {s.name: s.default for s in settings_of(SECTIONS["data"])}
    assert (defaults["train"], defaults["cache_gb"]) == ("['embedded:train']", "null")
