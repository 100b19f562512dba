"""What a run's plan does with its corpus: how bins are filled, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pyarrow as pa

from omni.audio.logmel import SAMPLING_RATE, encoder_frames
from omni.config import Config, load_config
from omni.corpus.index import Index
from omni.corpus.index_row import recordings
from omni.corpus.splits import build_indexes
from omni.errors import ConfigError
from omni.metrics.run_files import read_events
from omni.model.download import SourceError
from omni.model.projector import soft_tokens
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.plan import Plan
from omni.plan.plan_file import PlanFile, plan_path, read_plan_file
from omni.report.charts import count, histogram, percent, short
from omni.report.run_page import table
from omni.storage.path import StoragePath

_BINS = 14  # that are drawn
_COLOURS = 8


@dataclass(frozen=True)
class RunPlan:
    """A run's plan, and its corpus where that is still what it was. note: what is missing."""

    config: Config
    file: PlanFile
    plan: Plan
    index: Index | None
    tokenizer: SpeechTokenizer | None
    note: str

    @property
    def positions(self) -> int:
        return self.file.bin_positions


def read_run(run: StoragePath) -> RunPlan:
    """Raises ConfigError where a directory holds no run, or none that has a plan."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: neither a manifest nor a run: it has no config.yaml")
    config = load_config(run / "config.yaml")
    plans = [
        str(e["plan"]) for e in read_events(run) if e.get("event") == "attempt" and "plan" in e
    ]
    path = plan_path(run, plans[-1] if plans else "none")
    try:
        file = read_plan_file(path)
        plan = file.plan(config.optim.steps)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ConfigError(f"{run}: its plan, {path}, is missing or damaged: {error}") from None
    index, tokenizer, note = None, None, ""
    try:
        index = build_indexes(config)["train"]
        if index.fingerprint != file.index_fingerprint:
            index, note = None, "The corpus is another one now: only the plan is shown."
        elif (run / "tokenizer.json").is_file():
            tokenizer, note = _tokenizer(run / "tokenizer.json")
    except (ConfigError, SourceError) as error:
        note = f"The corpus cannot be read here, only the plan is shown. {error}"
    return RunPlan(config, file, plan, index, tokenizer, note)


def _tokenizer(path: StoragePath) -> tuple[SpeechTokenizer | None, str]:
    """A run's, or none and what to say of that."""
    try:
        return SpeechTokenizer.from_json(path.read_text(encoding="utf-8")), ""
    except Exception as error:  # the tokenizers library raises plain Exception
        return None, f"The run's tokens are not known: {path} is damaged ({error})."


def plan_sections(made: RunPlan, seed: int) -> str:
    """How bins are filled, a picture of some, and what utterances are made of."""
    plan, lengths = made.plan, made.file.lengths
    sums = np.add.reduceat(lengths[plan.members], plan.starts[:-1])
    fill = 100 * sums / made.positions
    sizes = np.diff(plan.starts)
    figures = [
        histogram("Fill", "percent of a bin", fill.tolist()),
        histogram("Utterances", "in a bin", sizes.tolist(), whole=True),
        histogram("Positions", "per utterance", lengths[lengths > 0].tolist(), whole=True),
    ]
    soft = None
    if made.index is not None:
        soft = soft_of(made.index, made.config)
        usable = np.flatnonzero(lengths > 0)
        seconds = made.index.table["samples"].to_numpy()[usable] / SAMPLING_RATE
        words = lengths[usable] - soft[usable]
        figures += [
            histogram("Soft tokens", "per utterance", soft[usable].tolist(), whole=True),
            histogram("Text positions", "per utterance", words.tolist(), whole=True),
            histogram("Positions a second", "of audio", (lengths[usable] / seconds).tolist()),
        ]
    absent = int((lengths == 0).sum())
    said = (
        f"Steps: {count(plan.steps)}, of {count(plan.bins_per_step)} x {count(made.positions)} "
        f"positions; {short(plan.epoch(plan.bins))} epochs. "
        f"{percent(float(fill.mean()) / 100)} of all positions hold an utterance. "
    )
    said += f"Longer than a bin and left out: {count(absent)}." if absent else ""
    return f"""<h2>Bins</h2><p>{said}</p><div class="small">{"".join(figures)}</div>
{_mixture(made)}{_pictures(made, soft, seed)}"""


