"""Page that compares runs: one file without outside references."""

from __future__ import annotations

from omni.metrics.run_files import write_text
from omni.report.audio_embed import embed_row
from omni.report.charts import Chart, Row
from omni.report.charts import Figure as Drawing
from omni.report.comparison import Comparison, Utterance, not_compared
from omni.report.render import render
from omni.report.run_record import RunRecord
from omni.report.word_marks import compare_words
from omni.storage.path import StoragePath

UTTERANCES = 20  # that differ, shown by default

_NATS = "nats per token"
_WIDE = [
    ("Train loss", _NATS, "loss", 1.0, False),
    ("Dev loss", _NATS, "dev_loss", 1.0, False),
    ("Dev word error rate", "percent", "dev_wer", 100.0, True),
    ("Shuffled-audio gap", _NATS, "shuffled_audio_gap", 1.0, True),
]
_SMALL = [
    ("Dev character error rate", "percent", "dev_cer", 100.0, True),
    ("Learning rate", "", "lr", 1.0, True),
    ("Gradient norm", "", "grad_norm", 1.0, True),
]


def write_comparison(found: Comparison, out: StoragePath, utterances: int = UTTERANCES) -> None:
    """Write the page of a comparison. utterances: the most that are shown, with audio."""
    page = render(
        "compare.html",
        name=" · ".join(found.names),
        c=found,
        not_compared=not_compared,
        runs=list(zip(found.runs, found.names, found.states, strict=True)),
        wide=[_overlay(found, *chart) for chart in _WIDE],
        small=[_overlay(found, *chart) for chart in _SMALL],
        shown=[_shown(utterance) for utterance in found.utterances[:utterances]],
    )
    write_text(out, page)


def _overlay(
    found: Comparison, title: str, unit: str, key: str, scale: float, zero: bool
) -> Drawing:
    """Draw the curve of a key of metrics.jsonl of all runs over their steps."""
    curves = [(name, f"{n}:{key}") for n, name in enumerate(found.names)]
    rows: list[Row] = []
    for n, run in enumerate(found.runs):
        rows += [{"step": row["step"], str(n): row} for row in _logged(run)]
    return Chart(title, unit, curves, scale, zero).draw(rows, None)


def _logged(run: RunRecord) -> list[Row]:
    return run.train + run.evals


def _shown(utterance: Utterance) -> dict[str, object]:
    return {
        "split": utterance.split,
        "id": utterance.id,
        "reference": utterance.reference,
        "audio": embed_row(utterance.row),
        "transcripts": [
            None if t is None else (compare_words(utterance.reference, t.hypothesis), t)
            for t in utterance.transcripts
        ],
    }
