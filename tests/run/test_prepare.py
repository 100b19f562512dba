"""What is wrong with a run's input is one clear error before anything starts."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import omni
from omni.audio.windows import encoder_frames
from omni.checkpoint.save import save_checkpoint
from omni.checkpoint.train_state import TrainState
from omni.config import Config, parse_config
from omni.errors import ConfigError
from omni.model.chat_template import AUDIO
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.sequences import sequence_positions
from omni.run.fingerprints import check_fingerprints
from omni.run.prepare import Prepared, prepare
from tests.helpers.hf_folders import save_folder

CORPUS = Path(omni.__file__).parent / "assets" / "prompts-en"
TRAIN = [json.loads(line) for line in (CORPUS / "train.jsonl").read_text().splitlines()]
# Twelve clips of up to two seconds, with different sentences.
SHORT = [row for row in TRAIN if row["duration"] < 2][:12]
LONG = max(TRAIN, key=lambda row: row["duration"])

Rows = list[dict[str, Any]]
Configure = Callable[..., Config]


def _write(path: Path, rows: Rows) -> str:
    lines = [json.dumps({**row, "audio": str(CORPUS / row["audio"])}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def _configure(
    folder: Path, rows: Rows = SHORT[:8], held: Rows = SHORT[8:], **sections: dict[str, Any]
) -> Config:
    """A small configuration over embedded clips in `folder`; `sections` set single fields."""
    values: dict[str, dict[str, Any]] = {
        "run": {"storage": str(folder / "runs")},
        "data": {
            "train": _write(folder / "train.jsonl", rows),
            "dev": _write(folder / "dev.jsonl", held),
            "allow_absolute": True,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "optim": {"bin_positions": 128, "steps": 3, "warmup_steps": 1},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return parse_config(values)


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    return functools.partial(_configure, tmp_path)


def _error(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    return str(caught.value)


# -- what is prepared --------------------------------------------------------------------------


def test_a_run_is_decided_before_it_starts(configure: Configure) -> None:
    config = configure(data={"prompt": "Write:", "test": ["embedded:test"]})
    prepared = prepare(config)
    assert {name: split.table.num_rows for name, split in prepared.splits.items()} == {
        "train": 8,
        "dev": 4,
        "test": 32,
    }
    assert prepared.rejects == [] and prepared.resume is None
    train = prepared.splits["train"]
    assert train.plan.steps == 3 and train.plan.bins_per_step == 2
    assert prepared.splits["dev"].plan.epoch_ends.tolist() == [prepared.splits["dev"].plan.bins]
    row = train.table.to_pylist()[0]
    prompt, text = prepared.tokenizer.encode_batch(["Write:", row["text"]])
    assert row["tokens"] == [AUDIO, prepared.tokenizer.bos, *prompt, *text, prepared.tokenizer.end]
    assert row["supervised"] == [False] * (2 + len(prompt)) + [True] * (len(text) + 1)
    assert train.table.schema.field("tokens").type == pa.large_list(pa.int32())
    assert prepared.tasks == ["transcribe"] and row["task_number"] == 0
    assert prepared.model.lm.vocab_size == prepared.tokenizer.vocab_size <= 300
    assert prepared.model.feature_dim == prepared.encoder.d_model == 384
    assert prepared.encoder.longest_seconds == pytest.approx(2.0, abs=0.5)


def _types(found: pa.DataType) -> Iterator[pa.DataType]:
    yield found
    for number in range(found.num_fields):
        yield from _types(found.field(number).type)


def test_tables_of_a_run_have_one_chunk_and_offsets_of_64_bits(
    configure: Configure, tmp_path: Path
) -> None:
    """30 million rows overflow 32 bits; of many chunks, each bin would copy whole columns."""
    other = _write(tmp_path / "other.jsonl", SHORT[4:8])
    single = _write(tmp_path / "single.jsonl", SHORT[:4])
    for train in (
        [single, other],
        [{"source": single, "weight": 2.0}, {"source": other, "language": "en"}],
    ):
        prepared = prepare(configure(data={"train": train, "case": "lower"}))
        for split in prepared.splits.values():
            for field in split.table.schema:
                assert split.table[field.name].num_chunks == 1, field.name
                for part in _types(field.type):
                    small = pa.types.is_string(part) or pa.types.is_list(part)
                    assert not small and not pa.types.is_binary(part), field


def _needs(prepared: Prepared) -> list[int]:
    """Positions of each training utterance."""
    return [
        sequence_positions([encoder_frames(row["samples"], "trim")], len(row["tokens"]), 4)
        for row in prepared.splits["train"].table.to_pylist()
    ]


def test_every_bin_holds_what_the_stream_will_make_of_it(configure: Configure) -> None:
    prepared = prepare(configure(data={"prompt": "Write:"}))
    needs, plan = _needs(prepared), prepared.splits["train"].plan
    for number in range(plan.bins):
        assert 0 < sum(needs[i] for i in plan.bin(number).tolist()) <= 128


def test_measurements_are_kept_beside_the_features(configure: Configure) -> None:
    config = configure()
    prepare(config)
    assert config.cache_dir is not None
    assert len(list(config.cache_dir.glob("index-*.parquet"))) == 2
    off = configure(data={"cache": None}, run={"storage": config.run.storage + "-off"})
    prepare(off)
    assert not Path(off.run.storage).exists()


def test_only_so_many_held_out_utterances_are_planned(configure: Configure) -> None:
    prepared = prepare(configure(eval={"max_utterances": 2}))
    assert sorted(prepared.splits["dev"].plan.members.tolist()) == [0, 1]


def test_a_given_tokenizer_is_used(configure: Configure, tmp_path: Path) -> None:
    SpeechTokenizer.train(["another corpus"] * 3, 270).save(tmp_path / "tokenizer.json")
    config = configure(tokenizer={"path": str(tmp_path / "tokenizer.json"), "vocab_size": 999})
    prepared = prepare(config)
    assert prepared.tokenizer.vocab_size == prepared.model.lm.vocab_size == 270


# -- rejects -----------------------------------------------------------------------------------


def test_an_utterance_longer_than_a_bin_becomes_a_reject(configure: Configure) -> None:
    config = configure(rows=[*SHORT[:4], LONG, *SHORT[4:8]], data={"max_rejects": 0.2})
    prepared = prepare(config)
    [reject] = prepared.rejects
    assert reject.id == LONG["id"] and reject.reason == "longer than a bin"
    assert f"{LONG['duration']:.1f} s" in reject.detail
    assert re.search(r"\boptim\.bin_positions\b.*\b128\b", reject.detail)
    plan = prepared.splits["train"].plan
    assert 4 not in plan.members
    assert set(plan.members.tolist()) == {0, 1, 2, 3, 5, 6, 7, 8}


def test_an_utterance_may_fill_a_bin(configure: Configure) -> None:
    configure = functools.partial(configure, held=SHORT[:1])
    needs = _needs(prepare(configure()))
    longest = max(needs)
    assert prepare(configure(optim={"bin_positions": longest})).rejects == []
    narrow = configure(optim={"bin_positions": longest - 1}, data={"max_rejects": 1.0})
    assert len(prepare(narrow).rejects) == needs.count(longest)


def test_rows_that_the_index_leaves_out_are_rejects_of_every_split(configure: Configure) -> None:
    gone = {**SHORT[0], "id": "gone", "audio": "nowhere.wav"}
    config = configure(
        rows=[gone, *SHORT[:7]], held=[{**gone, "id": "also"}, SHORT[8]], data={"max_rejects": 0.2}
    )
    prepared = prepare(config)
    assert [(r.id, r.reason) for r in prepared.rejects] == [
        ("gone", "missing"),
        ("also", "missing"),
    ]


@pytest.mark.parametrize("allowed, stops", [(0.25, False), (0.24, True), (0.0, True)])
def test_more_rejects_than_allowed_stop_the_run(
    configure: Configure, allowed: float, stops: bool
) -> None:
    """One clip is missing and one is too long: two rows of eight."""
    gone = {**SHORT[0], "id": "gone", "audio": "nowhere.wav"}
    config = configure(rows=[*SHORT[:3], gone, *SHORT[3:6], LONG], data={"max_rejects": allowed})
    if not stops:
        assert len(prepare(config).rejects) == 2
        return
    message = _error(config)
    assert re.match(r"data\.max_rejects: .*\b2 of 8\b.*\bdata\.train\b", message)
    assert re.search(rf"\b{allowed:.0%}.*\bgone: missing: .*\bnowhere\.wav\b", message)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_missing_manifest(configure: Configure, split: str) -> None:
    message = _error(configure(data={split: ["nowhere.jsonl"]}))
    assert message.startswith("data: nowhere.jsonl: ")


def test_a_manifest_whose_rows_are_all_bad(configure: Configure) -> None:
    rows = [{**row, "audio": "nowhere.wav"} for row in SHORT[:3]]
    message = _error(configure(rows=rows))
    assert re.match(r"data: .*\b3\b.*\bmissing: .*\bnowhere\.wav\b", message)


def test_no_dev_manifest(configure: Configure) -> None:
    assert _error(configure(data={"dev": []})).startswith("data.dev: ")


def test_no_training_manifest(configure: Configure) -> None:
    assert _error(configure(data={"train": []})).startswith("data.train: ")


def test_a_bin_that_holds_no_utterance(configure: Configure) -> None:
    config = configure(optim={"bin_positions": 4}, data={"max_rejects": 1.0})
    assert re.match(r"data\.train: .*\boptim\.bin_positions\b", _error(config))
    strict = configure(optim={"bin_positions": 4})
    assert re.match(r"data\.max_rejects: .*\b8 of 8\b.*\bdata\.train\b", _error(strict))


def test_a_bin_that_holds_no_dev_utterance(configure: Configure) -> None:
    message = _error(configure(held=[LONG]))
    assert re.match(r"data\.dev: .*\boptim\.bin_positions\b", message)


@pytest.mark.parametrize("content", [None, "not JSON", "{}", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_read(
    configure: Configure, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    assert _error(configure(tokenizer={"path": str(path)})).startswith(f"tokenizer.path: {path}: ")


def test_a_tokenizer_without_the_special_tokens(configure: Configure, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    document = json.loads(SpeechTokenizer.train(["a"], 265).to_json())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<|bos|>"]
    path.write_text(json.dumps(document))
    message = _error(configure(tokenizer={"path": str(path)}))
    assert message.startswith(f"tokenizer.path: {path}: ") and "<|bos|>" in message


def test_an_encoder_folder_that_holds_none(configure: Configure, tmp_path: Path) -> None:
    for weights in (str(tmp_path / "nowhere"), str(CORPUS)):
        message = _error(configure(encoder={"weights": weights}))
        assert message.startswith("encoder.weights: ") and weights in message


def test_an_encoder_folder_of_another_model(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    message = _error(configure(encoder={"weights": str(tmp_path)}))
    assert message.startswith("encoder.weights: ") and "'bert'" in message


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors"])
def test_an_encoder_folder_with_a_damaged_file(
    configure: Configure, tmp_path: Path, damaged: str
) -> None:
    folder = tmp_path / "whisper"
    shutil.copytree(CORPUS.parent / "whisper-tiny.en", folder)
    path = folder / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert _error(configure(encoder={"weights": str(folder)})).startswith("encoder.weights: ")


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"n_embd": 30, "n_head": 4}, r"\bn_embd 30\b.*\bn_head 4\b"),
        ({"n_head": 2, "n_kv_head": 4}, r"\bn_head 2\b.*\bn_kv_head 4\b"),
        ({"window_pattern": "SX"}, r"\bwindow_pattern 'SX'"),
    ],
)
def test_a_model_that_cannot_be(configure: Configure, fields: dict[str, Any], named: str) -> None:
    assert re.match(f"model: .*{named}", _error(configure(model=fields)))


# -- fingerprints ------------------------------------------------------------------------------


def _changed(prepared: Prepared, saved: Prepared) -> str:
    """What `check_fingerprints` says has changed."""
    with pytest.raises(ConfigError) as caught:
        check_fingerprints(prepared, saved.fingerprints)
    message = str(caught.value)
    assert message.startswith(f"run.name: {prepared.config.run_dir} ")
    names = ", ".join(re.findall(r"--run\.override_fingerprint (\S+)", message))
    assert f" {names};" in message, "what changed is named, and with the flags that allow it"
    return names


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The run as it was started, elsewhere."""
    return prepare(_configure(tmp_path_factory.mktemp("first")))


