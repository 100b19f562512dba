"""A whole run on a mixture of languages: what it learns from, how it is scored and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import audit, evaluate, transcribe
from omni.metrics.score import count_errors, total
from tests.helpers.whole_runs import ASSETS, TINY, embedded, ledger, lines, run_job, write_manifest

pytestmark = pytest.mark.slow

SPLIT = 14  # rows of the first language, of 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded English, some of it said to be Chinese: the names decide how it is treated."""
    folder = tmp_path_factory.mktemp("languages")
    train, dev = embedded("train", 20), embedded("dev", 6)
    one = write_manifest(folder / "one", train[:SPLIT])
    two = write_manifest(folder / "two", [{**r, "language": None} for r in train[SPLIT:]])
    mixed = [{**row, "language": "zh" if i % 2 else "en"} for i, row in enumerate(dev)]
    config: dict[str, Any] = yaml.safe_load(TINY)
    config["data"] |= {
        "train": [str(one), {"source": str(two), "weight": 2, "language": "zh"}],
        "dev": [str(write_manifest(folder / "dev", mixed))],
        "case": "upper",
        "punctuation": "strip",
        "language_tag": True,
    }
    config["optim"] |= {"steps": 20, "bins_per_step": 2}
    config["eval"] |= {"every": 10, "wer_utterances": 6, "best": "dev_cer"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = run_job(path, folder / "runs")
    assert ", zh CER " in done.stdout and "dev by language" in done.stdout
    return folder / "runs" / "run"


def test_each_language_is_reported_apart(run: Path) -> None:
    rows = lines(run / "transcripts-dev.jsonl")
    assert all(row["reference"] == row["reference"].upper() for row in rows)
    found = json.loads((run / "summary.json").read_text())["languages"]["dev"]
    for language, by in (("en", "wer"), ("zh", "cer")):
        errors = total(
            [
                count_errors(row["reference"], row["hypothesis"], language)
                for row in rows
                if row["language"] == language
            ]
        )
        expected = {"wer": errors.wer, "cer": errors.cer, "utterances": 3, "by": by}
        assert found[language] == expected
    evals = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [10, 20]
    assert all(row["dev_languages"].keys() == {"en", "zh"} for row in evals)


def test_utterances_occur_as_often_as_their_weight_says(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([str(run)]) == 0
    assert "clean" in capsys.readouterr().out
    steps = ledger(run)
    counts = sum((utterances for _, utterances in steps.values()), type(steps[1][1])())
    first, second = ([counts[n] for n in part] for part in (range(SPLIT), range(SPLIT, 20)))
    assert sum(second) / len(second) == pytest.approx(2 * sum(first) / len(first), rel=0.1)


def test_an_evaluation_knows_the_policy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(run / "checkpoints" / "best")
    manifest = str(run.parents[1] / "dev" / "manifest.jsonl")
    assert evaluate.main(["--checkpoint", checkpoint, "--data", manifest, "--allow_absolute"]) == 0
    scored = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert scored["cer"] == summary["dev_cer"] and scored["wer"] == summary["dev_wer"]
    assert scored["languages"] == summary["languages"]["dev"]


def test_a_recording_is_written_down_in_a_language(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = next((ASSETS / "audio").iterdir())
    arguments = ["--checkpoint", str(run / "checkpoints" / "best"), str(clip)]
    assert transcribe.main([*arguments, "--language", "zh"]) == 0
    assert json.loads(capsys.readouterr().out)["audio"] == str(clip)
    assert transcribe.main([*arguments, "--language", "<zh>"]) == 2
    assert "--language: " in capsys.readouterr().err


def test_another_policy_is_another_run(run: Path) -> None:
    config = run.parents[1] / "config.yaml"
    with pytest.raises(AssertionError, match=r"override_fingerprint data\.train"):
        run_job(config, run.parent, "--data.case", "keep", "--optim.steps", "21")
