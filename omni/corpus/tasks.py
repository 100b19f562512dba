"""Tasks of `data.tasks`: one recording serves several, each with a prompt and an answer.

A task with a template of the answer makes an utterance of every recording whose labels the template
needs. It follows the row that it was made from, and names the same recording, so that the encoder
and its cache see nothing new.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import regex
from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from omni.audio.windows import SAMPLING_RATE
from omni.corpus.index import Index, repeated_id
from omni.corpus.index_row import DEFAULT_TASK, IndexRow, MessageRecording, is_transcription
from omni.corpus.labels import labels_of
from omni.corpus.rejects import Reject
from omni.errors import ConfigError, first_line
from omni.storage.digest import digest

NOT_A_CHOICE = "not a choice"
"""Reason of a reject: the answer is none of the choices of its task."""
LONE_CLASS = "class with one member"
"""Reason of a reject: no other utterance of the training data has the same answer."""
_BATCH = 65_536  # rows that are Python objects at a time
_TAG = regex.compile(r"<\s*([^\s<>{}:][^<>{}:]*?)\s*:")


@dataclass(frozen=True)
class TaskRule:
    """A task of the config, with all that is decided about it."""

    name: str
    prompts: tuple[str, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    metric: str | None = None
    """As configured; see `omni.metrics.task_scores.metric_of`."""
    share: float = 1.0

    @property
    def tags(self) -> tuple[str, ...]:
        """Names of the tags that the answer's template writes, such as <pace: {{ pace }}>."""
        return tuple(dict.fromkeys(_TAG.findall(self.answer or "")))

    @property
    def setting(self) -> str:
        return f"data.tasks.{self.name}"


def task_rules(data: Mapping[str, Any]) -> dict[str, TaskRule]:
    """Read the tasks of the `data` section of a config; old checkpoints lack some fields."""
    rules = {}
    for name, task in (data.get("tasks") or {}).items():
        prompts = task.get("prompts") or [prompt for prompt in [task.get("prompt")] if prompt]
        rules[name] = TaskRule(
            name,
            tuple(prompts),
            task.get("answer"),
            tuple(task.get("choices") or ()),
            task.get("metric"),
            task.get("share", 1.0),
        )
    return rules


def check_rules(rules: Iterable[TaskRule]) -> None:
    """Check the templates of answers. Raises ConfigError naming the setting."""
    for rule in rules:
        if rule.answer is None:
            continue
        if rule.name == DEFAULT_TASK:
            raise ConfigError(
                f"{rule.setting}.answer: the answer of {DEFAULT_TASK} is what is said; expected "
                "another name of the task"
            )
        _template(rule)


def draw_prompts(index: Index, rules: Mapping[str, TaskRule], seed: int) -> Index:
    """Give each row without a prompt one of the paraphrases of its own task, drawn by seed."""
    if not any(len(rule.prompts) > 1 for rule in rules.values()):
        return index
    columns = (index.table[name].to_pylist() for name in ("id", "prompt", "task", "messages"))
    prompts = [
        _draw(rules[task or DEFAULT_TASK], name, seed)
        if not prompt and messages is None and (task or DEFAULT_TASK) in rules
        else prompt
        for name, prompt, task, messages in zip(*columns, strict=True)
    ]
    at = index.table.schema.get_field_index("prompt")
    column = pa.chunked_array([pa.array(prompts, pa.large_string())])
    return replace(index, table=index.table.set_column(at, index.table.schema.field(at), column))


