"""Prepare a training split that is planned in windows: its parts, its plan, its first window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.parts import PartedCorpus
from omni.corpus.rejects import Reject
from omni.errors import ConfigError
from omni.model.chat_template import Kind
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.part_files import parts_of
from omni.plan.plan import Split, Totals
from omni.plan.sequences import LONGER_THAN_A_BIN, check_tasks, tasks_by_split
from omni.plan.window_reader import WindowedPlan, WindowReader, epoch_ends
from omni.plan.windows import Windows
from omni.run.augmentation import augmentation_of
from omni.run.corpus_checks import check_rejects, ctc_notes, overlap_notes
from omni.run.prepare_parts import PreparedCorpus, known_sentences, prepare_corpus
from omni.run.prepared_part import Recipe, sentence_hashes


@dataclass(frozen=True)
class WindowedTrain:
    """A training split of several windows, with all that its run needs to know of the corpus."""

    split: Split
    tasks: list[str]
    """Names of the tasks of all splits."""
    rejects: list[Reject]
    notes: list[str]
    fingerprint: str
    tokens: str
    """Fingerprint of the token ids."""
    longest_answer: int
    filled: float
    """Share of the positions of the first window that hold an utterance."""


def prepare_windows(
    config: Config,
    corpus: PartedCorpus,
    tokenizer: SpeechTokenizer,
    template: Kind,
    held: dict[str, Index],
    say: Callable[[str], None] | None = None,
) -> WindowedTrain:
    """Prepare the parts of a corpus, and plan and read its first window.

    held: indexes of the held-out splits. Raises ConfigError.
    """
    prepared = prepare_corpus(corpus, Recipe(config, tokenizer.to_json(), template), say)
    # The tables of the parts hold rows that are longer than a bin, but no other rejects.
    left_out = [reject for reject in prepared.rejects if reject.reason != LONGER_THAN_A_BIN]
    check_rejects(config, prepared.rejects, prepared.rows + len(left_out))
    tasks = check_tasks(config, {"train": prepared.tasks, **tasks_by_split(held)})
    speeds = config.augment.speed != [1.0]
    notes = list(prepared.notes)
    if config.optim.ctc_weight:
        silent, beyond = (sum(getattr(p, n) for p in prepared.facts) for n in ("silent", "beyond"))
        usable = sum(part.usable for part in prepared.facts)
        notes += ctc_notes(silent, beyond, usable, prepared.rows, speeds)
    for name, index in held.items():
        known = known_sentences(prepared, sentence_hashes(index.table["text"]), config)
        notes += overlap_notes(name, int(known.sum()), len(index))
    split, filled = _split(config, prepared, tasks)
    return WindowedTrain(
        split=split,
        tasks=tasks,
        rejects=prepared.rejects,
        notes=notes,
        fingerprint=prepared.fingerprint,
        tokens=prepared.tokens,
        longest_answer=max(part.longest_answer for part in prepared.facts),
        filled=filled,
    )


def _split(config: Config, prepared: PreparedCorpus, tasks: list[str]) -> tuple[Split, float]:
    """Plan the first window; return the split and the share of its positions that is filled."""
    optim = config.optim
    files = prepared.files(config, tasks)
    try:
        windows = Windows(
            parts_of(prepared.facts, prepared.weights),
            files.lengths,
            seed=config.run.seed,
            bin_positions=optim.bin_positions,
            window_utterances=config.data.window_utterances,
        )
    except ValueError as error:
        raise ConfigError(f"data.train: {error} (optim.bin_positions)") from None
    augmentation = augmentation_of(config, lambda: None)
    reader = WindowReader("train", windows, files, augmentation)
    first = reader.load(0)
    bins = optim.steps * optim.bins_per_step
    plan = WindowedPlan(
        bins_per_step=optim.bins_per_step,
        epoch_ends=epoch_ends(windows, first.window, bins),
        fingerprint=windows.fingerprint(prepared.fingerprint, optim.bins_per_step),
        last_step=optim.steps,
    )
    totals = Totals(prepared.rows, prepared.samples)
    filled = first.window.positions / (first.window.bins * optim.bin_positions)
    split = Split("train", first.table, plan, augmentation, reader, first, totals)
    return split, filled
