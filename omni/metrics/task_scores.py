"""Figures of tasks: error rates of what is said, scores of classes, of tags and of free answers.

A closed task is scored by likelihood: its choices' log-probabilities decide, and say how sure the
model is. Beside each accuracy stand the share of the most frequent class and, where it was
measured, the accuracy with another utterance's audio, which is what the text alone explains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

import numpy as np
import regex

from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.languages import UNSPACED, language_code
from omni.corpus.tasks import TaskRule
from omni.metrics.right_answers import have_scores, likeliest, same, share_interval
from omni.metrics.score import Errors, count_errors, total

Row = dict[str, Any]
OTHER = "(other)"
"""Column of a confusion matrix for answers that are none of the classes."""
MOST_CLASSES = 20
"""Classes of a confusion matrix; of more, the most frequent ones and the others together."""
SPOKEN = ("wer", "cer")
"""Metrics of tasks whose answer is what is said."""
_BINS = 10
"""Bins of the expected calibration error."""
_TAGS = regex.compile(r"<\s*([^\s<>:][^<>:]*?)\s*:\s*([^<>]*?)\s*>")


@dataclass(frozen=True)
class Scoring:
    """Name the metric of each task of a run, or of a corpus.

    names: of all tasks that have rows. Rows have the fields `task` and `metric` if `named`.
    """

    rules: Mapping[str, TaskRule]
    names: Sequence[str]

    @property
    def named(self) -> bool:
        """True where there is more to say than the WER of transcripts."""
        own = (rule.metric or rule.choices or rule.answer for rule in self.rules.values())
        return len(self.names) > 1 or any(own)

    @property
    def closed(self) -> dict[str, tuple[str, ...]]:
        """Return the choices of each closed task."""
        return {name: rule.choices for name, rule in self.rules.items() if rule.choices}

    @property
    def scores_choices(self) -> bool:
        """True where choices of a task with rows are scored by likelihood."""
        return self.named and any(name in self.closed for name in self.names)

    def rule(self, name: str) -> TaskRule:
        return self.rules.get(name) or TaskRule(name)

    def metric(self, name: str) -> str:
        """Return the metric that sums up a task."""
        rule = self.rule(name)
        if rule.metric is not None:
            return rule.metric
        if rule.choices:
            return "accuracy"
        if name == DEFAULT_TASK or rule.tags or (len(self.names) < 2 and rule.answer is None):
            return "wer"
        return "exact_match"

    def label(self, row: Row, name: str) -> Row:
        """Add the fields that say what a transcript row is scored by, to a row of a named task."""
        if not self.named:
            return row
        row |= {"task": name, "metric": self.metric(name)}
        if tags := self.rule(name).tags:
            row["tags"] = compare_tags(row["reference"], row["hypothesis"], tags)
            said, written = (without_tags(row[side], tags) for side in ("reference", "hypothesis"))
            row["errors"] = count_errors(said, written, row["language"])
            row["wer"] = row["errors"].wer
        elif row["metric"] not in SPOKEN:
            row["right"] = same(row["reference"], row["hypothesis"])
            row.pop("wer", None)
        return row

    def score(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Score labelled transcript rows by task; empty unless `named`."""
        if not self.named:
            return {}
        of_task: dict[str, list[Row]] = {name: [] for name in self.names}
        for row in rows:
            of_task.setdefault(row["task"], []).append(row)
        return {
            name: {"metric": self.metric(name), **figures}
            for name, members in of_task.items()
            if members and (figures := _figures(self.rule(name), self.metric(name), members))
        }


def spoken(rows: Sequence[Row]) -> list[Row]:
    """Return the transcript rows that error rates are about."""
    return [row for row in rows if row.get("metric", "wer") in SPOKEN]


def _figures(rule: TaskRule, metric: str, rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"utterances": len(rows)}
    if rule.tags or metric in SPOKEN:
        errors: Errors = total([row["errors"] for row in rows])
        found |= {"wer": errors.wer, "cer": errors.cer}
    if rule.tags:
        found["tags"] = {name: _tag_figures(name, rows) for name in rule.tags}
    elif metric not in SPOKEN:
        right = sum(bool(row["right"]) for row in rows)
        found |= _share("exact_match", right, len(rows))
    if rule.choices or metric in ("accuracy", "macro_f1"):
        found |= _class_figures(rule, rows)
    if metric in ("bleu", "chrf"):
        found[metric] = _corpus_score(metric, rows)
    return {"value": found.get(metric), **found}


# -- classes ---------------------------------------------------------------------------------------


def _class_figures(rule: TaskRule, rows: Sequence[Row]) -> dict[str, Any]:
    known = rule.choices or tuple(sorted({row["reference"] for row in rows}))
    truth = [_class_of(row["reference"], known) for row in rows]
    by_likelihood = have_scores(rows)
    written = [_class_of(row["hypothesis"], known) for row in rows]
    guessed = [likeliest(row["choices"]) for row in rows] if by_likelihood else written
    found: dict[str, Any] = {"decided_by": "likelihood" if by_likelihood else "answer"}
    if outside := truth.count(OTHER):  # Rows of a corpus that name the task themselves.
        found["labels_outside_choices"] = outside
    found |= class_scores(truth, guessed, known)
    if by_likelihood:
        found["ece"] = calibration_error([row["choices"] for row in rows], truth)
    shuffled = [
        likeliest(row["shuffled_choices"]) == label
        for row, label in zip(rows, truth, strict=True)
        if "shuffled_choices" in row
    ]
    if shuffled:
        found |= _share("shuffled_accuracy", sum(shuffled), len(shuffled))
    return found


