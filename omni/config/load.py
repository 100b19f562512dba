"""Read settings from YAML files and dotted overrides, and name the fields that are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from omni.config.settings import Config, SourceConfig
from omni.errors import ConfigError
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import CREDENTIALS, has_credentials, reason_of, redact, redacted

RENAMED = {"optim.listen_steps": "optim.ctc_only_steps"}
"""Settings of earlier versions, by their names today."""
_ROOT = Path(__file__).parents[2]


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with omni, by name: of the source tree, or of the package."""
    for folder in (_ROOT / "configs", _ROOT / "omni" / "assets" / "configs"):
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    return {}


def load_config(
    path: str | StoragePath | None, overrides: Sequence[str] = (), *, of_run: bool = False
) -> Config:
    """Read a YAML file and apply overrides such as ["--optim.lr", "3e-4"].

    path: also the name of a config that comes with omni. A repeated override of a list collects its
    values. of_run: the file was written by a run, perhaps of an earlier version, whose names of
    settings are accepted. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    if isinstance(path, str) and path in shipped_configs() and not Path(path).is_file():
        path = shipped_configs()[path]
    if path is not None:
        try:
            loaded = yaml.safe_load(as_path(path).read_text())
        except OSError as error:
            close = difflib.get_close_matches(str(path), shipped_configs(), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"--config {as_path(path)}: {reason_of(error)}{hint}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path}: not YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {path}: expected sections, found {type(loaded).__name__}")
        values = loaded or {}
    if of_run:
        values = redacted(values)
        _rename(values)
    for key, value in _parse_overrides(overrides).items():
        _set(values, key, value)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain values. Raises ConfigError with one line per wrong field."""
    if found := [line for name, text in _texts("", values) if (line := _refused(name, text))]:
        raise ConfigError("\n".join(found))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = (_error_text(item) for item in error.errors())
        raise ConfigError(redact("\n".join(lines))) from None


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts within a value, with their dotted names."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _texts(f"{name}.{key}" if name else str(key), inner)


def _refused(name: str, text: str) -> str | None:
    if not has_credentials(text):
        return None
    scheme = text.partition("://")[0].rpartition(":")[2]
    return f"{name}: {CREDENTIALS.format(scheme=scheme)}"


def _rename(values: dict[str, Any]) -> None:
    """Give settings of earlier versions their names of today, in place."""
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            _set(values, new, values[section].pop(name))


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--") or "." not in flag.partition("=")[0]:
            raise ConfigError(f"{flag}: unknown argument; settings are --section.field VALUE")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ConfigError(f"--{key}: expected a value")
            value = pending.pop(0)
        found.setdefault(key, []).append(_parse_value(key, value))
    return {
        key: values
        if len(values) > 1 or _is_list(key) and not isinstance(values[0], list)
        else values[0]
        for key, values in found.items()
    }


def _parse_value(key: str, text: str) -> Any:
    """Keep text for a field that takes text; parse any other value as YAML."""
    annotation = _annotation(key)
    listed = annotation == list[str] and not text.startswith("[")
    if annotation is str or listed or (annotation == str | None and text != "null"):
        return text
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"--{key}: not YAML: {text!r}") from None


def _is_list(key: str) -> bool:
    return get_origin(_annotation(key)) is list


def _annotation(key: str) -> Any:
    """Return the declared type of a dotted field; None for a field that does not exist."""
    if key == "data.train":
        return list[str]  # paths; a mixture on the command line is YAML: [{source: ...}]
    annotation: Any = Config
    for part in key.split("."):
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return None
        annotation = fields[part].annotation
    return annotation


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if values.get(section) is None:  # The file may have an empty section.
            values[section] = {}
        nested = values[section]
        if not isinstance(nested, dict):
            raise ConfigError(f"{key}: {section} is not a section")
        values = nested
    values[name] = value


def _error_text(error: ErrorDetails) -> str:
    parts = list(error["loc"])
    # After the number of an entry of data.train, pydantic adds the tag of its kind: not a field.
    names = [
        str(p) for before, p in zip([None, *parts], parts, strict=False) if type(before) is not int
    ]
    location = ".".join(names)
    if error["type"] != "extra_forbidden":
        given = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
        text = f"{error['msg'].removeprefix('Value error, ')}{given}"
        return f"{location}: {text}" if location else text  # one of the whole config names fields
    if location in RENAMED:
        return f"{location}: renamed; expected {RENAMED[location]}"
    known = _fields(error["loc"][:-1])
    close = difflib.get_close_matches(names[-1], known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{location}: unknown field{hint}; expected one of: {', '.join(known)}"


def _fields(location: Sequence[int | str]) -> list[str]:
    """Return the names of the fields of the section at a location."""
    section: type[BaseModel] = Config
    for part in location:
        if part == "mixture":
            section = SourceConfig
        annotation = getattr(section.model_fields.get(str(part)), "annotation", None)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
        elif get_origin(annotation) is dict:
            section = get_args(annotation)[1]
    return list(section.model_fields)