def test_the_same_configuration_may_continue(configure: Configure, first: Prepared) -> None:
    again = prepare(configure())
    assert again.fingerprints == first.fingerprints
    check_fingerprints(again, first.fingerprints)


def test_what_does_not_change_the_run_may_change(configure: Configure, first: Prepared) -> None:
    other = prepare(
        configure(
            optim={"steps": 50, "lr": 0.5, "bins_per_block": 2},
            train={"workers": 3},
            eval={"every": 7},
            run={"name": "another"},
            data={"loaders": 4, "cache": None},
        )
    )
    check_fingerprints(other, first.fingerprints)


@pytest.mark.parametrize(
    "sections, names",
    [
        ({"model": {"n_embd": 64}}, "model"),
        ({"model": {"stack": 3}}, "plan, model"),
        ({"run": {"seed": 1}}, "plan"),
        ({"optim": {"bins_per_step": 3}}, "plan"),
        ({"encoder": {"margin_seconds": 0.25}}, "encoder"),
        ({"encoder": {"mode": "full"}, "optim": {"bin_positions": 500}}, "plan, encoder"),
        ({"tokenizer": {"vocab_size": 280}}, "tokenizer, plan, model"),
    ],
)
def test_what_changes_the_run_is_named(
    configure: Configure, first: Prepared, sections: dict[str, Any], names: str
) -> None:
    assert _changed(prepare(configure(**sections)), first) == names


