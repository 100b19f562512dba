"""What a pretrained language model, tasks and conversations change in the preparation of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omni.config import Config, parse_config
from omni.corpus.index import build_index
from omni.errors import ConfigError
from omni.model.chat_template import AUDIO
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFConfig
from omni.model.lm.nanochat import save_nanochat
from omni.model.tokenizer import SpeechTokenizer
from omni.run.fingerprints import check_fingerprints
from omni.run.model_setup import choose_tokenizer, find_language_model
from omni.run.prepare import prepare
from tests.helpers.chat_families import FAMILIES, fast_tokenizer
from tests.helpers.hf_folders import CHAT, save_folder
from tests.run.test_prepare import CORPUS, SHORT, _configure, _error

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    def make(**sections: dict[str, Any]) -> Config:
        """No shape of its own: that is the language model's."""
        values = _configure(tmp_path).model_dump(exclude_unset=True)
        values.pop("model")
        values.pop("tokenizer")
        for name, fields in sections.items():
            values[name] = {**values.get(name, {}), **fields}
        return parse_config(values)

    return make


# --- nanochat ------------------------------------------------------------------------------------


@pytest.fixture
def nanochat(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer beside it."""
    tokenizer = SpeechTokenizer.train([row["text"] for row in SHORT], 300)
    folder = tmp_path / "nanochat" / "d2"
    model = GPT(GPTConfig(256, tokenizer.vocab_size, 2, 2, 2, 32, "SL"))
    save_nanochat(model, folder, 5, tokenizer)
    return folder


def test_a_nanochat_checkpoint_gives_shape_and_tokenizer(
    configure: Configure, nanochat: Path
) -> None:
    prepared = prepare(configure(model={"lm": f"nanochat:{nanochat}"}))
    assert prepared.model.lm == GPTConfig(256, prepared.tokenizer.vocab_size, 2, 2, 2, 32, "SL")
    assert prepared.model.source is not None
    assert prepared.model.projector == "mlp" and prepared.template == "plain"
    chat = prepare(configure(model={"lm": f"nanochat:{nanochat}@5"}, data={"template": "chat"}))
    row = chat.splits["train"].table.to_pylist()[0]
    special = chat.tokenizer.special_ids
    assert row["tokens"][:3] == [special["<|bos|>"], special["<|user_start|>"], AUDIO]
    assert row["supervised"].count(True) == len(chat.tokenizer.encode(row["text"])) + 1


def test_other_weights_are_another_run(configure: Configure, nanochat: Path) -> None:
    config = configure(model={"lm": f"nanochat:{nanochat}"})
    before = prepare(config).fingerprints
    torch.manual_seed(1)
    vocabulary = prepare(config).tokenizer.vocab_size
    save_nanochat(GPT(GPTConfig(256, vocabulary, 2, 2, 2, 32, "SL")), nanochat, 5)
    after = prepare(config).fingerprints
    assert {name for name in before if before[name] != after[name]} == {"model"}


def test_what_is_wrong_with_a_checkpoint_is_said_before_the_run(
    configure: Configure, nanochat: Path, tmp_path: Path
) -> None:
    error = _error(configure(model={"lm": f"nanochat:{tmp_path}/absent"}))
    assert error.startswith("model.lm: ") and f"{tmp_path}/absent" in error
    error = _error(configure(model={"lm": f"nanochat:{nanochat}@6"}))
    assert re.match(r"model\.lm: .*\bstep 6\b.*\b5\b", error)
    (nanochat / "tokenizer.pkl").unlink()
    assert "tokenizer.path" in _error(configure(model={"lm": f"nanochat:{nanochat}"}))
    large = tmp_path / "tokenizer.json"
    SpeechTokenizer.train([row["text"] for row in SHORT] + ["xyz qwerty zebra"], 330).save(large)
    error = _error(configure(model={"lm": f"nanochat:{nanochat}"}, tokenizer={"path": str(large)}))
    assert error.startswith("tokenizer: ") and f"nanochat:{nanochat}" in error


# --- transformers --------------------------------------------------------------------------------


def test_a_transformers_folder_gives_shape_tokenizer_and_chat(
    configure: Configure, tmp_path: Path
) -> None:
    folder = save_folder(tmp_path / "lm")
    config = configure(
        model={"lm": f"hf:{folder}", "train": ["projector", "lora"], "lora_rank": 4},
        data={"prompt": "Write:"},
    )
    prepared = prepare(config)
    assert isinstance(prepared.model.lm, HFConfig) and prepared.model.projector == "swiglu"
    assert prepared.model.lora is not None
    assert (prepared.model.lora.rank, prepared.model.lora.alpha) == (4, 8)
    assert prepared.tokenizer.chat_template == CHAT and prepared.template == "chat"
    row = prepared.splits["train"].table.to_pylist()[0]
    audio = row["tokens"].index(AUDIO)
    assert prepared.tokenizer.decode(row["tokens"][audio + 1 :]).startswith("Write:")


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"lm": "gpt2"}, r"^model\.lm: .*\bscratch\b.*\bnanochat:.*\bhf:.*\bms:"),
        ({"lm": "hf:x", "n_layer": 3}, r"^model: n_layer: .*\bhf:x\b"),
        ({"lm": "hf:x", "train": ["lm", "lora"]}, r"^model: train: .*\blora\b"),
        ({"train": ["lora"]}, r"^model: train: .*\blora\b"),
    ],
)
def test_settings_that_exclude_each_other(model: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({"model": model})


def test_settings_that_do_not_fit_the_model(configure: Configure, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "lm")
    model = {"lm": f"hf:{folder}"}
    assert _error(configure(model={**model, "dropout": 0.1})).startswith("model.dropout: ")
    error = _error(configure(model=model, optim={"kl_weight": 1.0}))
    assert error.startswith("optim.kl_weight: ")
    full = {**model, "train": ["projector", "lm"]}
    assert _error(configure(model=full, optim={"muon_lr": 0.02})).startswith("optim.muon_lr: ")
    tied = save_folder(tmp_path / "tied", tie_word_embeddings=True)
    own = {"model": {**full, "lm": f"hf:{tied}"}, "optim": {"unembedding_lr": 0.02}}
    error = _error(configure(**own))
    assert error.startswith("optim.unembedding_lr: "), "it is the table of embeddings"
    error = _error(configure(model={**model, "projector": "conv", "stack": 6}))
    assert re.match(r"model\.stack: .*\bconv\b.*\b6\b", error)
    error = _error(configure(encoder={"layers": [2, 9]}))
    assert re.search(r"\blayers\b.*\b9\b.*\b0\b.*\b4\b", error)


# --- tasks and conversations ---------------------------------------------------------------------


def _rows(**fields: list[Any]) -> list[dict[str, Any]]:
    rows = [dict(row) for row in SHORT[:8]]
    for name, values in fields.items():
        for row, value in zip(rows, values, strict=False):
            row[name] = value
    return rows


def test_tasks_have_prompts_and_numbers(tmp_path: Path) -> None:
    rows = _rows(task=["emotion", "transcribe", "emotion"], prompt=[None, None, "How?"])
    tasks = {"emotion": {"prompt": "Feel:", "weight": 2}, "transcribe": {"prompt": "Write:"}}
    config = _configure(tmp_path, rows, data={"tasks": tasks, "prompt": ""})
    prepared = prepare(config)
    assert prepared.tasks == ["emotion", "transcribe"]
    table = prepared.splits["train"].table.to_pylist()
    assert [row["task_number"] for row in table] == [0, 1, 0, 1, 1, 1, 1, 1]
    prompts = [prepared.tokenizer.decode(row["tokens"][1:]) for row in table[:4]]
    starts = ["Feel:", "Write:", "How?", "Write:"]
    assert all(text.startswith(start) for text, start in zip(prompts, starts, strict=True))


def test_a_task_that_nobody_knows_is_named(tmp_path: Path) -> None:
    rows = _rows(task=["emotion"])
    error = _error(_configure(tmp_path, rows, data={"tasks": {"transcribe": {}}}))
    assert re.match(r"data\.tasks: .*\bdata\.train\b.*'emotion'.*\btranscribe\b", error)
    assert prepare(_configure(tmp_path, rows)).tasks == ["emotion", "transcribe"]


def _talk(number: int, said: str | None) -> dict[str, Any]:
    audio = str(CORPUS / SHORT[number]["audio"])
    spoken = {"audio": audio} if said is None else {"audio": audio, "text": said}
    return {
        "id": f"talk-{number}",
        "messages": [
            {"role": "user", "content": [spoken, {"audio": audio, "text": "again"}]},
            {"role": "assistant", "content": "Heard."},
        ],
    }


def _with_talks(tmp_path: Path, talks: list[dict[str, Any]], **sections: Any) -> Config:
    config = _configure(tmp_path, **sections)
    with Path(config.data.train[0]).open("a") as file:
        file.writelines(json.dumps(talk) + "\n" for talk in talks)
    return config


def test_a_conversation_takes_the_positions_of_all_its_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(_with_talks(tmp_path, [_talk(0, None)]))
    table = prepared.splits["train"].table.to_pylist()
    talk, alone = table[-1], table[0]
    assert talk["tokens"].count(AUDIO) == 2
    soft = int(prepared.lengths[0]) - (len(alone["tokens"]) - 2)
    assert int(prepared.lengths[-1]) == 2 * soft + len(talk["tokens"]) - 3


def test_a_teacher_needs_what_is_said(tmp_path: Path) -> None:
    sections = {"optim": {"kl_weight": 1.0}, "model": {"train": ["projector"]}}
    error = _error(_with_talks(tmp_path, [_talk(0, None)], **sections))
    assert error.startswith("optim.kl_weight: talk-0: ")
    prepared = prepare(_with_talks(tmp_path, [_talk(0, "hello")], **sections))
    row = prepared.splits["train"].table.to_pylist()[-1]
    assert [prepared.tokenizer.decode(ids) for ids in row["transcript_tokens"]] == [
        "hello",
        "again",
    ]


def test_ctc_learns_what_is_said_and_counts_the_rest(tmp_path: Path) -> None:
    config = _configure(tmp_path, _rows(task=["emotion", "transcribe", "emotion"]))
    with Path(config.data.train[0]).open("a") as file:
        file.writelines(json.dumps(_talk(n, said)) + "\n" for n, said in ((0, None), (1, "hello")))
    with_ctc = config.model_copy(
        update={"optim": config.optim.model_copy(update={"ctc_weight": 1.0})}
    )
    prepared = prepare(with_ctc)
    rows = prepared.splits["train"].table.to_pylist()
    decode = prepared.tokenizer.decode
    said = [
        [None if ids is None else decode(ids) for ids in row["transcript_tokens"]] for row in rows
    ]
    assert said[:2] == [[None], [rows[1]["text"]]]
    assert said[-2:] == [[None, "again"], ["hello", "again"]]
    assert any(f"from 2 of {len(rows)} utterances" in note for note in prepared.notes)
    assert prepare(config).splits["train"].table["transcript_tokens"].null_count == len(rows)


def test_ctc_without_a_transcript_is_an_error(tmp_path: Path) -> None:
    rows = [{**row, "task": "emotion"} for row in _rows()]
    error = _error(_configure(tmp_path, rows, optim={"ctc_weight": 1.0}))
    assert error.startswith("optim.ctc_weight: ")


def test_the_referee_checkpoint_is_a_language_model_too(
    tmp_path: Path, configure: Configure
) -> None:
    referee = Path(__file__).parents[1] / "model" / "nanochat"
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(load_file(referee / "model_000010.safetensors"), folder / "model_000010.pt")
    (folder / "meta_000010.json").write_bytes((referee / "meta_000010.json").read_bytes())
    (folder / "tokenizer.pkl").write_bytes((referee / "tokenizer.pkl").read_bytes())
    prepared = prepare(configure(model={"lm": f"nanochat:{folder}"}))
    assert prepared.model.lm.vocab_size == prepared.tokenizer.vocab_size == 1024


# --- rendering that may change between two starts of a run ----------------------------------------


def _family(tmp_path: Path, name: str) -> Path:
    folder = save_folder(tmp_path / name, tokenizer=False, vocab_size=1000)
    fast_tokenizer(FAMILIES[name]).save_pretrained(folder)
    return folder


def test_a_run_that_is_continued_keeps_the_date_it_began_with(
    configure: Configure, tmp_path: Path
) -> None:
    lm = _family(tmp_path, "llama-3")
    config = configure(model={"lm": f"hf:{lm}"})
    prepared = prepare(config)
    values = json.loads(prepared.tokenizer.to_json())
    assert values["rendering"]["moment"][:2] == "20"
    # A checkpoint of 40 days before.
    values["rendering"]["moment"] = "2026-01-02T10:00:00"
    step = tmp_path / "step"
    step.mkdir()
    (step / "config.yaml").write_text(config.to_yaml())
    (step / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False))
    pretrained = find_language_model(config)
    index = build_index(list(map(str, config.data.train)), allow_absolute=True)
    continued = choose_tokenizer(config, step, index, pretrained)
    assert json.loads(continued.to_json()) == values
    assert "02 Jan 2026" in continued.render_chat([{"role": "user", "content": "x"}])
    begun = choose_tokenizer(config, None, index, pretrained)
    assert "02 Jan 2026" not in begun.render_chat([{"role": "user", "content": "x"}])


def test_other_ids_of_the_same_length_are_another_run(tmp_path: Path) -> None:
    rows = _rows(task=["emotion"] * 8)
    tasks = [{"emotion": {"prompt": prompt}, "transcribe": {}} for prompt in ("qz", "zq")]
    first, second = (prepare(_configure(tmp_path, rows, data={"tasks": t})) for t in tasks)
    differ = {n for n, v in first.fingerprints.items() if second.fingerprints[n] != v}
    assert differ == {"tokens"}
    with pytest.raises(ConfigError, match=r"another tokens\b.*override_fingerprint tokens"):
        check_fingerprints(second, first.fingerprints)
    # Runs of older versions have no such fingerprint.
    older = {n: v for n, v in first.fingerprints.items() if n != "tokens"}
    assert check_fingerprints(second, older) == []


def test_a_template_without_a_system_role_names_the_row(
    configure: Configure, tmp_path: Path
) -> None:
    lm = _family(tmp_path, "gemma")
    config = configure(model={"lm": f"hf:{lm}"})
    told = _talk(0, None)
    told["messages"].insert(0, {"role": "system", "content": "Be brief."})
    with Path(config.data.train[0]).open("a") as file:
        file.write(json.dumps(told) + "\n")
    error = _error(config)
    assert re.match(r"data\.template: talk-0: .*System role not supported", error)


# --- length of answers ---------------------------------------------------------------------------


def test_answers_may_be_twice_as_long_as_those_of_training(tmp_path: Path) -> None:
    rows = _rows(text=[" ".join(["seven words are said in this one"] * 4)])
    prepared = prepare(_configure(tmp_path, rows))
    longest = max(len(prepared.tokenizer.encode(row["text"])) + 1 for row in rows)
    assert prepared.config.eval.max_new_tokens == 2 * longest > 16
    assert f"max_new_tokens: {2 * longest}" in prepared.config.to_yaml()
    brief = prepare(_configure(tmp_path, [{**row, "text": "a"} for row in rows]))
    assert brief.config.eval.max_new_tokens == 16
    given = prepare(_configure(tmp_path, rows, eval={"max_new_tokens": 7}))
    assert given.config.eval.max_new_tokens == 7
    assert any(note.startswith("eval.max_new_tokens: ") for note in given.notes)
    assert not any(note.startswith("eval.max_new_tokens") for note in prepared.notes)
