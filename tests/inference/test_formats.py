"""Transcripts in the formats of subtitles and of OpenAI's interface."""

from __future__ import annotations

import pytest

from omni.inference.formats import TIMED, render
from omni.serve.answers import RefusedRequest, Span
from omni.serve.chat import parse_chat
from omni.serve.settings import ServeSettings

pytestmark = pytest.mark.unit
SPANS = [Span(0.0, 1.5, "Hello <you>"), Span(3725.25, 2.0, "& goodbye.", cut=True)]
AUDIO = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}


def test_subtitles_have_hours_and_milliseconds() -> None:
    srt, vtt = (render([*SPANS, Span(4000.0, 1.0, "")], form, "en", 4002.0) for form in TIMED[:2])
    assert srt == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello <you>\n\n"
        "2\n01:02:05,250 --> 01:02:07,250\n& goodbye.\n\n"
    )
    assert str(vtt).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello &lt;you&gt;\n\n")
    assert render([], "srt", "en", 1.0) == "" and render([], "vtt", "en", 1.0) == "WEBVTT\n\n"
    assert "one two\n\n" in str(render([Span(0.0, 1.0, "one\n\ntwo")], "srt", "en", 1.0))


def test_json_says_that_a_text_is_cut() -> None:
    assert render(SPANS[:1], "json", "en", 2.0) == {"text": "Hello <you>"}
    verbose = render(SPANS, "verbose_json", "de", 4002.0)
    assert isinstance(verbose, dict)
    assert (verbose["text"], verbose["duration"]) == ("Hello <you> & goodbye.", 4002.0)
    assert verbose["language"] == "de"
    assert verbose["cut"] and [segment.get("cut") for segment in verbose["segments"]] == [
        None,
        True,
    ]
    assert verbose["segments"][1]["end"] == 3727.25


def test_a_conversation_keeps_the_order_of_its_parts() -> None:
    content = [{"type": "text", "text": "First"}, AUDIO, {"type": "text", "text": "then"}, AUDIO]
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ],
        "max_completion_tokens": 7,
    }
    asked = parse_chat(body)
    assert [m.role for m in asked.messages] == ["system", "user"]
    assert [type(part) for part in asked.messages[1].parts] == [str, int, str, int]
    assert asked.recordings == [b"RIFF", b"RIFF"]
    assert (asked.limit, asked.stream) == (7, False)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{**AUDIO, "input_audio": {}}]}]}, "messages"),
        ({"temperature": 2.5}, "temperature"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": 3}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], field: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [AUDIO]}]}
    parse_chat(body)
    with pytest.raises(RefusedRequest) as raised:
        parse_chat({**body, **changes})
    assert (raised.value.field, raised.value.status) == (field, 400)


def test_keys_are_compared_whole() -> None:
    settings = ServeSettings("runs/mine", keys=("secret", "other"))
    assert settings.admits("Bearer secret") and settings.admits("bearer other")
    for wrong in ("", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "secret"):
        assert not settings.admits(wrong)
    assert ServeSettings("runs/mine").admits("")


@pytest.mark.parametrize("path", ["runs/mine", "runs/mine/checkpoints/best", "/a/runs/mine/"])
def test_the_model_is_named_after_its_run(path: str) -> None:
    assert ServeSettings(path).model == "mine"