def test_other_training_data_is_named(configure: Configure, first: Prepared) -> None:
    fewer = prepare(configure(rows=SHORT[:7]))
    assert _changed(fewer, first).startswith("data.train, tokenizer, plan")
    check_fingerprints(prepare(configure(held=SHORT[9:])), first.fingerprints)


def test_a_run_continues_with_its_own_tokenizer(configure: Configure, first: Prepared) -> None:
    """New data does not rename the tokens that the model knows."""
    path = save_checkpoint(
        configure().run_dir / "checkpoints",
        state=TrainState(step=1, fingerprints=first.fingerprints),
        model=first.model,
        encoder=first.encoder.to_dict(),
        weights={},
        optimizer={},
        config_yaml=first.config.to_yaml(),
        tokenizer_json=first.tokenizer.to_json(),
    )
    other = prepare(configure(rows=SHORT[:7]))
    assert other.resume is not None and other.resume.path == path
    assert other.tokenizer.to_json() == first.tokenizer.to_json()
    assert _changed(other, first) == "data.train, plan"


# -- notes -------------------------------------------------------------------------------------


def _notes(prepared: Prepared) -> list[str]:
    """Leave out the note about this machine."""
    return [note for note in prepared.notes if not note.startswith("train.precision")]


def test_held_out_sentences_that_were_trained_on_are_counted(configure: Configure) -> None:
    shouted = {**SHORT[9], "text": SHORT[1]["text"].upper() + " !"}
    prepared = prepare(configure(held=[SHORT[0], shouted, SHORT[10]]))
    [note] = _notes(prepared)
    assert note.startswith("2 of 3 dev ")
    assert _notes(prepare(configure())) == []


def test_the_embedded_splits_share_no_sentence() -> None:
    config = parse_config({"data": {"test": "embedded:test", "cache": None}})
    assert _notes(prepare(config)) == []


@pytest.mark.parametrize(("warmup", "noted"), [(4, False), (5, True), (100, True)])
def test_a_warm_up_longer_than_the_run_is_noted(
    configure: Configure, warmup: int, noted: bool
) -> None:
    config = configure(optim={"steps": 5, "warmup_steps": warmup})
    assert any("optim.warmup_steps" in note for note in _notes(prepare(config))) is noted


def test_formats_that_the_model_cannot_be_exported_to_are_noted(
    configure: Configure, tmp_path: Path
) -> None:
    def notes(**model: Any) -> list[str]:
        prepared = prepare(configure(model=model))
        return [note for note in prepared.notes if note.startswith("omni export")]

    assert notes() == [], "what is trained by default has a format"
    lm = save_folder(tmp_path / "lm")
    shape = {"n_layer": None, "n_head": None, "n_embd": None}
    [note] = notes(lm=f"hf:{lm}", train=["projector"], **shape)
    assert "--to transformers takes" in note and "encoder.mode full" in note
