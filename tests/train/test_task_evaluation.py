"""An evaluation of a run with several tasks, from its plan to its figures, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from omni.config.load import parse_config
from omni.corpus.index_row import span_of
from omni.corpus.tasks import task_rules
from omni.errors import ConfigError
from omni.inference.decode_batch import HeldUtterance
from omni.metrics.rows import by_task
from omni.metrics.task_scores import Scoring, spoken
from omni.model.chat_template import Template
from omni.model.decode import Decoding
from omni.model.speech_lm import OmniModel
from omni.run.prepare import Prepared, prepare
from omni.stream.schema import utterances
from omni.train.evaluation import HeldOut, Layout
from tests.helpers.worker_specs import encoded_block

TASKS = {
    "length": {
        "prompts": ["Long?", "How long?"],
        "answer": "{{ 'long' if seconds > 1.5 else 'short' }}",
        "choices": ["long", "short"],
    },
    "rich": {"prompt": "Tags:", "answer": "<size: {{ 'a' if seconds > 1 else 'b' }}> {{ text }}"},
}


def _prepared(folder: Path, tasks: dict[str, Any], **optim: float) -> Prepared:
    data = {"train": "embedded:dev", "dev": "embedded:test", "cache": None, "tasks": tasks}
    return prepare(
        parse_config(
            {
                "run": {"storage": str(folder)},
                "data": data,
                "tokenizer": {"vocab_size": 300},
                "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
                "optim": {"bin_positions": 256, "bins_per_step": 2, "steps": 40, **optim},
                "train": {"precision": "fp32"},
            }
        )
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return _prepared(tmp_path_factory.mktemp("runs"), TASKS, ctc_weight=1.0)


@pytest.fixture(scope="module")
def held(prepared: Prepared) -> HeldOut:
    split = prepared.splits["dev"]
    table = encoded_block(prepared, split, range(split.plan.bins))
    found, places = [], []
    for row in table.to_pylist():
        row["transcriptions"] = [False] * len(row["ids"])
        for i, utterance in enumerate(utterances(row, prepared.encoder.codec)):
            texts = row["ids"][i], row["uris"][i], row["texts"][i], "en"
            found.append(HeldUtterance(utterance, *texts, span_of(row["spans"][i])))
            places.append((row["bin"], i))
    return HeldOut(found, places, Layout.of(prepared.config, prepared.model), torch.device("cpu"))


def test_the_plan_knows_rows_times_tasks(prepared: Prepared) -> None:
    assert prepared.tasks == ["length", "rich", "transcribe"]
    train = prepared.splits["train"]
    assert train.table.num_rows == 3 * 55 and prepared.splits["dev"].table.num_rows == 3 * 32
    assert set(train.plan.members.tolist()) == set(range(3 * 55))
    rows = train.table.slice(0, 3).to_pylist()
    assert len({row["key"] for row in rows}) == 1
    said = [row["transcript_tokens"] for row in rows]
    assert said[0] == said[1] == said[2] and said[0][0], "CTC learns from what is said"
    assert not any("CTC learns nothing" in note and "not known" in note for note in prepared.notes)


def test_an_evaluation_scores_every_task_by_its_metric(prepared: Prepared, held: HeldOut) -> None:
    model = OmniModel(prepared.model, None, 0).eval()
    model.init_weights(0)
    model.task_weights = torch.ones(len(prepared.tasks))
    template = Template(prepared.tokenizer, prepared.template)
    scoring = Scoring(task_rules(prepared.config.data.model_dump()), prepared.tasks)
    errors, rows = held.transcribe(model, template, Decoding(max_new_tokens=4), 60, scoring)
    assert len(rows) == 60 and [row["number"] for row in rows] == list(range(60))
    of_task = {name: [row for row in rows if row["task"] == name] for name in prepared.tasks}
    assert [len(members) for members in of_task.values()] == [20, 20, 20]
    assert spoken(rows) == [row for row in rows if row["task"] != "length"]
    words = sum(row["errors"].words for name in ("rich", "transcribe") for row in of_task[name])
    assert errors["all"].words == words
    for row in of_task["length"]:
        assert list(row["choices"]) == ["long", "short"] == list(row["shuffled_choices"])
    for rich, plain in zip(of_task["rich"], of_task["transcribe"], strict=True):
        assert rich["errors"].words == plain["errors"].words, "tags are no words"
    found = scoring.score(rows)
    assert found["length"]["decided_by"] == "likelihood" and found["length"]["utterances"] == 20
    assert 0 <= found["length"]["shuffled_accuracy"] <= 1 and 0 <= found["length"]["ece"] <= 1
    assert found["rich"]["tags"]["size"]["utterances"] == 20
    losses = held.loss(model)
    by_name = losses.by_task(prepared.tasks)
    assert by_name is not None and by_name.keys() == found.keys()
    assert all(abs(figures["gap"]) < 5 for figures in by_name.values())
    assert by_task(prepared.tasks, losses.tasks)["length"].get("gap") is None  # type: ignore[index]


def test_the_best_checkpoint_needs_a_metric_that_dev_has(tmp_path: Path) -> None:
    tasks = {**TASKS, "transcribe": {"share": 0}}
    del tasks["rich"]
    values = {
        "run": {"storage": str(tmp_path)},
        "data": {"train": "embedded:dev", "dev": "embedded:test", "cache": None, "tasks": tasks},
        "tokenizer": {"vocab_size": 300},
        "eval": {"best": "dev_wer"},
    }
    with pytest.raises(ConfigError, match=r"eval\.best: dev_wer.*length"):
        prepare(parse_config(values))


def test_configs_without_answers_keep_their_plan(tmp_path: Path) -> None:
    plain = _prepared(tmp_path / "a", {})
    listed = _prepared(tmp_path / "b", {"transcribe": {"weight": 2.0}})
    assert plain.fingerprints == listed.fingerprints and plain.tasks == listed.tasks
