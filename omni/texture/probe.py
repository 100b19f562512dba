"""Probe the layers of the frozen encoder: which of them tells the classes of a label apart.

Beside each layer: the log-mel that the encoder reads, the same layer with random weights, labels
in random order, the largest class, and chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omni.audio.windows import SAMPLES_PER_HOUR, WINDOW_SAMPLES
from omni.corpus.index import Index
from omni.corpus.index_row import IndexRow
from omni.errors import ConfigError, counted
from omni.texture.examples import Disjoint, Examples, examples_of
from omni.texture.linear_probe import Score, difference, predict, score
from omni.texture.pooled import MEL, PooledFeatures, Pooling, pool_features

_WORTH_PROCESSES = 500
"""Fewer utterances are probed sooner than processes start."""


@dataclass(frozen=True)
class Probing:
    """Settings of a probe.

    disjoint: see `omni.texture.examples.examples_of`. least: utterances of a class. limit: of all
    classes together, drawn by `seed`.
    """

    labels: Sequence[str]
    disjoint: Disjoint | None = None
    folds: int = 5
    least: int = 30
    limit: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class LabelProbe:
    """Scores of the probes of one label.

    chance: accuracy of guesses that are as frequent as the classes. as_good: layers whose
    difference from the best one has an interval that holds 0.
    """

    label: str
    disjoint: Disjoint
    utterances: int
    groups: int
    classes: dict[str, int]
    left_out: dict[str, int]
    majority: float
    chance: float
    mel: Score
    layers: list[Score]
    random: list[Score]
    shuffled: Score
    """Of the best layer, with labels in random order."""
    best: int
    as_good: list[int]

    @property
    def shown(self) -> bool:
        """Tell whether the best layer's interval lies above the largest class."""
        return self.layers[self.best].low > self.majority


@dataclass(frozen=True)
class ProbeResult:
    """Results, as probe.json holds them."""

    corpora: list[str]
    encoder: str
    fingerprint: str
    utterances: int
    hours: float
    seed: int
    labels: list[LabelProbe]
    recommended: list[int]
    """Fewest layers of which one is as good as the best for each label that is above its largest
    class; the last one is among them, since it is what the encoder was trained to give."""
    notes: list[str] = field(default_factory=list)

    @property
    def setting(self) -> str:
        """Return the recommendation as a value of `encoder.layers`."""
        last = len(self.labels[0].layers) - 1
        return "last" if self.recommended == [last] else str(self.recommended).replace(" ", "")


def probe(
    corpora: Sequence[str],
    index: Index,
    how: Probing,
    pooling: Pooling,
    folder: Path,
    say: Callable[[str], None] = print,
) -> ProbeResult:
    """Probe the labels of an index; features are kept in `folder`.

    Raises ConfigError for a label that cannot be probed, RuntimeError for what may pass.
    """
    rows, notes = _choose(index.table, how)
    for label in how.labels:  # Before minutes are spent on the encoder.
        examples_of(rows, {}, label, how.disjoint, how.least, how.folds)
    features = pool_features(rows, pooling, folder, say)
    found = [
        examples_of(rows, features.faults, label, how.disjoint, how.least, how.folds)
        for label in how.labels
    ]
    labels = []
    for examples in found:
        labels.append(_probe_label(examples, features, pooling, how))
        best = labels[-1].layers[labels[-1].best]
        say(
            f"{examples.label}: {counted(len(examples.rows), 'utterance')}, best layer "
            f"{labels[-1].best} with {100 * best.accuracy:.1f} % "
            f"({100 * best.low:.1f} to {100 * best.high:.1f})"
        )
    return ProbeResult(
        corpora=list(corpora),
        encoder=pooling.weights,
        fingerprint=pooling.fingerprint,
        utterances=len(rows),
        hours=sum(row["samples"] for row in rows) / SAMPLES_PER_HOUR,
        seed=how.seed,
        labels=labels,
        recommended=recommend([label for label in labels if label.shown], pooling.layers),
        notes=[*index.notes, *notes, *_not_shown(labels)],
    )


