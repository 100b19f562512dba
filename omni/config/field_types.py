"""Types of settings that need more than a Python type: ranges, spellings, absolute paths."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from omni.config.plug_in import check_plug_in, is_plug_in


def absolute(path: str) -> str:
    """Make a local path absolute: workers have another working directory than the driver."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _workers(value: Any) -> Any:
    given = [value] if isinstance(value, int) else value
    whole = isinstance(given, (list, tuple)) and all(type(n) is int and n > 0 for n in given)
    if not whole or not 1 <= len(given) <= 2 or list(given) != sorted(given):
        raise ValueError("expected a number over 0, or [min, max] with min <= max")
    return given[0] if len(given) == 1 else tuple(given)


def _distinct(value: Any) -> Any:
    if isinstance(value, list) and (not value or len(set(map(str, value))) < len(value)):
        raise ValueError("expected last, all, or different numbers of layers")
    return value


def kept_columns(names: Iterable[str]) -> list[str]:
    """Return the names of columns to keep as labels, without those that every index has.

    Raises ValueError for a name that cannot be kept.
    """
    kept: list[str] = []
    for name in names:
        if not name.strip() or name in _RESERVED_LABELS:
            raise ValueError(
                f"expected the name of a column, got {name!r} "
                f"({', '.join(_RESERVED_LABELS)} have a meaning of their own)"
            )
        if name not in (*_INDEX_COLUMNS, *kept):
            kept.append(name)
    return kept


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] <= value[1]:
        raise ValueError("expected [least, most] with least <= most")
    return value


def _language_model(value: str) -> str:
    kind, _, name = value.partition(":")
    if value != "scratch" and (kind not in ("nanochat", "hf", "ms") or not name):
        raise ValueError("expected scratch, nanochat:DIR, hf:ID_OR_DIR or ms:ID")
    if kind == "nanochat" or (kind == "hf" and Path(name).expanduser().is_dir()):
        return f"{kind}:{absolute(name)}"
    return value


def _projector(value: Any) -> Any:
    named = isinstance(value, str) and is_plug_in(value)
    if value not in get_args(_ProjectorKind) and not named:
        kinds = ", ".join(get_args(_ProjectorKind))
        raise ValueError(f"expected {kinds} or package.module:Class")
    return value


def _best(value: Any) -> Any:
    task = value.removeprefix(BEST_OF_TASK) if isinstance(value, str) else ""
    if value not in get_args(_BestKind) and (not task or task == value):
        kinds = ", ".join(get_args(_BestKind))
        raise ValueError(f"expected {kinds} or {BEST_OF_TASK}TASK")
    return value


_INDEX_COLUMNS = ("id", "text", "language", "speaker", "task", "prompt")
_RESERVED_LABELS = ("labels", "seconds")
_ProjectorKind = Literal["mlp", "swiglu", "conv"]
_BestKind = Literal["dev_loss", "dev_wer", "dev_cer"]
BEST_OF_TASK = "dev_task_metrics."
"""Beginning of an `eval.best` that names a task."""
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
MemoryShare = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
_Decibel = Annotated[float, Field(ge=-60, le=60)]
DecibelRange = Annotated[tuple[_Decibel, _Decibel], AfterValidator(_ascending)]
_Seconds = Annotated[float, Field(gt=0, le=5)]
SecondsRange = Annotated[tuple[_Seconds, _Seconds], AfterValidator(_ascending)]
SpeedFactor = Annotated[float, Field(ge=0.5, le=2)]

OMNI_TINY = "omni-tiny"
"""Name of the checkpoint that comes with omni, where a checkpoint or base is asked for."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Language = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+([-_][A-Za-z0-9]+)*$")]
AbsolutePath = Annotated[str, AfterValidator(absolute)]
Base = Annotated[str, AfterValidator(lambda name: name if name == OMNI_TINY else absolute(name))]
Columns = Annotated[
    list[str],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    AfterValidator(kept_columns),
]
Paths = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
PlugIns = Annotated[
    list[Annotated[str, AfterValidator(check_plug_in)]],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
Projector = Annotated[str, BeforeValidator(_projector, json_schema_input_type=_ProjectorKind | str)]
_OfTask = Annotated[str, Field(pattern=r"^dev_task_metrics\..+")]
Best = Annotated[str, BeforeValidator(_best, json_schema_input_type=_BestKind | _OfTask)]
LanguageModel = Annotated[str, AfterValidator(_language_model)]
Layers = Annotated[Literal["last", "all"] | list[NotNegative], BeforeValidator(_distinct)]
Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]
_Fingerprint = Literal["data.train", "tokenizer", "plan", "model", "encoder", "augment", "tokens"]
Fingerprints = Annotated[
    list[_Fingerprint],
    BeforeValidator(_as_list, json_schema_input_type=_Fingerprint | list[_Fingerprint]),
]
_NodeId = Annotated[str, Field(pattern="^[0-9a-f]{56}$")]
NodeIds = Annotated[
    list[_NodeId], BeforeValidator(_as_list, json_schema_input_type=_NodeId | list[_NodeId])
]
_Tracker = Literal["wandb", "mlflow", "swanlab"]
Trackers = Annotated[
    list[_Tracker], BeforeValidator(_as_list, json_schema_input_type=_Tracker | list[_Tracker])
]