def class_scores(
    truth: Sequence[str], guessed: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    """Compute accuracy, macro F1 (over the classes that occur), majority share and confusion."""
    from sklearn.metrics import confusion_matrix, f1_score

    counts = Counter(truth)
    present = [name for name in classes if counts[name]]
    most, top = counts.most_common(1)[0]
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    names = [*classes, OTHER]
    if len(classes) > MOST_CLASSES:
        names = [*(name for name, _ in counts.most_common(MOST_CLASSES)), OTHER]
    pooled = [[name if name in names else OTHER for name in side] for side in (truth, guessed)]
    matrix = confusion_matrix(*pooled, labels=names).tolist()
    if not any(matrix[-1]) and not any(row[-1] for row in matrix):
        names, matrix = names[:-1], [row[:-1] for row in matrix[:-1]]
    return {
        **_share("accuracy", sum(map(eq, truth, guessed)), len(truth)),
        "macro_f1": float(f1_score(truth, guessed, **macro)),
        "majority": top / len(truth),
        "majority_class": most,
        "majority_macro_f1": float(f1_score(truth, [most] * len(truth), **macro)),
        "chance": 1 / len(classes),
        "classes": names,
        "confusion": matrix,
    }


def _share(name: str, right: int, asked: int) -> dict[str, Any]:
    """Return a share of right answers under its name, and its 95 % interval."""
    return {name: right / asked, f"{name}_interval": share_interval(right, asked)}


def probabilities(log_probs: Mapping[str, float]) -> dict[str, float]:
    """Normalise the log-probabilities of the choices to a sum of 1."""
    top = max(log_probs.values())
    weights = {name: math.exp(value - top) for name, value in log_probs.items()}
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items()}


def calibration_error(scores: Sequence[Mapping[str, float]], truth: Sequence[str]) -> float:
    """Compute the expected calibration error (Guo et al. 2017, equation 3) over 10 equal bins.

    scores: log-probabilities of the choices of each utterance.
    """
    sure, right = [], []
    for of_row, answer in zip(scores, truth, strict=True):
        shares = probabilities(of_row)
        best = likeliest(of_row)
        sure.append(shares[best])
        right.append(best == answer)
    confidence, correct = np.asarray(sure), np.asarray(right, dtype=float)
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(correct[bins == n].mean() - confidence[bins == n].mean()) * (bins == n).mean()
        for n in np.unique(bins)
    ]
    return float(sum(gaps))


def _class_of(answer: str, classes: Sequence[str]) -> str:
    """Return the class that a written answer names, or OTHER."""
    return next((name for name in classes if same(name, answer)), OTHER)


# -- tags ------------------------------------------------------------------------------------------


def tags_of(text: str) -> dict[str, str]:
    """Read the tags of a rich transcript, such as <pace: fast>; of a repeated one, the first."""
    found: dict[str, str] = {}
    for name, value in _TAGS.findall(text):
        found.setdefault(name, value)
    return found


def without_tags(text: str, names: Sequence[str]) -> str:
    """Remove the tags of these names: what is left are the words."""

    def kept(match: regex.Match[str]) -> str:
        return " " if match[1] in names else str(match[0])

    return " ".join(_TAGS.sub(kept, text).split())


def compare_tags(
    reference: str, hypothesis: str, names: Sequence[str]
) -> dict[str, dict[str, str | None]]:
    """Return what the label says and what the answer claims, by tag; None where it has no tag."""
    label, claim = tags_of(reference), tags_of(hypothesis)
    return {name: {"label": label.get(name), "claimed": claim.get(name)} for name in names}


def _tag_figures(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Score one tag; a template may leave it out of some answers."""
    labelled = [row["tags"][name] for row in rows if row["tags"][name]["label"] is not None]
    extra = sum(
        row["tags"][name]["label"] is None and row["tags"][name]["claimed"] is not None
        for row in rows
    )
    found: dict[str, Any] = {"utterances": len(labelled), "claimed_without_label": extra}
    if not labelled:
        return found
    truth = [tag["label"] for tag in labelled]
    classes = sorted(set(truth))
    guessed = [_class_of(tag["claimed"] or "", classes) for tag in labelled]
    return {**found, **class_scores(truth, guessed, classes)}


# -- free answers ----------------------------------------------------------------------------------


def _corpus_score(metric: str, rows: Sequence[Row]) -> float:
    """Compute BLEU or chrF of the corpus with sacrebleu, from 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    references = [[row["reference"] for row in rows]]
    hypotheses = [row["hypothesis"] for row in rows]
    if metric == "chrf":
        return float(CHRF().corpus_score(hypotheses, references).score)
    languages = {language_code(row["language"]) for row in rows}
    tokens = "zh" if languages == {"zh"} else "char" if languages <= set(UNSPACED) else "13a"
    return float(BLEU(tokenize=tokens).corpus_score(hypotheses, references).score)
