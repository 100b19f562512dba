"""omni probe: scores of features whose content is known, recommendations, and the job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from jobs import probe as job
from omni.corpus.index import build_index
from omni.texture.examples import Examples
from omni.texture.linear_probe import Score, difference, predict, score
from omni.texture.pooled import MEL, PooledFeatures, pooling_of
from omni.texture.probe import LabelProbe, recommend

GROUPS, PER_GROUP, WIDTH = 60, 5, 8


def _examples() -> Examples:
    """Three classes of twenty groups each."""
    groups = np.repeat(np.arange(GROUPS), PER_GROUP)
    targets = groups % 3
    return Examples("kind", "speaker", np.arange(len(groups)), [*"abc"], targets, groups, {})


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_probes_find_a_class_and_not_the_group_that_has_it() -> None:
    examples = _examples()
    n = len(examples.rows)
    of_class = 3 * _noise(3, WIDTH)[examples.targets] + _noise(n, WIDTH)
    of_group = 30 * _noise(GROUPS, 40)[examples.groups] + _noise(n, 40)
    predicted = {
        name: predict(features, examples, 5, seed=0)[0]
        for name, features in {"class": of_class, "group": of_group}.items()
    }
    found = score("class", predicted["class"], examples, [], 0)
    assert found.accuracy > 0.95 and found.low < found.accuracy <= found.high
    # Each group's own mark would give its class away, were it in training and test.
    alone = score("group", predicted["group"], examples, [], 0)
    assert alone.low < 1 / 3 < alone.high
    assert alone.high - alone.low > 0.1  # as of 60 groups, not of 300 utterances
    test = difference(predicted["class"], predicted["group"], examples)
    assert test is not None and test.low > 0.4
    again, strengths, unconverged = predict(of_class, examples, 5, seed=0)
    assert (again == predicted["class"]).all() and len(strengths) == 5 and unconverged == 0


def test_shuffled_labels_are_guessed() -> None:
    examples = _examples()
    features = 3 * _noise(3, WIDTH)[examples.targets] + _noise(len(examples.rows), WIDTH)
    predicted, *_ = predict(features, examples, 5, seed=0, shuffled=True)
    assert (predicted == examples.targets).mean() < 0.6


def _label(name: str, accuracies: list[float], as_good: list[int]) -> LabelProbe:
    layers = [Score("", a, a - 0.05, a + 0.05, a, [], 0) for a in accuracies]
    best = int(np.argmax(accuracies))
    return LabelProbe(
        name, "speaker", 9, 9, {}, {}, 0.3, 0.3, layers[0], layers, layers, layers[0], best, as_good
    )


def test_the_fewest_layers_that_serve_all_labels() -> None:
    pitch = _label("pitch", [0.5, 0.9, 0.88, 0.5], [1, 2])
    speaker = _label("speaker", [0.5, 0.6, 0.9, 0.5], [2])
    words = _label("words", [0.3, 0.3, 0.3, 0.9], [3])
    assert recommend([words], 3) == [3]
    assert recommend([pitch], 3) == [1, 3]
    assert recommend([pitch, speaker, words], 3) == [2, 3]
    assert recommend([replace(pitch, as_good=[1]), speaker], 3) == [1, 2, 3]
    assert recommend([], 3) == [3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve real clips, each once as it is and once at a hundredth of its amplitude."""
    folder = tmp_path_factory.mktemp("corpus")
    source = build_index(["embedded:dev"]).table.to_pylist()
    rows = sorted(source, key=lambda row: row["samples"])[4:16]
    lines = []
    for number, row in enumerate(rows):
        audio, rate = soundfile.read(row["uri"])
        for name, gain in (("loud", 1.0), ("faint", 0.01)):
            soundfile.write(folder / f"{name}{number}.flac", gain * audio, rate, subtype="PCM_24")
            line = {"audio": f"{name}{number}.flac", "text": row["text"], "level": name}
            lines.append({**line, "take": number, "voice": "one" if number else "other"})
    lines[1] |= {"audio": "none.flac"}  # A row of the class `faint` that is no recording.
    soundfile.write(folder / "none.flac", np.zeros(8_000), 16_000)
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _run(corpus: Path, out: Path, *more: str) -> int:
    usual = ["--keep", "level,take,voice", "--least", "5", "--folds", "3", "--out", str(out)]
    return job.main([str(corpus), *usual, *more])


@pytest.fixture(scope="module")
def probed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed")
    assert _run(corpus, out, "--label", "level") == 0
    return out


def test_the_level_of_speech_is_in_the_first_layers(corpus: Path, probed: Path) -> None:
    result = json.loads((probed / "probe.json").read_text())
    [label] = result["labels"]
    assert label["classes"] == {"faint": 11, "loud": 12} and label["left_out"] == {"silent": 1}
    texts = {row["text"] for row in build_index([str(corpus)]).table.to_pylist()}
    assert label["disjoint"] == "sentence" and 5 < label["groups"] <= len(texts)
    assert label["majority"] == pytest.approx(12 / 23)
    assert label["mel"]["accuracy"] > 0.8
    assert len(label["layers"]) == len(label["random"]) == 5
    assert label["layers"][label["best"]]["accuracy"] > 0.9
    assert label["best"] in label["as_good"]
    assert result["encoder_layers"]


def test_the_page_has_a_chart_and_every_score(probed: Path) -> None:
    page = (probed / "probe.html").read_text()
    assert page.count('class="band"') == 1 and "random 4" in page
    assert 'class="band"' in (probed / "probe.svg").read_text()


def test_features_are_kept_and_those_of_random_weights_are_others(
    corpus: Path, probed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {path: path.stat().st_mtime_ns for path in (probed / "features").iterdir()}
    first = json.loads((probed / "probe.json").read_text())
    assert _run(corpus, probed, "--label", "level") == 0
    assert {path: path.stat().st_mtime_ns for path in (probed / "features").iterdir()} == there
    assert json.loads((probed / "probe.json").read_text()) == first
    features, pooling = PooledFeatures(list(there), {}), pooling_of("embedded", "trim", 0.5)
    mel, last = features.load(MEL), features.load(pooling.trained[-1])
    assert mel.shape == (24, 160) and last.shape == (24, 2 * 384)
    assert np.isfinite(last).all() and (last[1] == 0).all()  # the row that is no recording
    assert not np.allclose(features.load(pooling.random[-1]), last, atol=0.1)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--label", "mood"], "found level, take, voice"),
        (["--label", "take"], "take"),
        (["--label", "voice"], "one 22, other 2"),
        (["--label", "level", "--disjoint", "speaker"], "got 0"),
        (["--label", "level", "--encoder", "/none"], "--encoder"),
    ],
)
def test_wrong_input_ends_in_one_line(
    more: list[str],
    named: str,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code: Any = _run(corpus, tmp_path / "out", *more)
    printed = capsys.readouterr()
    assert code == 2 and named in printed.err and len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out" / "features").exists()