def _choose(table: pa.Table, how: Probing) -> tuple[list[IndexRow], list[str]]:
    """Draw the utterances to encode; return them and what is left out of them."""
    notes = []
    single = table.filter(pc.is_null(table["audios"]))
    if len(single) < len(table):
        notes.append(f"{counted(len(table) - len(single), 'conversation')} left out")
    if len(single) > how.limit:
        notes.append(f"{how.limit:,} of {len(single):,} utterances, drawn by seed {how.seed}")
        drawn = np.random.default_rng(how.seed).permutation(len(single))[: how.limit]
        single = single.take(pa.array(np.sort(drawn)))
    long = int((single["samples"].to_numpy() > WINDOW_SAMPLES).sum())
    if long:
        notes.append(f"the first 30 s of {counted(long, 'longer utterance')}")
    if not len(single):
        raise ConfigError("expected utterances of one recording each, got conversations alone")
    rows: list[IndexRow] = single.to_pylist()
    return rows, notes


def _probe_label(
    examples: Examples, features: PooledFeatures, pooling: Pooling, how: Probing
) -> LabelProbe:
    from joblib import Parallel, cpu_count, delayed

    names = [MEL, *pooling.trained, *pooling.random]
    few = len(examples.rows) < _WORTH_PROCESSES
    work = Parallel(n_jobs=1 if few else cpu_count(), inner_max_num_threads=1)
    made: list[tuple[np.ndarray, Score]] = work(
        delayed(_probe_features)(name, examples, features, how) for name in names
    )
    predictions = {name: predicted for name, (predicted, _) in zip(names, made, strict=True)}
    scores = {name: scored for name, (_, scored) in zip(names, made, strict=True)}
    layers = [scores[name] for name in pooling.trained]
    best = int(np.argmax([layer.accuracy for layer in layers]))
    chosen = predictions[pooling.trained[best]]
    as_good = []
    for number, name in enumerate(pooling.trained):
        test = difference(chosen, predictions[name], examples)
        if number == best or test is None or test.low <= 0:
            as_good.append(number)
    _, shuffled = _probe_features(pooling.trained[best], examples, features, how, shuffled=True)
    counts = Counter(examples.targets.tolist())
    shares = np.asarray([counts[n] for n in range(len(examples.classes))]) / len(examples.rows)
    return LabelProbe(
        label=examples.label,
        disjoint=examples.disjoint,
        utterances=len(examples.rows),
        groups=len(np.unique(examples.groups)),
        classes={name: counts[n] for n, name in enumerate(examples.classes)},
        left_out=examples.left_out,
        majority=float(shares.max()),
        chance=float(np.square(shares).sum()),
        mel=scores[MEL],
        layers=layers,
        random=[scores[name] for name in pooling.random],
        shuffled=shuffled,
        best=best,
        as_good=as_good,
    )


def _probe_features(
    name: str, examples: Examples, features: PooledFeatures, how: Probing, shuffled: bool = False
) -> tuple[np.ndarray, Score]:
    x = features.load(name)[examples.rows]
    predicted, strengths, unconverged = predict(x, examples, how.folds, how.seed, shuffled)
    title = f"{name}, shuffled labels" if shuffled else name
    return predicted, score(title, predicted, examples, strengths, unconverged)


def _not_shown(labels: Sequence[LabelProbe]) -> list[str]:
    return [
        f"{label.label}: no layer is shown to be better than the largest class, so that no layer "
        "is recommended for it"
        for label in labels
        if not label.shown
    ]


def recommend(labels: Sequence[LabelProbe], last: int) -> list[int]:
    """Choose the fewest layers, the last among them, of which one is as good for each label.

    Of equally many, those with the highest sum of each label's best accuracy.
    """
    wanted = [label for label in labels if last not in label.as_good]
    others = range(last)
    for count in range(len(wanted) + 1):
        fitting = [
            chosen
            for chosen in combinations(others, count)
            if all(set(chosen) & set(label.as_good) for label in wanted)
        ]
        if fitting:
            best = max(
                fitting,
                key=lambda chosen: sum(
                    max(label.layers[n].accuracy for n in (*chosen, last)) for label in labels
                ),
            )
            return sorted([*best, last])
    raise AssertionError("each label's best layer is as good as itself")


def as_json(result: ProbeResult) -> dict[str, Any]:
    """Return what probe.json holds."""
    return {"version": 1, **asdict(result), "encoder_layers": result.setting}
