"""Train and score linear probes: logistic regression on standardised features.

Every utterance is predicted once, by a probe that saw none of its group (sentence or speaker) in
training. The strength of regularisation is chosen on a fifth of the training groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from omni.errors import ConfigError
from omni.metrics.bootstrap import PairedTest, paired_test, rate_interval
from omni.texture.examples import Examples

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

_STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Values of C to choose from, the inverse of the penalty."""
_ITERATIONS = 500
_DRAWS = 4_000
_INNER_FOLDS = 5


@dataclass(frozen=True)
class Score:
    """Score of the probes of one kind of features over all folds.

    low, high: 95 % interval of the accuracy, by drawing groups. strengths: C of each fold.
    unconverged: folds in which training stopped before its end.
    """

    features: str
    accuracy: float
    low: float
    high: float
    macro_f1: float
    strengths: list[float]
    unconverged: int


def predict(
    features: np.ndarray, examples: Examples, folds: int, seed: int, shuffled: bool = False
) -> tuple[np.ndarray, list[float], int]:
    """Predict each example by a probe that was trained without its group.

    features: (n, width) of the examples. shuffled: train on labels in random order.
    Returns classes (n,), the strength of each fold, and the number of folds without convergence.
    """
    targets, groups = examples.targets, examples.groups
    trained = targets
    if shuffled:
        trained = np.random.default_rng(seed).permutation(targets)
    predicted = np.zeros_like(targets)
    strengths: list[float] = []
    unconverged = 0
    for train, test in _splits(targets, groups, folds, seed):
        if len(np.unique(trained[train])) < 2:
            raise ConfigError(
                f"--label {examples.label}: a fold has one class alone to train on: "
                "expected more groups in each class (--least), or more --folds"
            )
        strength = _strength(features[train], trained[train], groups[train], seed)
        probe = _fit(features[train], trained[train], strength)
        predicted[test] = probe.predict(features[test])
        strengths.append(strength)
        unconverged += int(probe[-1].n_iter_.max() >= _ITERATIONS)
    return predicted, strengths, unconverged


def score(
    name: str, predicted: np.ndarray, examples: Examples, strengths: list[float], unconverged: int
) -> Score:
    """Score predictions of the examples."""
    from sklearn.metrics import f1_score

    wrong, counts = errors_by_group(predicted, examples)
    interval = rate_interval(wrong, counts, samples=_DRAWS)
    low, high = interval or (float("nan"), float("nan"))
    return Score(
        name,
        float((predicted == examples.targets).mean()),
        1 - high,
        1 - low,
        float(f1_score(examples.targets, predicted, average="macro", zero_division=0)),
        strengths,
        unconverged,
    )


def difference(first: np.ndarray, second: np.ndarray, examples: Examples) -> PairedTest | None:
    """Test whether two predictions of the examples differ, by drawing groups."""
    wrong, counts = errors_by_group(first, examples)
    others, _ = errors_by_group(second, examples)
    return paired_test(wrong, others, counts, samples=_DRAWS)


def errors_by_group(predicted: np.ndarray, examples: Examples) -> tuple[list[float], list[float]]:
    """Return wrong predictions and examples of each group."""
    wrong = (predicted != examples.targets).astype(float)
    return (
        np.bincount(examples.groups, wrong).tolist(),
        np.bincount(examples.groups).astype(float).tolist(),
    )


def _splits(
    targets: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer examples than folds is absent in some; that costs it accuracy.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        yield from splitter.split(np.zeros(len(targets)), targets, groups)


def _strength(features: np.ndarray, targets: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """Choose C by the accuracy on one fold of the training part; the smallest of equals."""
    folds = min(_INNER_FOLDS, len(np.unique(groups)))
    if folds < 2:
        return _STRENGTHS[0]
    train, test = next(_splits(targets, groups, folds, seed))
    if len(np.unique(targets[train])) < 2:
        return _STRENGTHS[0]
    right = [
        (_fit(features[train], targets[train], strength).predict(features[test]) == targets[test])
        for strength in _STRENGTHS
    ]
    return _STRENGTHS[int(np.argmax([hits.sum() for hits in right]))]


def _fit(features: np.ndarray, targets: np.ndarray, strength: float) -> Pipeline:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # It is counted.
        fitted: Any = probe.fit(features, targets)
    return fitted
