"""One recording serves several tasks: their prompts, answers, shares, and what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from omni.config import Config
from omni.config.load import parse_config
from omni.corpus.index import Index
from omni.corpus.index_row import is_transcription, recordings, transcripts
from omni.corpus.splits import build_indexes
from omni.corpus.tasks import LONE_CLASS, NOT_A_CHOICE, expand_tasks, task_rules
from omni.errors import ConfigError

Record = Callable[..., Path]
Build = Callable[..., dict[str, Index]]
MOODS = ["calm", "calm", "loud", "loud", "calm", "loud"]
MOOD = {"prompt": "Mood?", "answer": "{{ mood }}", "choices": ["calm", "loud"]}


@pytest.fixture
def build(record: Record, manifest: Callable[..., str]) -> Build:
    """Index six recordings under `data.tasks`; change: edits the rows of train."""

    def make(
        tasks: dict[str, Any],
        change: Callable[[list[dict[str, Any]]], None] | None = None,
        **data: Any,
    ) -> dict[str, Index]:
        rows: list[dict[str, Any]] = []
        for number, mood in enumerate(MOODS):
            name = f"{number}.wav"
            record(name, seconds=0.5 + 0.25 * number, hertz=300.0 + 50 * number)
            rows.append(
                {"id": f"u{number}", "audio": name, "text": f"Text {number}.", "mood": mood}
            )
        dev = manifest(*rows[:4], name="dev.jsonl")
        if change is not None:
            change(rows)
        train = manifest(*rows, name="train.jsonl")
        given = {"train": train, "dev": dev, "keep": "mood", "cache": None, "tasks": tasks, **data}
        return build_indexes(parse_config({"data": given}))

    return make


def _ids(index: Index) -> list[str]:
    return list(index.table["id"].to_pylist())


def test_every_recording_serves_every_task_that_has_an_answer(build: Build) -> None:
    length = {"prompt": "Length?", "answer": "{{ 'long' if seconds > 1 else 'short' }}"}
    found = build({"mood": MOOD, "length": length})
    rows = found["train"].table.to_pylist()
    assert [row["id"] for row in rows[:3]] == ["u0", "u0:mood", "u0:length"] and len(rows) == 18
    assert [(row["task"], row["prompt"], row["text"]) for row in rows[:3]] == [
        (None, "", "Text 0."),
        ("mood", "Mood?", "calm"),
        ("length", "Length?", "short"),
    ]
    assert len(found["dev"]) == 12
    for row in rows:  # The encoder and its cache see one recording, and CTC what is said in it.
        of_row = next(r for r in rows if r["id"] == row["id"].partition(":")[0])
        assert [r["key"] for r in recordings(row)] == [of_row["key"]]
        assert transcripts(row) == [of_row["text"]]
        assert is_transcription(row) == (row["task"] is None)


def test_configs_without_answers_keep_their_index(build: Build) -> None:
    plain = build({})["train"]
    listed = build({"transcribe": {"prompt": "Write:", "weight": 2.0}})["train"]
    assert listed.fingerprint == plain.fingerprint and listed.weights is None
    assert listed.table.equals(plain.table)


def test_a_share_is_the_occurrences_in_an_epoch(build: Build) -> None:
    found = build({"mood": {**MOOD, "share": 0.5}, "transcribe": {"share": 2}})
    index = found["train"]
    assert index.weights is not None and found["dev"].weights is None
    moods = pc.equal(index.table["task"].fill_null("transcribe"), "mood").to_numpy()
    assert (index.weights[moods] == 0.5).all() and (index.weights[~moods] == 2).all()
    only = build({"mood": MOOD, "transcribe": {"share": 0}})
    assert set(only["train"].table["task"].to_pylist()) == {"mood"}
    assert set(only["dev"].table["task"].to_pylist()) == {"mood"}


def test_training_draws_paraphrases_and_evaluation_asks_the_first(build: Build) -> None:
    paraphrases = ["A?", "B?", "C?"]
    mood = {"prompts": paraphrases, "answer": "{{ mood }}"}
    tasks = {"mood": mood, "transcribe": {"prompts": ["Write.", "Say it."]}}
    found = [build(tasks) for _ in range(2)]
    prompts = [index["train"].table["prompt"].to_pylist() for index in found]
    assert prompts[0] == prompts[1]
    counts = Counter(prompts[0])
    assert counts.keys() <= {*paraphrases, "Write.", "Say it."} and len(counts) > 2
    asked = found[0]["dev"].table.to_pylist()
    assert {row["prompt"] for row in asked if row["task"] == "mood"} == {"A?"}
    other = parse_config({"data": {"tasks": tasks}}).data
    assert other.tasks["mood"].prompt == "A?", "also where one prompt is asked for"


def test_rows_that_name_their_task_keep_their_own_answer(build: Build) -> None:
    def own(rows: list[dict[str, Any]]) -> None:
        rows[0] |= {"task": "mood", "text": "loud", "prompt": "How?"}

    rows = build({"mood": MOOD}, own)["train"].table.to_pylist()
    [given] = [row for row in rows if row["id"].startswith("u0")]
    assert (given["prompt"], given["text"], given["audios"]) == ("How?", "loud", None)
    assert transcripts(given) == [None], "its text is not what is said"


def test_text_is_only_what_is_said(build: Build) -> None:
    def own(rows: list[dict[str, Any]]) -> None:
        rows[0] |= {"task": "other", "text": "An answer."}

    tasks = {"rich": {"prompt": "Tags:", "answer": "<mood: {{ mood }}> {{ text }}"}, "other": {}}
    index = build(tasks, own)["train"]
    assert "u0:rich" not in _ids(index) and "u1:rich" in _ids(index)
    assert index.table["text"].to_pylist()[_ids(index).index("u1:rich")] == "<mood: calm> Text 1."
    assert any("'text' is undefined" in note for note in index.notes)


def test_the_policy_of_the_text_is_applied_first(build: Build) -> None:
    rich = {"rich": {"prompt": "Tags:", "answer": "<Mood: {{ mood }}> {{ text }}"}}
    index = build(rich, case="lower", language="en", language_tag=True)["train"]
    row = index.table.to_pylist()[1]
    assert row["text"] == "<Mood: calm> text 0." and transcripts(row) == ["text 0."]
    assert row["prompt"] == "Tags:", "a tag would tell the answer to a question about the language"


# -- what cannot be used --------------------------------------------------------------------------


def test_rows_without_the_label_are_counted(build: Build) -> None:
    def lack(rows: list[dict[str, Any]]) -> None:
        rows[1]["mood"] = None

    index = build({"mood": MOOD}, lack)["train"]
    assert "u1:mood" not in _ids(index) and len(index) == 11
    [note] = [note for note in index.notes if "data.tasks.mood" in note]
    assert "5 utterances (calm 2, loud 3)" in note and "1 rows lack a label" in note


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ({"prompt": "A?", "answer": "{{ gender }}"}, r"mood\.answer.*data\.train.*u0.*'gender'"),
        (
            {"prompt": "A?", "answer": "{{ mood / 2 }}"},
            r"mood\.answer: u0 of data\.train: TypeError",
        ),
        ({"prompt": "A?", "answer": "{{ mood"}, r"mood\.answer: not a template"),
        ({"prompt": "A?", "answer": "{{ ''.__class__.__mro__ }}"}, r"mood\.answer.*Security"),
        ({"prompt": "A?", "answer": "{{ '' }}"}, r"mood\.answer.*empty"),
        ({"prompt": "A?", "answer": "calm", "choices": ["calm", "loud"]}, r"all 6 rows.*'calm'"),
    ],
)
def test_a_template_that_cannot_work_names_setting_and_row(
    build: Build, task: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build({"mood": task})


def test_the_answer_of_a_transcript_is_what_is_said(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"data\.tasks\.transcribe\.answer"):
        build({"transcribe": {"prompt": "A?", "answer": "{{ text }}"}})


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ({"metric": "f2"}, r"data\.tasks\.mood\.metric.*'wer'"),
        ({"answer": "{{ mood }}"}, r"data\.tasks\.mood.*prompt"),
        ({"choices": ["calm"]}, r"choices"),
        ({"choices": ["calm", "Calm "]}, r"choices"),
        ({"prompt": "A?", "prompts": ["B?", "A?"]}, r"prompts"),
        ({"share": -1}, r"share"),
    ],
)
def test_a_wrong_setting_is_one_error(task: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config({"data": {"tasks": {"mood": task}}})


def test_answers_that_are_no_choice_and_classes_of_one_are_rejects(build: Build) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["mood"], rows[1]["mood"] = "sad", "odd"

    choices = ["calm", "loud", "odd"]
    index = build({"mood": {**MOOD, "choices": choices}}, change)["train"]
    assert [(r.id, r.reason) for r in index.rejects] == [
        ("u0:mood", NOT_A_CHOICE),
        ("u1:mood", LONE_CLASS),
        ("u4:mood", LONE_CLASS),
    ]
    assert len(index) == 6 + 3 and not {"u0:mood", "u1:mood", "u4:mood"} & {*_ids(index)}


def test_an_id_that_a_task_makes_a_second_time_is_named(build: Build) -> None:
    def clash(rows: list[dict[str, Any]]) -> None:
        rows[5]["id"] = "u0:mood"

    with pytest.raises(ConfigError, match="'u0:mood'"):
        build({"mood": MOOD}, clash)


def test_checkpoints_of_older_versions_have_their_tasks() -> None:
    rules = task_rules({"tasks": {"mood": {"prompt": "A?", "weight": 2.0}}})
    assert rules["mood"].prompts == ("A?",) and rules["mood"].answer is None
    assert task_rules({}) == {}


def test_weights_of_a_mixture_are_kept(build: Build) -> None:
    index = build({})["train"]
    weighted = Index(index.table, weights=np.linspace(0.5, 3.0, 6))
    rules = task_rules(Config().data.model_dump() | {"tasks": {"mood": {**MOOD, "share": 2}}})
    expanded = expand_tasks(weighted, rules, "data.train", seed=0)
    assert expanded.weights is not None
    assert expanded.weights.tolist() == [w * s for w in weighted.weights for s in (1, 2)]
