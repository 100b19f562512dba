"""Section about a run's plan: how its bins are filled, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from omni.audio.windows import SAMPLING_RATE, encoder_frames
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
from omni.plan.window_reader import WindowReader, epoch_ends
from omni.plan.windows_file import WindowsFile, read_windows_file, windows_path
from omni.report.charts import histogram
from omni.report.number_text import count, percent, short
from omni.storage.path import StoragePath

_BINS = 14  # in the picture
_COLOURS = 8


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run, and its corpus if that has not changed. note: what is missing."""

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
    """Read the plan and the corpus of a run. Raises ConfigError if there is no run or no plan."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: neither a manifest nor a run: it has no config.yaml")
    config = load_config(run / "config.yaml", of_run=True)
    plans = [
        str(e["plan"]) for e in read_events(run) if e.get("event") == "attempt" and "plan" in e
    ]
    fingerprint = plans[-1] if plans else "none"
    path, windows = plan_path(run, fingerprint), windows_path(run, fingerprint)
    try:
        if windows.is_file():
            path = windows
            return _first_window(config, read_windows_file(path))
        file = read_plan_file(path)
        plan = file.plan(config.optim.steps)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ConfigError(f"{run}: its plan, {path}, is missing or damaged: {error}") from None
    index, tokenizer, note = None, None, ""
    try:
        index = build_indexes(config)["train"]
        if index.fingerprint != file.index_fingerprint:
            index, note = None, "The corpus has changed since: only the plan is shown."
        elif (run / "tokenizer.json").is_file():
            tokenizer, note = _tokenizer(run / "tokenizer.json")
    except (ConfigError, SourceError) as error:
        note = f"The corpus cannot be read here, only the plan is shown. {error}"
    return RunPlan(config, file, plan, index, tokenizer, note)


def _first_window(config: Config, saved: WindowsFile) -> RunPlan:
    """Return the plan of the first window, whose utterances stand for those of all.

    Raises OSError, ValueError or an error of Arrow where the prepared corpus cannot be read.
    """
    windows = saved.windows()
    first = WindowReader("train", windows, saved.files, None).load(0)
    plan = Plan(
        members=np.arange(len(first.window.members), dtype=np.int32),
        starts=first.window.starts,
        epoch_ends=epoch_ends(windows, first.window, config.optim.steps * saved.bins_per_step),
        bins_per_step=saved.bins_per_step,
        fingerprint="",
    )
    file = PlanFile(
        ids=first.table["id"].to_pylist(),
        lengths=first.lengths,
        index_fingerprint=saved.index_fingerprint,
        seed=saved.seed,
        bin_positions=saved.bin_positions,
        bins_per_step=saved.bins_per_step,
    )
    note = (
        f"The corpus is planned in {windows.per_epoch} windows per epoch: the first of them is "
        "shown, and not the corpus."
    )
    return RunPlan(config, file, plan, None, None, note)


def _tokenizer(path: StoragePath) -> tuple[SpeechTokenizer | None, str]:
    """Read a run's tokenizer; if it is damaged, return None and a note."""
    try:
        return SpeechTokenizer.from_json(path.read_text(encoding="utf-8")), ""
    except Exception as error:  # the tokenizers library raises plain Exception
        return None, f"The tokenizer cannot be read: {path} is damaged ({error})."


@dataclass(frozen=True)
class Segment:
    """An utterance in the picture of a bin. parts: style, position and length of its rectangles."""

    title: str
    parts: list[tuple[str, int, int]]


@dataclass(frozen=True)
class Bin:
    number: int
    segments: list[Segment]
    filled: float  # of 1


def plan_section(made: RunPlan, seed: int) -> dict[str, Any]:
    """Return the values of plan.html: how bins are filled, and pictures of some drawn by `seed`."""
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
        text = lengths[usable] - soft[usable]
        figures += [
            histogram("Soft tokens", "per utterance", soft[usable].tolist(), whole=True),
            histogram("Text positions", "per utterance", text.tolist(), whole=True),
            histogram("Positions a second", "of audio", (lengths[usable] / seconds).tolist()),
        ]
    languages = None if made.index is None else made.index.table["language"].to_pylist()
    names = sorted({languages[n] or "none" for n in plan.members}) if languages else []
    colours = {name: n % _COLOURS for n, name in enumerate(names)}
    return {
        "steps": plan.steps,
        "bins_per_step": plan.bins_per_step,
        "positions": made.positions,
        "epochs": plan.epoch(plan.bins),
        "filled": float(fill.mean()) / 100,
        "absent": int((lengths == 0).sum()),
        "figures": figures,
        "mixture": _mixture(made),
        "key": list(colours.items()) if len(colours) > 1 else [],
        "bins": _bins(made, soft, languages, colours, seed),
    }


def soft_of(index: Index, config: Config) -> np.ndarray:
    """Return (n,) soft tokens of each utterance."""
    mode, stack, summary = config.encoder.mode, config.model.stack, config.model.summary_tokens
    return np.array(
        [
            sum(
                summary + soft_tokens(encoder_frames(r["samples"], mode), stack)
                for r in recordings(row)
            )
            for row in index.table.select(["samples", "audios"]).to_pylist()
        ]
    )


def _mixture(made: RunPlan) -> list[tuple[str, ...]]:
    """Count how often the utterances of each weight occur."""
    weights = made.file.weights
    if weights is None:
        return []
    times = np.bincount(made.plan.members, minlength=len(weights))
    rows: list[tuple[str, ...]] = []
    for weight in np.unique(weights):
        group = (weights == weight) & (made.file.lengths > 0)
        share = times[group].sum() / max(1, times.sum())
        mean = short(float(times[group].mean())) if group.any() else "–"
        rows.append((short(float(weight)), count(int(group.sum())), mean, percent(float(share))))
    return rows


def _bins(
    made: RunPlan,
    soft: np.ndarray | None,
    languages: list[str | None] | None,
    colours: dict[str, int],
    seed: int,
) -> list[Bin]:
    plan, lengths = made.plan, made.file.lengths
    number = min(_BINS, plan.bins)
    chosen = np.sort(np.random.default_rng(seed).choice(plan.bins, number, replace=False))
    drawn = []
    for b in chosen.tolist():
        segments, start = [], 0
        for position, n in enumerate(plan.bin(b).tolist()):
            colour = colours[languages[n] or "none"] if languages else position % _COLOURS
            segments.append(_segment(made, n, start, 0 if soft is None else int(soft[n]), colour))
            start += int(lengths[n])
        drawn.append(Bin(b, segments, start / made.positions))
    return drawn


def _segment(made: RunPlan, number: int, start: int, soft: int, colour: int) -> Segment:
    """Return an utterance of a bin: its soft tokens, then its text."""
    length = int(made.file.lengths[number])
    title = made.file.ids[number]
    if made.index is not None:
        title += f": {made.index.table['text'][number].as_py()}"
    parts = [(f"c{colour}", start, soft), (f"c{colour} words", start + soft, length - soft)]
    if not soft:
        parts = [(f"c{colour}", start, length)]
    return Segment(f"{title[:200]} ({length} positions)", [part for part in parts if part[2] > 0])
