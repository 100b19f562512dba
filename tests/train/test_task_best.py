"""The best checkpoint by the figure of a task: its direction, its refusals, and a resumed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from omni.checkpoint.resume import ResumePoint
from omni.checkpoint.train_state import TrainState
from omni.config import parse_config
from omni.corpus.tasks import task_rules
from omni.errors import ConfigError
from omni.metrics.best_figure import BestFigure
from omni.metrics.rows import DevLosses, eval_row
from omni.metrics.score import Errors
from omni.metrics.task_scores import Scoring
from omni.run.prepare import Prepared, make_worker_spec, prepare
from omni.train.loop import TrainLoop
from tests.helpers.stream_order import planned_stream
from tests.helpers.whole_runs import lines
from tests.helpers.worker_specs import encoded_block

STEPS = 5
LENGTH = {
    "prompt": "Long or short?",
    "answer": "{{ 'long' if seconds > 1.6 else 'short' }}",
    "choices": ["long", "short"],
}
RICH = {"prompt": "Tags:", "answer": "<size: {{ 'a' if seconds > 1 else 'b' }}> {{ text }}"}


def _prepared(storage: Path, best: str, tasks: dict[str, Any], limit: int = 6) -> Prepared:
    data = {"train": ["embedded:dev"], "dev": ["embedded:test"], "cache": None, "tasks": tasks}
    return prepare(
        parse_config(
            {
                "run": {"storage": str(storage), "name": "run"},
                "data": data,
                "tokenizer": {"vocab_size": 300},
                "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
                "optim": {"bin_positions": 512, "bins_per_step": 1, "steps": STEPS}
                | {"warmup_steps": 1, "lr": 2e-2},
                "train": {"precision": "fp32", "log_every": 1, "checkpoint_every": 2},
                "eval": {"every": 1, "max_utterances": 6, "wer_utterances": limit, "best": best}
                | {"max_new_tokens": 8},
            }
        )
    )


def _train(prepared: Prepared) -> dict[str, Any]:
    """Train from the newest checkpoint of the run to the end; return the state of the last one."""
    run = prepared.config.run_dir
    resume = None if prepared.resume is None else ResumePoint.of(prepared.resume, run)
    spec, splits = make_worker_spec(prepared, resume=resume), list(prepared.splits.values())
    first = 0 if resume is None else resume.step
    blocks: list[pa.Table] = [
        encoded_block(prepared, splits[planned.split], [planned.bin])
        for planned in planned_stream(splits, (first, spec.held_step, STEPS))
    ]
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    assert TrainLoop(spec, iter(blocks), 0, 1, torch.device("cpu")).run() is not None
    state: dict[str, Any] = json.loads((run / "checkpoints/last/state.json").read_text())["state"]
    return state


def test_a_run_keeps_the_checkpoint_of_the_highest_figure(tmp_path: Path) -> None:
    best, tasks = "dev_task_metrics.transcribe", {"transcribe": {"metric": "chrf"}}
    whole = _train(_prepared(tmp_path, best, tasks))
    run = tmp_path / "run"
    values = {
        row["step"]: row["dev_task_metrics"]["transcribe"]
        for row in lines(run / "metrics.jsonl")
        if row["kind"] == "eval"
    }
    assert len(values) == STEPS and len(set(values.values())) > 1, values
    step = max(values, key=lambda step: (values[step], -step))
    assert whole["best_metric"] == f"{best} (chrf) by lm"
    assert (whole["best_step"], whole["best_value"]) == (step, values[step])
    assert json.loads((run / "checkpoints/best/state.json").read_text())["state"]["step"] == step
    assert json.loads((run / "summary.json").read_text())["best_step"] == step

    # Continued from the second step, it ends as the whole run did.
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 2:
            shutil.rmtree(folder)
    again = _prepared(tmp_path, best, tasks)
    assert again.resume is not None and again.resume.state.step == 2
    resumed = _train(again)
    kept = ("best_metric", "best_step", "best_value", "evaluations_since_best")
    assert {name: resumed[name] for name in kept} == {name: whole[name] for name in kept}


def _losses(loss: float) -> DevLosses:
    return DevLosses(loss, 0.5, 0.1, 0.0, 0.0, *[torch.zeros(2, 3)] * 3)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *[(name, False) for name in ("wer", "cer")],
        *[(name, True) for name in ("accuracy", "macro_f1", "exact_match", "bleu", "chrf")],
    ],
)
def test_the_metric_of_a_task_says_what_is_better(metric: str, higher: bool) -> None:
    scoring = Scoring(task_rules({"tasks": {"a.b": {"metric": metric}}}), ["a.b", "other"])
    figure = BestFigure.of("dev_task_metrics.a.b", scoring)
    losses, errors = _losses(1.0), Errors(1, 4, 2, 9)
    scores = {"a.b": {"value": 0.5}, "other": {"value": 0.1}}
    found = figure.value(eval_row(TrainState(), losses, errors, [], scores=scores))
    assert found == 0.5 and figure.improves(found, None)
    assert (figure.improves(found, 0.4), figure.improves(found, 0.6)) == (higher, not higher)
    assert not figure.improves(found, 0.5) and not figure.improves(None, None)
    nothing = {"a.b": {"value": None}}
    assert figure.value(eval_row(TrainState(), losses, errors, [], scores=nothing)) is None
    assert figure.value(eval_row(TrainState(), losses, errors, [])) is None
    assert figure.measured("lm") == f"dev_task_metrics.a.b ({metric}) by lm"


def test_figures_of_all_tasks_are_chosen_as_ever() -> None:
    scoring = Scoring({}, ["transcribe"])
    row = eval_row(TrainState(), _losses(1.5), Errors(1, 4, 3, 10), [])
    for name, value in (("dev_loss", 1.5), ("dev_wer", 0.25), ("dev_cer", 0.3)):
        figure = BestFigure.of(name, scoring)
        assert figure.value(row) == value
        assert figure.improves(value, 2.0) and not figure.improves(value, 0.1)
        by = "" if name == "dev_loss" else " by joint"
        assert figure.measured("joint") == f"{name}{by}"
    assert (
        BestFigure.of("dev_loss", scoring).value(
            eval_row(TrainState(), _losses(float("nan")), Errors(1, 4, 3, 10), [])
        )
        is None
    )


@pytest.mark.parametrize("best", ["dev_accuracy", "dev_task_metrics", "dev_task_metrics.", 3])
def test_a_name_that_is_none_is_refused(best: Any) -> None:
    with pytest.raises(ConfigError, match=r"eval\.best: expected dev_loss"):
        parse_config({"eval": {"best": best}})


@pytest.mark.parametrize(
    ("task", "tasks", "named"),
    [
        ("mood", {"length": LENGTH}, "length, transcribe"),
        ("transcribe", {}, "dev_wer"),
        ("rich", {"rich": {**RICH, "metric": "exact_match"}}, "data.tasks.rich.metric"),
        ("length", {"length": LENGTH}, "eval.wer_utterances"),
    ],
)
def test_a_task_without_a_figure_is_refused(
    tmp_path: Path, task: str, tasks: dict[str, Any], named: str
) -> None:
    limit = 1 if named == "eval.wer_utterances" else 6  # The first row is a transcript.
    with pytest.raises(ConfigError, match=rf"^eval\.best: dev_task_metrics\.{task}: .*{named}"):
        _prepared(tmp_path, f"dev_task_metrics.{task}", tasks, limit)
