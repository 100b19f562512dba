"""Labels of utterances: values of a corpus's own columns, which tasks ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from omni.errors import ManifestError

Label: TypeAlias = "str | float"
Kept: TypeAlias = "tuple[tuple[str, Any], ...]"
"""Names and values of kept fields. A tuple, so that no field of a manifest can pass for it."""


def kept_fields(fields: Mapping[str, Any], keep: Sequence[str]) -> Kept:
    """Return the kept fields of a row of a corpus, without those that it lacks."""
    return tuple((name, fields[name]) for name in keep if fields.get(name) is not None)


def labels_json(position: str, kept: Any) -> str | None:
    """Serialise kept fields for the `labels` column of the index; None without any.

    Booleans become the texts true and false. kept: None, or a field of a manifest that happens to
    be called labels, gives no labels. Raises ManifestError, naming position and field, for a value
    that is neither text nor a finite number.
    """
    if not isinstance(kept, tuple) or not kept:
        return None
    labels: dict[str, Label] = {}
    for name, value in kept:
        if isinstance(value, bool):
            labels[name] = str(value).lower()
        elif _is_label(value):
            labels[name] = value
        else:
            raise ManifestError(
                f"{position}: field {name!r}: expected a text or a finite number to keep as a "
                f"label, got {str(value)[:60]!r}"
            )
    return json.dumps(labels, ensure_ascii=False)


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    return isinstance(value, (int, float)) and math.isfinite(value)


def labels_of(row: Mapping[str, Any]) -> dict[str, Label]:
    """Return the labels of an index row by name: its kept columns, its speaker and language."""
    labels: dict[str, Label] = json.loads(row["labels"]) if row.get("labels") else {}
    own = {name: row[name] for name in ("language", "speaker") if row.get(name) is not None}
    return labels | own


def label_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the rows that have each label. column: `labels` of an index."""
    counts: dict[str, int] = {}
    for chunk in column.chunks:
        for text in chunk.drop_null().to_pylist():
            for name in json.loads(text):
                counts[name] = counts.get(name, 0) + 1
    return counts
