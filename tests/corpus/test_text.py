"""What is done to text before it is learnt, and mixtures of corpora."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni.config import SourceConfig, load_config, parse_config
from omni.corpus.index import Index, build_index
from omni.corpus.manifest import ManifestError
from omni.corpus.messages import messages_of
from omni.corpus.mixture import build_mixture
from omni.corpus.text import TextPolicy, apply_policy, join
from omni.errors import ConfigError
from omni.model.chat_template import AUDIO, Template
from omni.model.tokenizer import SpeechTokenizer

STRIP = TextPolicy(punctuation="strip")

TEXTS = {
    "zh": "你好，世界！我们用 GitHub 写代码。",
    "ru": "Съешь ещё этих мягких французских булок — да выпей чаю!",
    "fr": "Dès Noël, où un zéphyr haï me vêt ; « l’œuf » coûte 2,50 €…",
    "th": "สวัสดีครับ ไม่เป็นไร",
    "hi": "हिन्दी में बात करो।",
    "ja": "コーヒーを２つください。",
    "ar": "كيف الحال؟",
}


# -- the policy of a text ----------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS.values())
def test_text_that_is_nfc_is_left_alone_by_default(text: str) -> None:
    assert unicodedata.is_normalized("NFC", text)
    assert TextPolicy.of(parse_config({}).data.model_dump()).transcript(text) == text


@pytest.mark.parametrize(
    "form, text, expected",
    [
        ("NFC", "Cafe\u0301 и\u0306", "Café й"),
        ("NFC", "２つ ﬁn", "２つ ﬁn"),
        ("NFKC", "２つ ﬁn ｶﾞ", "2つ fin ガ"),
        ("none", "Cafe\u0301", "Cafe\u0301"),
    ],
)
def test_unicode_forms(form: Any, text: str, expected: str) -> None:
    policy = TextPolicy(unicode=form)
    assert policy.transcript(text) == policy.form(text) == expected


@pytest.mark.parametrize(
    "case, language, text, expected",
    [
        ("lower", "fr", "L'ÉTÉ", "l'été"),
        ("upper", "de", "Straße", "STRASSE"),
        ("lower", "el", "ΟΔΟΣ", "οδος".replace("σ", "ς")[:-1] + "ς"),
        ("lower", "tr", "IRAK İzmir", "ırak izmir"),
        ("upper", "tr-TR", "ırak izmir", "IRAK İZMİR"),
        ("lower", None, "IRAK", "irak"),
        ("upper", "zh", "我用git", "我用GIT"),
        ("keep", "ru", "Ёж", "Ёж"),
    ],
)
def test_case(case: Any, language: str | None, text: str, expected: str) -> None:
    assert TextPolicy(case=case).transcript(text, language) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Don't stop — we're off!", "Don't stop we're off"),
        ("« L’œuf coûte 2,50 €, dit-il… »", "L’œuf coûte 2,50 € dit-il"),
        ("'Tis the boys' well-known 'trick'.", "Tis the boys well-known trick"),
        ("At 10:30, 1,000 of 2.5 % paid $3.", "At 10:30 1,000 of 2.5 % paid $3"),
        ("¿Qué tal? ¡Bien!", "Qué tal Bien"),
        ("你好，世界！", "你好世界"),
        ("用（GitHub）写。", "用 GitHub 写"),
        ("「コーヒー」を、２つ。", "コーヒーを ２つ"),
        ("col·lega; AT&T @ 5", "col·lega AT&T @ 5"),
        ("हिन्दी में बात करो।", "हिन्दी में बात करो"),
        ("كيف الحال؟", "كيف الحال"),
        ("one...two;three", "one two three"),
        ("?!", ""),
    ],
)
def test_punctuation_that_is_not_spoken_is_stripped(text: str, expected: str) -> None:
    assert STRIP.transcript(text) == expected
    assert STRIP.transcript(expected) == expected


def test_a_policy_applied_twice_is_applied_once() -> None:
    policy = TextPolicy("NFKC", "lower", "strip")
    for language, text in TEXTS.items():
        once = policy.transcript(text, language)
        assert policy.transcript(once, language) == once


@pytest.mark.parametrize(
    "prompt, language, expected",
    [
        ("", "fr", "lang:fr"),
        ("Write it down.", "zh_TW", "Write it down. lang:zh-tw"),
        ("Write it down.", None, "Write it down."),
        ("<|audio|> What?", "ru", "<|audio|> What? lang:ru"),
    ],
)
def test_language_tags(prompt: str, language: str | None, expected: str) -> None:
    assert TextPolicy(language_tag=True).prompt(prompt, language) == expected
    assert TextPolicy().prompt(prompt, language) == prompt


def test_a_language_that_is_no_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'<\|audio\|>'"):
        TextPolicy(language_tag=True).prompt("", "<|audio|>")


def test_pieces_of_a_long_recording_are_joined_as_their_script_is_written() -> None:
    assert join(["one", "two"]) == "one two"
    assert join(["你好。", "世界"]) == "你好。世界"
    assert join(["привет,", "мир", "你好"]) == "привет, мир你好"
    assert join(["สวัสดี", "ครับ"]) == "สวัสดีครับ"
    assert join([]) == "" and join(["a"]) == "a"


def test_checkpoints_from_before_policies_have_none() -> None:
    assert TextPolicy.of({"train": ["a"], "prompt": ""}) == TextPolicy()


# -- the policy of an index --------------------------------------------------------------------


@pytest.fixture
def spoken(record: Callable[..., Path], manifest: Callable[..., str]) -> Callable[..., str]:
    """A manifest of these texts, each with a second of a tone."""

    def write(*rows: dict[str, Any], name: str = "corpus.jsonl") -> str:
        stem = name.removesuffix(".jsonl")
        files = [record(f"{stem}-{i}.wav", hertz=300 + 50 * i) for i in range(len(rows))]
        described = [
            {"id": f"{stem}-{i}", "audio": file.name, **row}
            for i, (file, row) in enumerate(zip(files, rows, strict=True))
        ]
        return manifest(*described, name=name)

    return write


def test_texts_of_all_scripts_come_back_from_their_tokens(spoken: Callable[..., str]) -> None:
    rows = [{"text": text, "language": language} for language, text in TEXTS.items()]
    index = apply_policy(build_index([spoken(*rows)]), TextPolicy("NFC", language_tag=True))
    said = index.table["text"].to_pylist()
    assert said == list(TEXTS.values())
    template = Template(SpeechTokenizer.train(said, 400))
    rendered = template.render([messages_of(row) for row in index.table.to_pylist()])
    for (language, text), sequence in zip(TEXTS.items(), rendered, strict=True):
        learnt = [i for i, s in zip(sequence.ids, sequence.supervised, strict=True) if s]
        given = [
            i
            for i, s in zip(sequence.ids, sequence.supervised, strict=True)
            if not s and i != AUDIO
        ]
        assert template.tokenizer.decode(learnt) == text
        assert template.tokenizer.decode(given) == f"lang:{language}"


def test_a_policy_that_changes_nothing_leaves_the_very_index(spoken: Callable[..., str]) -> None:
    index = build_index([spoken({"text": "Hello."}, {"text": "Été"})])
    assert apply_policy(index, TextPolicy("NFC")) is index
    assert apply_policy(index, TextPolicy("none")) is index


def test_fingerprints_follow_the_policy(spoken: Callable[..., str]) -> None:
    rows = [{"text": "Hello, Été!", "language": "fr"}, {"text": "Cafe\u0301", "language": "fr"}]
    index = build_index([spoken(*rows)])
    policies = [
        TextPolicy("none"),
        TextPolicy("NFC"),
        TextPolicy("NFC", case="lower"),
        TextPolicy("NFC", punctuation="strip"),
        TextPolicy("NFC", language_tag=True),
    ]
    made = [apply_policy(index, policy).fingerprint for policy in policies]
    assert len(set(made)) == len(policies) and made[0] == index.fingerprint


def test_rows_without_text_left_become_rejects(spoken: Callable[..., str]) -> None:
    index = build_index([spoken({"text": "?!"}, {"text": "Yes."})])
    kept = apply_policy(index, STRIP)
    assert kept.table["text"].to_pylist() == ["Yes"]
    [reject] = kept.rejects
    assert (reject.id, reject.reason) == ("corpus-0", "empty text")
    assert "data.punctuation" in reject.detail


def test_answers_of_other_tasks_keep_case_and_punctuation(spoken: Callable[..., str]) -> None:
    rows = [
        {"text": "Yes, Ann.", "task": "transcribe"},
        {"text": "Yes, Ann.", "task": "answer", "language": "en"},
    ]
    prompts = {"answer": "What is said?"}
    policy = TextPolicy("NFC", "lower", "strip", language="fr", language_tag=True, prompts=prompts)
    table = apply_policy(build_index([spoken(*rows)], prompt=""), policy).table
    assert table["text"].to_pylist() == ["yes ann", "Yes, Ann."]
    assert table["prompt"].to_pylist() == ["lang:fr", "What is said? lang:en"]
    assert table["language"].to_pylist() == ["fr", "en"]


def test_conversations_get_the_unicode_form_alone(
    record: Callable[..., Path], manifest: Callable[..., str]
) -> None:
    messages = [
        {"role": "user", "content": [{"audio": record("a.wav").name, "text": "E\u0301"}]},
        {"role": "assistant", "content": 'Say "Cafe\u0301", Ann.'},
    ]
    index = build_index([manifest({"id": "t", "messages": messages})])
    changed = apply_policy(index, TextPolicy("NFKC", "lower", "strip", language_tag=True))
    [row] = changed.table.to_pylist()
    assert row["text"] == messages_of(row)[-1].parts[0] == 'Say "Café", Ann.'
    assert row["audios"][0]["text"] == "É"


# -- mixtures ----------------------------------------------------------------------------------


def _mix(*sources: Any, **how: Any) -> Index:
    config = parse_config({"data": {"train": list(sources)}})
    return build_mixture(config.data.train, **how)


def test_plain_paths_are_the_index_of_always(spoken: Callable[..., str]) -> None:
    one, two = spoken({"text": "A"}, name="a.jsonl"), spoken({"text": "B"}, name="b.jsonl")
    mixed = _mix(one, two, prompt="Write.")
    assert mixed == build_index([one, two], prompt="Write.") and mixed.weights is None
    assert _mix({"source": one}, two, prompt="Write.").fingerprint == mixed.fingerprint
    assert _mix({"source": one}, two).weights is None


def test_each_source_has_its_weight_prompt_and_language(spoken: Callable[..., str]) -> None:
    one = spoken({"text": "A", "language": "en"}, {"text": "B"}, name="a.jsonl")
    two = spoken({"text": "C", "prompt": "Own."}, {"text": "D"}, name="b.jsonl")
    french = {"source": two, "weight": 2.5, "prompt": "En français.", "language": "fr"}
    mixed = _mix(one, french, prompt="Write.")
    rows = mixed.table.to_pylist()
    assert [row["text"] for row in rows] == ["A", "B", "C", "D"]
    assert [row["prompt"] for row in rows] == ["Write.", "Write.", "Own.", "En français."]
    assert [row["language"] for row in rows] == ["en", None, "fr", "fr"]
    assert mixed.weights is not None and mixed.weights.tolist() == [1, 1, 2.5, 2.5]
    kept = apply_policy(mixed, TextPolicy(language="en"))
    assert kept.weights is not None and kept.weights.tolist() == [1, 1, 2.5, 2.5]


def test_rejects_take_their_weights_along(spoken: Callable[..., str]) -> None:
    one = spoken({"text": "?"}, {"text": "B"}, name="a.jsonl")
    two = spoken({"text": "C"}, {"text": "!"}, name="b.jsonl")
    kept = apply_policy(_mix(one, {"source": two, "weight": 3}), STRIP)
    assert kept.weights is not None and kept.weights.tolist() == [1, 3]


def test_ids_are_different_in_a_mixture_too(spoken: Callable[..., str]) -> None:
    path = spoken({"text": "A"})
    with pytest.raises(ManifestError, match="'corpus-0'"):
        _mix(path, {"source": path, "weight": 2})


@pytest.mark.parametrize(
    "entry, named",
    [
        ({"source": "a", "wieght": 1}, r"data\.train\.0\.wieght: .*\bweight\b"),
        ({"weight": 1}, r"data\.train\.0\.source: "),
        ({"source": "a", "weight": 0}, r"data\.train\.0\.weight: .*\b0\b"),
        ({"source": "a", "language": "<fr>"}, r"data\.train\.0\.language: .*<fr>"),
        (3, r"data\.train\.0: .*\b3\b"),
    ],
)
def test_wrong_entries_are_named(entry: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({"data": {"train": [entry]}})


def test_mixtures_survive_the_config_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: [a.jsonl, {source: b.jsonl, weight: 2}]}")
    config = load_config(path)
    assert config.data.train == ["a.jsonl", SourceConfig(source="b.jsonl", weight=2)]
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert load_config(path, ["--data.train", "c.jsonl"]).data.train == ["c.jsonl"]
    given = ["--data.train", "[a.jsonl, {source: b.jsonl, weight: 2}]"]
    assert load_config(None, given).data.train == config.data.train