def soft_of(index: Index, config: Config) -> np.ndarray:
    """(n,) soft tokens of each utterance."""
    mode, stack = config.encoder.mode, config.model.stack
    return np.array(
        [
            sum(soft_tokens(encoder_frames(r["samples"], mode), stack) for r in recordings(row))
            for row in index.table.select(["samples", "audios"]).to_pylist()
        ]
    )


def _mixture(made: RunPlan) -> str:
    """How often the utterances of each weight occur."""
    weights = made.file.weights
    if weights is None:
        return ""
    times = np.bincount(made.plan.members, minlength=len(weights))
    rows = []
    for weight in np.unique(weights):
        group = (weights == weight) & (made.file.lengths > 0)
        share = times[group].sum() / max(1, times.sum())
        mean = short(float(times[group].mean())) if group.any() else "–"
        rows.append((short(float(weight)), count(int(group.sum())), mean, percent(float(share))))
    head = ("Weight", "Utterances", "Times in this plan, mean", "Share of all")
    return f"<h2>Mixture</h2>{table(head, rows)}"


def _pictures(made: RunPlan, soft: np.ndarray | None, seed: int) -> str:
    plan = made.plan
    number = min(_BINS, plan.bins)
    chosen = np.sort(np.random.default_rng(seed).choice(plan.bins, number, replace=False))
    languages = None if made.index is None else made.index.table["language"].to_pylist()
    colours = _colours([languages[n] or "none" for n in plan.members] if languages else [])
    rows = ""
    for b in chosen.tolist():
        members, at, svg = plan.bin(b).tolist(), 0, ""
        for place, n in enumerate(members):
            colour = colours.get(languages[n] or "none", 0) if languages else place
            svg += _segment(made, n, at, 0 if soft is None else int(soft[n]), colour % _COLOURS)
            at += int(made.file.lengths[n])
        rows += (
            f"<span>bin {count(b)}</span>"
            f'<svg viewBox="0 0 {made.positions} 22" preserveAspectRatio="none" role="img" '
            f'aria-label="bin {b}"><rect class="empty" width="{made.positions}" height="22"/>{svg}'
            f"</svg><span>{percent(at / made.positions)}</span>"
        )
    key = "".join(
        f'<span><svg viewBox="0 0 12 12"><rect class="c{n % _COLOURS}" width="12" height="12"/>'
        f"</svg>{escape(name)}</span>"
        for name, n in colours.items()
        if len(colours) > 1
    )
    what = "Colours are utterances" if len(colours) < 2 else "Colours are languages"
    return f"""<h2>Some bins</h2><p class="quiet">{what}; full colour is soft tokens, pale is text.
Point at one to see which it is.</p><p class="legend quiet">{key}</p>
<div class="bins">{rows}</div>"""


def _colours(languages: Sequence[str]) -> dict[str, int]:
    return {name: n for n, name in enumerate(sorted(set(languages)))}


def _segment(made: RunPlan, number: int, at: int, soft: int, colour: int) -> str:
    """One utterance of a bin: its soft tokens, then its text."""
    length = int(made.file.lengths[number])
    told = made.file.ids[number]
    if made.index is not None:
        told += f": {made.index.table['text'][number].as_py()}"
    parts = [(at, soft, ""), (at + soft, length - soft, " words")] if soft else [(at, length, "")]
    drawn = "".join(
        f'<rect class="c{colour}{kind}" x="{x}" width="{width}" height="22"/>'
        for x, width, kind in parts
        if width > 0
    )
    return f"<g><title>{escape(told[:200])} ({length} positions)</title>{drawn}</g>"
