"""A finished index: what all its parts come to, and the file that says so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from omni.audio.windows import SAMPLING_RATE
from omni.corpus.build_part import about_part, part_name
from omni.corpus.index import INDEX_VERSION, repeated_id
from omni.corpus.labels import label_counts
from omni.corpus.languages import unknown_languages
from omni.corpus.manifest import INDEX_FILE
from omni.corpus.rejects import count_reasons
from omni.corpus.sources import Part, Source
from omni.errors import ManifestError
from omni.storage.atomic import open_atomic
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, open_ranges
from omni.storage.uri import redact

SECONDS = [0, 1, 2, 4, 8, 16, 30, 60, 600]  # lower edges of the histogram of lengths
CHARACTERS = [0, 10, 20, 40, 80, 160, 320, 640]  # and of the texts'

Task = tuple[Source, Part]


def finish(tasks: list[Task], out: StoragePath, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Look over all parts, few in memory at a time but for the ids, and write what belongs to all.

    Returns utterances, seconds, rejects by reason, languages, speakers, without_text (utterances
    that nobody has written down), lengths and texts (utterances from each edge of SECONDS and
    CHARACTERS), notes, and labels (utterances that have each column of `keep`).

    Raises ManifestError for an id that occurs twice, and for a label that no utterance has.
    """
    ids: list[pa.ChunkedArray] = []
    languages: Counter[str | None] = Counter()
    speakers: set[str] = set()
    reasons: list[str] = []
    lengths, texts = np.zeros(len(SECONDS), np.int64), np.zeros(len(CHARACTERS), np.int64)
    samples = 0
    rejects: list[str] = []
    names = [part_name(*task) for task in tasks]
    columns = ["id", "samples", "text", "language", "speaker", *(["labels"] if keep else [])]
    labels: Counter[str] = Counter(dict.fromkeys(keep, 0))

    def read(name: str) -> tuple[pa.Table, dict[str, Any] | None]:
        with open_ranges(out / "parts" / f"{name}.parquet") as file:
            return pq.read_table(file, columns=columns), about_part(out, name)

    for table, about in parallel_map(read, names):
        ids.append(table["id"])
        for entry in pc.value_counts(table["language"]).to_pylist():
            languages[entry["values"]] += entry["counts"]
        speakers.update(pc.unique(table["speaker"].drop_null()).to_pylist())
        if keep:
            labels.update(label_counts(table["labels"]))
        samples += int(pc.sum(table["samples"]).as_py() or 0)
        lengths += _histogram(pc.divide(table["samples"], SAMPLING_RATE), SECONDS)
        said = table["text"].filter(pc.not_equal(table["text"], ""))
        texts += _histogram(pc.utf8_length(said), CHARACTERS)
        for reject in about["rejects"] if about else []:
            reasons.append(reject["reason"])
            rejects.append(json.dumps(reject, ensure_ascii=False) + "\n")
    # Parts of older versions have offsets of 32 bits.
    every = pa.chunked_array(
        [chunk for column in ids for chunk in column.cast(pa.large_string()).chunks],
        pa.large_string(),
    )
    if (repeated := repeated_id(every)) is not None:
        raise ManifestError(_twice(repeated, ids, tasks))
    if not len(every):
        first = f"; the first: {rejects[0].strip()}" if rejects else ""
        raise ManifestError(f"all {len(rejects)} rows were rejected{first}")
    if without := [name for name in keep if not labels[name]]:
        raise ManifestError(f"no utterance has the column {without[0]!r} (--keep)")
    result = {
        "utterances": len(every),
        "seconds": samples / SAMPLING_RATE,
        "rejects": count_reasons(reasons),
        "languages": {name or "unknown": n for name, n in languages.most_common()},
        "speakers": len(speakers),
        "without_text": len(every) - int(texts.sum()),
        "lengths": lengths.tolist(),
        "texts": texts.tolist(),
        "notes": unknown_languages(languages),
        **({"labels": dict(labels)} if keep else {}),
    }
    with open_atomic(out / "rejects.jsonl") as file:
        file.write("".join(rejects).encode(errors="replace"))
    sources = list(dict.fromkeys(redact(source.spec) for source, _ in tasks))
    about = {"version": INDEX_VERSION, "sources": sources, **result, "parts": names}
    with open_atomic(out / INDEX_FILE) as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())
    return result


def _histogram(values: pa.ChunkedArray, edges: list[int]) -> np.ndarray:
    """Count the values from each edge up to the next."""
    counts, _ = np.histogram(values.to_numpy(), [*edges, np.inf])
    return counts


def _twice(repeated: str, ids: list[pa.ChunkedArray], tasks: list[Task]) -> str:
    places = []
    for column, (source, part) in zip(ids, tasks, strict=True):
        found = pc.sum(pc.equal(column, repeated)).as_py() or 0
        places += [f"{source.spec} (part {part.name})"] * found
    return (
        f"the id {repeated!r} occurs twice: in {places[0]} and in {places[1]}; "
        "ids must differ (--id_column names another column, --number_ids makes ids of places)"
    )


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The closing table of a finished index."""
    lines = [
        f"utterances  {result['utterances']:,}",
        f"hours       {result['seconds'] / 3600:,.2f}",
        f"languages   {_listed(result['languages'])}",
        f"speakers    {result['speakers'] or 'unknown'}",
        f"left out    {_listed(result['rejects']) if result['rejects'] else 'none'}",
    ]
    if "labels" in result:
        lines.append(f"labels      {_listed(result['labels'])}")
    lines += [f"note        {note}" for note in result["notes"]]
    if result["without_text"]:
        lines.insert(
            1, f"no text     {result['without_text']:,}: only `omni transcribe` reads them"
        )
    for title, edges, counts in (
        ("seconds", SECONDS, result["lengths"]),
        ("characters", CHARACTERS, result["texts"]),
    ):
        top = max(counts)
        if not top:
            continue
        lines.append(f"{title}:")
        for number, count in enumerate(counts):
            upto = f"to {edges[number + 1]}" if number + 1 < len(edges) else "and more"
            bar = "#" * -(-40 * count // top)
            lines.append(f"  {f'{edges[number]} {upto}':>14} {count:>12,} {bar}".rstrip())
    return lines


def _listed(counts: dict[str, int], most: int = 12) -> str:
    named = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    rest = [f"{len(counts) - most} more"] if len(counts) > most else []
    return ", ".join(named + rest)
