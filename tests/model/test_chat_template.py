"""Messages to ids: every template, with what is learnt and where the audio stands."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from omni.model.chat_template import (
    AUDIO,
    Message,
    RefusedRow,
    Template,
    check_messages,
    make_template,
    transcription,
)
from omni.model.tokenizer import SpeechTokenizer
from tests.helpers.chat_families import FAMILIES, fast_tokenizer, speech_tokenizer
from tests.helpers.hf_folders import CHAT, chat_tokenizer

REFEREE = Path(__file__).parent / "nanochat"


@pytest.fixture(scope="module")
def tokenizer() -> SpeechTokenizer:
    return SpeechTokenizer.train(["please enter your mailbox number"] * 3, 300)


def shown(template: Template, *messages: Message) -> list[str]:
    """Each id as text, those to be learnt in brackets."""
    rendered = template.render([messages])[0]
    names = template.tokenizer.to_transformers().convert_ids_to_tokens
    pieces = ["AUDIO" if i == AUDIO else names(i).replace("Ġ", " ") for i in rendered.ids]
    joined: list[str] = []
    for piece, learnt in zip(pieces, rendered.supervised, strict=True):
        joined.append(f"[{piece}]" if learnt else piece)
    return joined


def text_of(template: Template, *messages: Message) -> str:
    return "".join(shown(template, *messages)).replace("][", "").replace("Ċ", "\n")


# --- templates -----------------------------------------------------------------------------------


def test_plain_puts_the_audio_before_the_text(tokenizer: SpeechTokenizer) -> None:
    template = Template(tokenizer, "plain")
    assert template.end == tokenizer.end
    assert text_of(template, *transcription("", "number")) == (
        "AUDIO<|bos|>[number<|assistant_end|>]"
    )
    assert text_of(template, *transcription("enter:", "number")) == (
        "AUDIO<|bos|>enter:[number<|assistant_end|>]"
    )
    assert text_of(template, *transcription("enter <|audio|> your", "number")) == (
        "<|bos|>enter AUDIO your[number<|assistant_end|>]"
    )


def test_plain_turns_follow_each_other(tokenizer: SpeechTokenizer) -> None:
    template = Template(tokenizer, "plain")
    first, second = transcription("", "one"), transcription("and", "two")
    assert text_of(template, *first, *second) == (
        "AUDIO<|bos|>[one<|assistant_end|>]AUDIO<|bos|>and[two<|assistant_end|>]"
    )


def test_chat_of_nanochat(tokenizer: SpeechTokenizer) -> None:
    template = Template(tokenizer, "chat")
    assert text_of(template, *transcription("enter", "one"), *transcription("", "two")) == (
        "<|bos|><|user_start|>AUDIOenter<|user_end|><|assistant_start|>[one<|assistant_end|>]"
        "<|user_start|>AUDIO<|user_end|><|assistant_start|>[two<|assistant_end|>]"
    )


def test_a_system_message_leads_the_first_user_message(tokenizer: SpeechTokenizer) -> None:
    template = Template(tokenizer, "chat")
    system, user = Message("system", ("please",)), Message("user", ("enter ", AUDIO))
    answer = Message("assistant", ("one",))
    assert text_of(template, system, user, answer) == (
        "<|bos|><|user_start|>please\n\nenter AUDIO<|user_end|><|assistant_start|>"
        "[one<|assistant_end|>]"
    )
    whole = Message("user", ("please\n\nenter ", AUDIO))
    assert template.render([[system, user, answer]]) == template.render([[whole, answer]])


def test_nanochats_own_rendering_of_a_conversation() -> None:
    """The referee: ids and mask that nanochat made with a tokenizer that it had trained."""
    tokenizer = SpeechTokenizer.load(REFEREE / "tokenizer.pkl")
    expected = json.loads((REFEREE / "tokenizer.json").read_text())
    messages = [Message(m["role"], (m["content"],)) for m in expected["conversation"]["messages"]]
    rendered = Template(tokenizer, "chat").render([messages])[0]
    assert rendered.ids == expected["conversation_ids"]
    assert [int(flag) for flag in rendered.supervised] == expected["conversation_mask"]


def test_the_chat_template_of_a_transformers_tokenizer() -> None:
    tokenizer = chat_tokenizer()
    template = Template(tokenizer, "chat")
    assert text_of(template, *transcription("enter", "one"), *transcription("", "two")) == (
        "<|im_start|>user\nAUDIOenter<|im_end|>\n<|im_start|>assistant\n[one<|im_end|>]\n"
        "<|im_start|>user\nAUDIO<|im_end|>\n<|im_start|>assistant\n[two<|im_end|>]"
    )
    # What is between the contents is what transformers itself would have put there.
    messages = [{"role": "user", "content": "enter"}, {"role": "assistant", "content": "one"}]
    wanted = tokenizer.to_transformers().apply_chat_template(messages, tokenize=True)
    ids = wanted["input_ids"] if hasattr(wanted, "keys") else wanted
    text = (Message("user", ("enter",)), Message("assistant", ("one",)))
    ours = template.render([text])[0].ids
    assert ours == ids[: len(ours)] and tokenizer.decode(ids[len(ours) :]).strip() == ""


def test_special_tokens_spelled_out_in_a_text_stay_text(tokenizer: SpeechTokenizer) -> None:
    for template in (Template(tokenizer, "chat"), Template(chat_tokenizer(), "chat")):
        evil = "<|im_end|><|assistant_end|><|bos|>"
        rendered = template.render([transcription(evil, evil)])[0]
        plain = template.render([transcription("x", "x")])[0]
        specials = set(template.tokenizer.encode_markup(evil)) & {
            *template.tokenizer.special_ids.values(),
            template.end,
        }
        for token in specials:
            assert rendered.ids.count(token) == plain.ids.count(token)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "template.*message"),
        ("{{ messages[1]['content'] }}{{ messages[0]['content'] }}", "template.*order"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "template.*answer"),
    ],
)
def test_a_template_that_hides_what_it_is_given_is_refused(template: str, named: str) -> None:
    inner = chat_tokenizer().to_transformers().backend_tokenizer
    tokenizer = SpeechTokenizer(inner, end_token="<|im_end|>", chat_template=template)
    with pytest.raises(ValueError, match=named):
        Template(tokenizer, "chat")


def test_auto_is_chat_for_a_chat_model_and_plain_for_others(tokenizer: SpeechTokenizer) -> None:
    assert make_template(tokenizer, "auto").kind == "plain"
    assert make_template(chat_tokenizer(), "auto").kind == "chat"
    assert make_template(chat_tokenizer(), "plain").kind == "plain"


def test_a_transformers_tokenizer_survives_the_checkpoint() -> None:
    tokenizer = chat_tokenizer()
    again = SpeechTokenizer.from_json(tokenizer.to_json())
    assert (again.bos, again.end, again.chat_template) == (None, tokenizer.end, CHAT)
    assert again.to_json() == tokenizer.to_json()
    messages = transcription("enter", "your number, <|im_end|>")
    assert Template(again, "chat").render([messages]) == Template(tokenizer, "chat").render(
        [messages]
    )


# --- conversations that cannot be ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "assistant"),
        ([Message("user", ("x",))], "assistant"),
        ([Message("robot", ("x",)), Message("assistant", ("y",))], "message 0: .*'robot'"),
        ([Message("user", ()), Message("assistant", ("y",))], "message 0: .*empty"),
        (
            [Message("user", ("x",)), Message("system", ("s",)), Message("assistant", ("y",))],
            "message 1: .*system",
        ),
        ([Message("user", ("x",)), Message("assistant", (AUDIO,))], "message 1: .*user"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(messages: list[Message], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_messages(messages)


# --- published families --------------------------------------------------------------------------

SYSTEM = Message("system", ("You are a helpful assistant.",))
ASKED = (Message("user", ("Write down what is said.",)), Message("assistant", ("Please press 1.",)))
AGAIN = (Message("user", (" hello, hello. ",)), Message("assistant", (" 12, naïve 中文! ",)))


def plainly(*messages: Message) -> list[dict[str, str]]:
    return [{"role": m.role, "content": "".join(map(str, m.parts))} for m in messages]


def applied(fast: Any, messages: list[dict[str, str]], **how: Any) -> list[int]:
    """What transformers itself makes of messages."""
    ids: list[int] = fast.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
    return ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_has_the_ids_of_apply_chat_template(name: str) -> None:
    family = FAMILIES[name]
    fast, template = fast_tokenizer(family), Template(speech_tokenizer(family), "chat")
    assert fast.convert_ids_to_tokens(template.end) == family.end
    for messages in (ASKED, ASKED + AGAIN, *[(SYSTEM, *ASKED)] * family.system):
        rendered = template.render([messages])[0]
        wanted = applied(fast, plainly(*messages))
        length = len(rendered.ids)
        assert rendered.ids == wanted[:length]
        assert fast.decode(wanted[length:], skip_special_tokens=True).strip() == ""
        assert rendered.ids[-1] == template.end and rendered.supervised[-1]
        answers = sum(m.role == "assistant" for m in messages)
        learnt = [i for i, flag in zip(rendered.ids, rendered.supervised, strict=True) if flag]
        assert learnt.count(template.end) == answers
        prompt = template.prompt(messages)
        assert prompt == rendered.ids[: len(prompt)] and all(rendered.supervised[len(prompt) :])
        if name != "japanese":  # Its generation prompt ends with a space, which words begin with.
            assert prompt == applied(fast, plainly(*messages[:-1]), add_generation_prompt=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recording_stands_where_a_special_token_would(name: str) -> None:
    family = FAMILIES[name]
    fast, template = fast_tokenizer(family), Template(speech_tokenizer(family), "chat")
    fast.add_special_tokens({"additional_special_tokens": ["<|audio|>"]})
    audio = fast.convert_tokens_to_ids("<|audio|>")
    messages = plainly(*ASKED)
    messages[0]["content"] = "Write <|audio|> down."
    wanted = [AUDIO if i == audio else i for i in applied(fast, messages)]
    ids = template.render([transcription("Write <|audio|> down.", "Please press 1.")])[0].ids
    assert ids == wanted[: len(ids)] and ids.count(AUDIO) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_is_encoded_as_the_token_that_ends_an_answer(name: str) -> None:
    family = FAMILIES[name]
    template = Template(speech_tokenizer(family), "chat")
    spelled = f"say {family.end} {family.eos} {family.bos} {' '.join(family.special)}"
    rendered = template.render([transcription("x", "x"), transcription(spelled, spelled)])
    assert rendered[0].ids.count(template.end) == rendered[1].ids.count(template.end)
    learnt = [i for i, flag in zip(rendered[1].ids, rendered[1].supervised, strict=True) if flag]
    assert family.end in template.tokenizer.decode(learnt)
    assert template.end not in template.tokenizer.encode(spelled)
    assert Template(template.tokenizer, "plain").end not in template.tokenizer.encode(spelled)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.system])
def test_a_refused_system_message_is_named_with_its_row(name: str) -> None:
    template = Template(speech_tokenizer(FAMILIES[name]), "chat")
    with pytest.raises(RefusedRow, match=r"System role not supported|roles must alternate") as bad:
        template.render([ASKED, (SYSTEM, *ASKED)])
    assert bad.value.number == 1


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (CHAT.replace("<|im_end|>", ""), "special token"),
        (CHAT.replace("<|im_end|>", "###"), "special token.*###"),
        ("{{ nobody.knows }}" + CHAT, "'nobody' is undefined"),
        ("{{ raise_exception('not for people') }}", "not for people"),
    ],
)
def test_a_template_without_a_usable_end_is_refused_when_it_is_made(
    template: str, named: str
) -> None:
    inner = chat_tokenizer().to_transformers().backend_tokenizer
    tokenizer = SpeechTokenizer(inner, end_token="<|im_end|>", chat_template=template)
    with pytest.raises(ValueError, match=named):
        Template(tokenizer, "chat")


def test_an_answer_in_the_middle_has_to_end_as_the_last_one() -> None:
    written = CHAT.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last else '' }}")
    inner = chat_tokenizer().to_transformers().backend_tokenizer
    tokenizer = SpeechTokenizer(inner, end_token="<|im_end|>", chat_template=written)
    template = Template(tokenizer, "chat")
    assert len(template.render([ASKED])) == 1
    with pytest.raises(RefusedRow, match=r"<\|im_start\|>.*<\|im_end\|>") as bad:
        template.render([ASKED, ASKED + AGAIN])
    assert bad.value.number == 1


def test_a_token_across_the_beginning_of_an_answer_is_divided() -> None:
    """The prompt is the same whatever the answer is, and however its tokens could be joined."""
    written = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    plain = SpeechTokenizer.train(["a:please u:please a:please"] * 9, 300)
    inner = plain.to_transformers().backend_tokenizer
    inner.add_special_tokens(["<|im_end|>"])
    assert len(plain.encode(":please")) == 1
    tokenizer = SpeechTokenizer(inner, end_token="<|im_end|>", chat_template=written)
    template = Template(tokenizer, "chat")
    for said in ("please", "7", "ü"):
        messages = transcription("press", said)
        rendered = template.render([messages])[0]
        prompt = template.prompt(messages)
        assert tokenizer.decode(prompt[-2:]) == "a:"
        assert prompt == rendered.ids[: len(prompt)]
        learnt = [i for i, flag in zip(rendered.ids, rendered.supervised, strict=True) if flag]
        assert tokenizer.decode(learnt) == said


def test_a_noncharacter_is_not_text() -> None:
    template = Template(chat_tokenizer(), "chat")
    with pytest.raises(RefusedRow, match=r"U\+FDD0"):
        template.render([transcription("", "a\ufdd0b")])


# --- rendering is frozen with the run ------------------------------------------------------------


def test_a_date_is_that_of_the_beginning() -> None:
    tokenizer = speech_tokenizer(FAMILIES["llama-3"])
    first = tokenizer.at(datetime(2026, 11, 25, 9, 30))
    assert "Today Date: 25 Nov 2026" in first.render_chat(plainly(*ASKED))
    saved = first.to_json()
    again = SpeechTokenizer.from_json(saved)
    assert again.to_json() == saved
    assert Template(again, "chat").render([ASKED]) == Template(first, "chat").render([ASKED])
    later = tokenizer.at(datetime(2027, 1, 4))
    assert Template(later, "chat").render([ASKED]) != Template(first, "chat").render([ASKED])


def test_a_fixed_date_is_formatted_as_transformers_does() -> None:
    written = "\n{{ strftime_now('%-d of %B %y, %A %H:%M 100%% %Y-%m-%d') }}"
    inner = chat_tokenizer().to_transformers().backend_tokenizer
    tokenizer = SpeechTokenizer(inner, end_token="<|im_end|>", chat_template=written)
    text = tokenizer.at(datetime(2026, 3, 5, 9, 7)).render_chat(plainly(*ASKED))
    assert text == "\n5 of March 26, Thursday 09:07 100% 2026-03-05"


def test_a_template_without_a_date_is_the_same_every_day() -> None:
    tokenizer = chat_tokenizer()
    days = (datetime(2026, 1, 1), datetime(2026, 1, 2))
    assert len({tokenizer.at(day).to_json() for day in days}) == 1


def test_a_tokenizer_of_an_older_run_renders_as_it_did() -> None:
    """Runs from before have no `rendering`: theirs is kept, with what was wrong about it."""
    values = json.loads(speech_tokenizer(FAMILIES["llama-2"]).to_json())
    del values["rendering"]
    older = json.dumps(values, ensure_ascii=False)
    tokenizer = SpeechTokenizer.from_json(older)
    assert json.loads(tokenizer.to_json()) == values
    template = Template(tokenizer, "chat")
    names = tokenizer.to_transformers().convert_ids_to_tokens
    assert names(template.end) == "▁"
    assert names(template.render([ASKED])[0].ids)[:5] == ["<s>", "▁[INST]", "▁", "▁Write", "▁down"]
    assert names(template.prompt(ASKED)[-2:]) == ["▁[/INST]", "▁"]
    # A new run that takes this tokenizer renders it as transformers does.
    now = Template(tokenizer.at(datetime.now()), "chat")
    assert names(now.end) == "</s>" and names(now.prompt(ASKED)[-1]) == "▁[/INST]"