@dataclass
class _Made:
    """Utterances of one task: how many, and why rows have none."""

    positions: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Rows of the expanded table, by answer."""
    without: Counter[str] = field(default_factory=Counter)
    """Rows that lack a label, by what the template said of it."""
    first_without: str = ""
    """Id of the first of them."""
    empty: int = 0
    conversations: int = 0

    @property
    def count(self) -> int:
        return sum(map(len, self.positions.values()))


def expand_tasks(
    index: Index,
    rules: Mapping[str, TaskRule],
    split: str,
    *,
    seed: int | None = None,
    form: Any = str,
) -> Index:
    """Add the utterances of tasks with a template of the answer, each after its row.

    split: such as data.train, for messages. seed: of training, which draws prompts, leaves out
    classes with one member, takes a task by its share, and needs every task; None: evaluation,
    which asks the first prompt. form: Unicode form of answers. Raises ConfigError naming the
    setting and the row.
    """
    check_rules(rules.values())
    made = {name: _Made() for name, rule in rules.items() if rule.answer and rule.share}
    skipped = [name for name, rule in rules.items() if not rule.share]
    if not made and not skipped and (seed is None or all(r.share == 1 for r in rules.values())):
        return index
    weights, rejects = [], list(index.rejects)
    batches: list[pa.Table] = []
    first = row_number = 0
    for batch in index.table.to_batches(max_chunksize=_BATCH):
        rows: list[IndexRow] = []
        for row in batch.to_pylist():
            weight = 1.0 if index.weights is None else float(index.weights[row_number])
            row_number += 1
            own = row["task"] or DEFAULT_TASK
            if own not in skipped:
                rows.append(row)
                weights.append(weight * (rules[own].share if own in rules else 1.0))
            for name, found in made.items():
                if name == own:
                    continue
                answer = _answer(row, rules[name], found, rejects, form, split)
                if answer is not None:
                    found.positions[answer].append(first + len(rows))
                    prompts = rules[name]
                    prompt = prompts.prompts[0] if seed is None else _draw(prompts, row["id"], seed)
                    rows.append(_task_row(row, name, form(prompt), answer))
                    weights.append(weight * rules[name].share)
        batches.append(pa.Table.from_pylist(rows, index.table.schema))
        first += len(rows)
    table = pa.concat_tables([index.table.schema.empty_table(), *batches]).combine_chunks()
    notes = index.notes + [_note(rules[name], found) for name, found in made.items()]
    kept = np.ones(len(table), dtype=bool)
    for name, found in made.items():
        if seed is not None:
            _check_classes(rules[name], found, split)
            alone = [where[0] for where in found.positions.values() if len(where) == 1]
            if rules[name].choices and alone:
                kept[alone] = False
                rejects += [_lone(table, position, rules[name]) for position in alone]
    table, weighted = table.filter(pa.array(kept)).combine_chunks(), np.asarray(weights)[kept]
    if (twice := repeated_id(table["id"])) is not None:
        raise ConfigError(f"{split}: the id {twice!r} is also that of a task's utterance")
    given = index.weights is not None or (seed is not None and bool((weighted != 1).any()))
    return Index(table, rejects, weighted if given else None, notes)


def _answer(
    row: IndexRow, rule: TaskRule, found: _Made, rejects: list[Reject], form: Any, split: str
) -> str | None:
    """Render the answer of a row; None where the task does not apply, which is counted."""
    if row["messages"] is not None:
        found.conversations += 1
        return None
    try:
        answer = str(form(_template(rule).render(context_of(row)))).strip()
    except UndefinedError as error:
        found.first_without = found.first_without or row["id"]
        found.without[first_line(error)] += 1
        return None
    except Exception as error:
        raise ConfigError(
            f"{rule.setting}.answer: {row['id']} of {split}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
    if not answer:
        found.empty += 1
        return None
    if rule.choices and answer not in rule.choices:
        detail = f"{answer[:60]!r} is not in {rule.setting}.choices"
        rejects.append(Reject(_id_of(row, rule.name), row["uri"], NOT_A_CHOICE, detail))
        return None
    return answer


def context_of(row: IndexRow) -> dict[str, Any]:
    """Return the names that a template of an answer may use.

    `text` is what is said, and missing where that is not known.
    """
    labels = labels_of(row)
    own: dict[str, Any] = {"id": row["id"], "seconds": row["samples"] / SAMPLING_RATE}
    if is_transcription(row):
        own["text"] = row["text"]
    return {**labels, **own, "labels": labels}


def _task_row(row: IndexRow, task: str, prompt: str, answer: str) -> IndexRow:
    """Make the row of a task's utterance; `audios` keeps what is said in the recording."""
    recording: MessageRecording = {
        "uri": row["uri"],
        "offset": row["offset"],
        "length": row["length"],
        "start": row["start"],
        "duration": row["duration"],
        "samples": row["samples"],
        "key": row["key"],
        "text": row["text"] if is_transcription(row) else None,
    }
    return {
        **row,
        "id": _id_of(row, task),
        "text": answer,
        "prompt": prompt,
        "task": task,
        "audios": [recording],
    }


def _id_of(row: IndexRow, task: str) -> str:
    return f"{row['id']}:{task}"


def _draw(rule: TaskRule, name: str, seed: int) -> str:
    if len(rule.prompts) < 2:
        return rule.prompts[0] if rule.prompts else ""
    number = int(digest(f"{seed} {rule.name} {name}", size=8), 16)
    return rule.prompts[number % len(rule.prompts)]


def _check_classes(rule: TaskRule, found: _Made, split: str) -> None:
    """Raise ConfigError for a task that applies to no row, or whose answers are all the same."""
    if not found.count:
        reason = f"{found.empty} answers are empty" if found.empty else "no row is left"
        if found.without:
            lacking = found.without.most_common(1)[0][0]
            reason = f"{found.first_without}: {lacking} (data.keep, omni index --keep)"
        raise ConfigError(f"{rule.setting}.answer: no row of {split} has one: {reason}")
    if rule.choices and len(found.positions) == 1:
        [answer] = found.positions
        raise ConfigError(
            f"{rule.setting}.answer: all {found.count} rows of {split} have {answer!r}: there "
            "is nothing to tell apart"
        )


def _lone(table: pa.Table, position: int, rule: TaskRule) -> Reject:
    row = table.slice(position, 1).to_pylist()[0]
    detail = f"{rule.setting}: no other utterance has the answer {row['text'][:60]!r}"
    return Reject(row["id"], row["uri"], LONE_CLASS, detail)


def _note(rule: TaskRule, found: _Made) -> str:
    text = f"{rule.setting}: {found.count} utterances"
    if rule.choices:
        counts = {choice: len(found.positions.get(choice, ())) for choice in rule.choices}
        text += f" ({', '.join(f'{choice} {n}' for choice, n in counts.items())})"
    lacking = {
        f"lack a label ({', '.join(found.without)})": found.without.total(),
        "have an empty answer": found.empty,
        "are conversations": found.conversations,
    }
    return "; ".join([text, *(f"{n} rows {what}" for what, n in lacking.items() if n)])


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined)


@lru_cache(maxsize=256)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _template(rule: TaskRule) -> Template:
    """Compile the template of a task's answer. Raises ConfigError."""
    assert rule.answer is not None
    try:
        return _compiled(rule.answer)
    except TemplateError as error:
        raise ConfigError(f"{rule.setting}.answer: not a template: {first_line(error)}") from None


def names_of_tasks(table: pa.Table) -> Sequence[str]:
    """List the tasks of the rows of an index."""
    return sorted({name or DEFAULT_TASK for name in table["task"].unique().to_pylist()})
