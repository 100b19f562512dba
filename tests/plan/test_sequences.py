"""Rows of an index as token sequences: ids, positions, answers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni
from omni.audio.windows import encoder_frames
from omni.config import Config, parse_config
from omni.corpus.index import Index, build_index
from omni.errors import ConfigError
from omni.model.chat_template import AUDIO, Template, transcription
from omni.model.projector import soft_tokens
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.sequences import (
    answer_lengths,
    ctc_fit,
    sequence_positions,
    task_names,
    token_fingerprint,
    with_tokens,
)
from tests.helpers.chat_families import FAMILIES, speech_tokenizer

CORPUS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROWS = [json.loads(line) for line in (CORPUS / "train.jsonl").read_text().splitlines()]
CLIPS = [row for row in ROWS if row["duration"] < 2][:4]
Make = Callable[..., Index]


@pytest.fixture
def index(tmp_path: Path) -> Make:
    def make(*rows: dict[str, Any]) -> Index:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build_index([str(path)], allow_absolute=True)

    return make


def row(number: int, **fields: Any) -> dict[str, Any]:
    clip = CLIPS[number]
    return {"id": clip["id"], "audio": str(CORPUS / clip["audio"]), "text": clip["text"], **fields}


def talk(name: str, *turns: tuple[str, Any]) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": r, "content": c} for r, c in turns]}


@pytest.fixture(scope="module")
def plain() -> Template:
    return Template(SpeechTokenizer.train([clip["text"] for clip in CLIPS], 300))


def config(**sections: dict[str, Any]) -> Config:
    return parse_config({"optim": {"bin_positions": 200}, **sections})


def test_a_row_is_its_recording_prompt_and_text(index: Make, plain: Template) -> None:
    given = index(row(0), row(1, prompt="Write:"))
    table, lengths, rejects = with_tokens(given, plain, ["transcribe"], config())
    assert rejects == []
    rendered = plain.render(
        [transcription("", CLIPS[0]["text"]), transcription("Write:", CLIPS[1]["text"])]
    )
    assert table["tokens"].to_pylist() == [r.ids for r in rendered]
    assert table["supervised"].to_pylist() == [r.supervised for r in rendered]
    assert table["id"].to_pylist() == given.table["id"].to_pylist()
    for samples, r, length in zip(
        given.table["samples"].to_pylist(), rendered, lengths, strict=True
    ):
        soft = soft_tokens(encoder_frames(samples, "trim"), 4)
        assert length == soft + len(r.ids) - 2
        assert length == sequence_positions([encoder_frames(samples, "trim")], len(r.ids), 4)


def test_a_row_takes_the_prompt_of_its_task(index: Make, plain: Template) -> None:
    given = index(row(0, task="emotion"), row(1), row(2, task="emotion", prompt="How?"))
    tasks = {"emotion": {"prompt": "Feel:"}, "transcribe": {"prompt": "Write:"}}
    settings = config(data={"tasks": tasks})
    names = task_names(settings, {"train": given})
    table, _, _ = with_tokens(given, plain, names, settings)
    prompts = [plain.tokenizer.decode(ids[1:]) for ids in table["tokens"].to_pylist()]
    starts = ("Feel:", "Write:", "How?")
    assert all(text.startswith(start) for text, start in zip(prompts, starts, strict=True))
    assert table["task_number"].to_pylist() == [names.index(t) for t in ("emotion",)] + [
        names.index("transcribe"),
        names.index("emotion"),
    ]


def test_what_does_not_fit_a_bin_is_a_reject_with_its_numbers(index: Make, plain: Template) -> None:
    given = index(row(0), row(1, text="very long " * 80))
    table, lengths, [reject] = with_tokens(given, plain, ["transcribe"], config())
    assert lengths[0] > 0 and lengths[1] == 0 and table.num_rows == 2
    assert (reject.id, reject.reason) == (CLIPS[1]["id"], "longer than a bin")
    need = sequence_positions(
        [encoder_frames(given.table["samples"][1].as_py(), "trim")],
        len(table["tokens"][1]),
        4,
    )
    assert str(need) in reject.detail and "200" in reject.detail


def test_answers_are_counted_with_their_end(index: Make, plain: Template) -> None:
    audio = {"audio": str(CORPUS / CLIPS[0]["audio"])}
    given = index(
        row(0),
        row(1, text="a"),
        talk("t", ("user", [audio]), ("assistant", "a b"), ("user", "x"), ("assistant", "yes")),
    )
    settings = config(optim={"bin_positions": 200, "ctc_weight": 0.5})
    table, lengths, _ = with_tokens(given, plain, ["transcribe"], settings)
    encode = plain.tokenizer.encode
    wanted = [len(encode(text)) + 1 for text in (CLIPS[0]["text"], "a", "yes")]
    assert answer_lengths(table).tolist() == wanted
    assert answer_lengths(table.slice(1)).tolist() == wanted[1:]
    assert answer_lengths(table.slice(0, 0)).tolist() == []
    assert ctc_fit(table, lengths) == (1, 0), "nothing is known of what is said in the talk"
    assert ctc_fit(table, np.ones_like(lengths))[1] >= 2


def test_other_ids_of_the_same_length_have_another_fingerprint(
    index: Make, plain: Template
) -> None:
    given = index(row(0, task="t"))
    found = []
    for prompt in ("ab", "ab", "ba"):
        settings = config(data={"tasks": {"t": {"prompt": prompt}}})
        table, lengths, _ = with_tokens(given, plain, ["t"], settings)
        found.append((token_fingerprint(table), lengths.tolist()))
    assert found[0] == found[1] != found[2] and found[0][1] == found[2][1]


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        ("gemma", ("system", "user", "assistant"), "System role not supported"),
        ("mistral", ("system", "user", "assistant"), "roles must alternate"),
        ("llama-2", ("user", "user", "assistant"), "roles must alternate"),
    ],
)
def test_a_row_that_the_chat_template_refuses_is_named(
    index: Make, name: str, turns: tuple[str, ...], reason: str
) -> None:
    audio = [{"audio": str(CORPUS / CLIPS[0]["audio"])}]
    asked = turns.index("user")
    bad = talk("talk-7", *((r, audio if i == asked else "Yes.") for i, r in enumerate(turns)))
    template = Template(speech_tokenizer(FAMILIES[name]), "chat")
    with pytest.raises(ConfigError, match=rf"^data\.template: talk-7: .*{reason}"):
        with_tokens(index(row(0), bad, row(1)), template, ["transcribe"], config())


def test_a_conversation_has_its_recordings_in_their_places(index: Make) -> None:
    audio = [{"audio": str(CORPUS / clip["audio"])} for clip in CLIPS[:2]]
    template = Template(speech_tokenizer(FAMILIES["qwen-2.5"]), "chat")
    given = index(
        talk(
            "t",
            ("system", "Be brief."),
            ("user", [{"text": "First "}, audio[0], {"text": " second "}, audio[1]]),
            ("assistant", "Yes."),
        )
    )
    table, [length], _ = with_tokens(given, template, ["transcribe"], config())
    [ids] = table["tokens"].to_pylist()
    assert ids.count(AUDIO) == 2
    text = template.tokenizer.decode([i for i in ids[: ids.index(AUDIO)]])
    assert text.endswith("First ")
    between = ids[ids.index(AUDIO) + 1 : len(ids) - 1 - ids[::-1].index(AUDIO)]
    assert template.tokenizer.decode(between) == " second "
    frames = [encoder_frames(r["samples"], "trim") for r in given.table["audios"][0].as_py()]
    assert length == sequence_positions(frames, len(ids), 4)
