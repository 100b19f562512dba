"""The terminal shows rows of metrics.jsonl and events.jsonl, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omni.errors import printable
from omni.metrics.listening import listening_note
from omni.run.console import LiveView, describe_event

TRAIN: dict[str, Any] = {
    "kind": "train",
    "step": 20,
    "steps": 100,
    "seconds": 40.0,
    "loss": 2.5,
    "ctc": 1.25,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "audio_seconds_per_second": 123.4,
    "tokens_per_second": 456.7,
    "data_wait_fraction": 0.25,
    "limit": "encoder",
}
EVAL: dict[str, Any] = {
    "kind": "eval",
    "step": 20,
    "dev_loss": 1.5,
    "dev_accuracy": 0.75,
    "shuffled_audio_gap": 0.33,
    "dev_wer": 0.123,
    "examples": [{"reference": "what [bold]was[/] said", "hypothesis": "two\nlines"}],
}


def _shown(capsys: pytest.CaptureFixture[str], *rows: dict[str, Any]) -> list[str]:
    LiveView().rows(rows)
    return capsys.readouterr().out.splitlines()


def test_a_step_shows_loss_rates_limit_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    [line] = _shown(capsys, TRAIN)
    for figure in ("20/100", "loss 2.500", "1.0e-03", "123 audio-s/s", "457 tok/s", "25%"):
        assert figure in line
    assert "encoder" in line
    assert line.endswith("2:40"), "80 steps of 2 s"


def test_an_evaluation_shows_the_wer_of_each_decoder_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    [line, *_] = _shown(capsys, {**EVAL, "dev_lm_wer": 0.665, "dev_ctc_wer": 0.5})
    assert "WER 12.3% (LM 66.5%, CTC 50.0%)" in line
    [line, *_] = _shown(capsys, EVAL)
    assert "LM" not in line and "CTC" not in line


@pytest.mark.parametrize(
    ("lm", "ctc", "noted"),
    [(0.665, 0.526, True), (0.665, 0.54, False), (0.3, 0.47, False), (None, 0.4, False)],
)
def test_a_language_model_that_does_not_listen_is_noted(
    lm: float | None, ctc: float, noted: bool
) -> None:
    note = listening_note({"dev_lm_wer": lm, "dev_ctc_wer": ctc})
    assert (note is not None) == noted
    assert note is None or ("52.6%" in note and "66.5%" in note)
    assert listening_note({}) is None


def test_a_step_of_ctc_alone_shows_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = _shown(capsys, {**TRAIN, "loss": None})
    assert "ctc 1.250" in line and "loss" not in line


def test_an_evaluation_shows_wer_languages_and_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = {
        "fr": {"by": "wer", "wer": 0.41, "cer": 0.2},
        "zh": {"by": "cer", "wer": None, "cer": 0.202},
        "ko": {"by": "wer", "wer": None, "cer": None},
    }
    head, reference, hypothesis = _shown(capsys, {**EVAL, "dev_languages": rates})
    assert "WER 12.3%" in head and "0.33" in head
    assert "fr 41.0%" in head and "zh CER 20.2%" in head and "ko" not in head
    assert reference.endswith("what [bold]was[/] said"), "text is no markup"
    assert hypothesis.endswith("two lines")
    [head, *_] = _shown(capsys, {**EVAL, "dev_wer": None})
    assert "WER -" in head and "cut" not in head
    example = {**EVAL["examples"][0], "cut": True}
    head, _, hypothesis = _shown(capsys, {**EVAL, "dev_cut": 3, "examples": [example]})
    assert "3 cut" in head and hypothesis.endswith("(cut)")


def test_a_note_is_shown_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = _shown(capsys, {"kind": "note", "step": 3, "text": "the cache [/] is full"})
    assert line.endswith("the cache [/] is full") and line.split()[0] == "3"


@pytest.mark.parametrize(
    ("event", "named"),
    [
        ({"event": "attempt", "step": 0, "workers": 1}, ["1 worker"]),
        ({"event": "attempt", "step": 7, "workers": 2}, ["step 7", "2 workers"]),
        ({"event": "attempt", "step": 7, "workers": 2, "encoders": 0}, ["no encoders", "cache"]),
        ({"event": "failure", "step": 7, "reason": "rank 1: OSError"}, ["rank 1: OSError"]),
        ({"event": "override", "step": 7, "fields": ["plan"]}, ["plan"]),
        ({"event": "damaged checkpoint", "step": 7, "reason": "step-000008"}, ["step-000008"]),
    ],
)
def test_an_event_is_one_line(event: dict[str, Any], named: list[str]) -> None:
    line = describe_event(event)
    assert line is not None and all(name in line for name in named)


def test_an_attempt_lists_the_groups_of_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    group = {"role": "matrices", "optimizer": "muon", "lr": 0.02, "weight_decay": 0.0025}
    group |= {"first_step": 40, "tensors": 2, "parameters": 12_288}
    event = {"event": "attempt", "step": 0, "workers": 1, "groups": [group]}
    LiveView().events([event])
    _, line = capsys.readouterr().out.splitlines()
    assert all(text in line for text in ("matrices", "12,288", "muon", "2.0e-02", "step 41"))


def test_events_without_news_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    LiveView().events([{"event": "finished", "step": 9}, {"event": "rank failed", "step": 9}])
    assert capsys.readouterr().out == ""


RATES = {"by": "wer", "wer": 0.41, "cer": 0.2}
HOSTILE = [
    "\\[/b]",
    "call[/04]",
    "[bold]",
    "a\\",
    "\x1b[2J\x1b]0;title\x07",
    "\u202eabc\u2066",
    "\x9b31m",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_is_neither_markup_nor_obeyed_by_a_terminal(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    view = LiveView()
    examples = [{"reference": text, "hypothesis": text}]
    view.rows([{**EVAL, "examples": examples}, {"kind": "note", "step": 3, "text": text}])
    view.events([{"event": "failure", "step": 7, "reason": text}])
    view.warn(text)
    view.changed(text)
    view.footer({"rejects": {text: 1}, "languages": {"dev": {text: RATES}}}, Path(text))
    view.rows([TRAIN])
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert shown.count(printable(text)) >= 7 or "\\" in text
    assert "20/100" in shown


def test_a_log_line_of_every_kind_is_printable_english() -> None:
    assert printable("Größe 12 [x] 你好\nnext") == "Größe 12 [x] 你好\nnext"
    assert printable("\x1b[1m") == r"\x1b[1m"
