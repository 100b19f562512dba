"""The report of a run: what a browser would see of it, from real clips and hostile text."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile

import omni
from omni.audio.decode import AudioSpan, decode
from omni.metrics.throughput import ADVICE
from omni.report.run_page import write_report

CORPUS = Path(omni.__file__).parent / "assets" / "prompts-en"
VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr"}
HOSTILE = "<script>alert(1)</script> \"quoted\" & 'done'"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[Element] = field(default_factory=list)

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """Descendants with a tag (`*`: any) and a class, in document order."""
        found = []
        for element in self.inside:
            if tag in ("*", element.tag) and (kind is None or kind in element.classes):
                found.append(element)
            found += element.all(tag, kind)
        return found

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class Page(HTMLParser):
    """The tree of a page; an end tag that does not close the innermost element is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(self.source)
        self.close()
        assert [e.tag for e in self.open[1:]] == [], "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"attribute twice in {tag}: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        return self.root.all(tag, kind)

    def tile(self, label: str) -> str:
        (tile,) = [t for t in self.all("dl", "figures")[0].all("div") if t.text.startswith(label)]
        return tile.all("dd")[0].text

    def curve(self, title: str, number: int = 0) -> dict[float, float]:
        """Step to value of a drawn curve. title: the last words of the figure's."""
        (figure,) = [f for f in self.all("figure") if f.all("b")[0].text.endswith(title)]
        drawn = [p for p in figure.all("path", f"s{number}") if "data-values" in p.attributes]
        pairs = [pair.split(",") for pair in drawn[0].attributes["data-values"].split()]
        return {float(step): float(value) for step, value in pairs}


def corpus(part: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (CORPUS / f"{part}.jsonl").read_text().splitlines())
    return [row | {"audio": str(CORPUS / row["audio"])} for row in rows]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_row(step: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "epoch": 0, "seconds": step / 2, "loss": loss, "ctc": 0,
        "lr": 3e-4, "grad_norm": 1.5, "audio_seconds_per_second": 250.0,
        "tokens_per_second": 12_000.0, "data_wait_fraction": 0.05, "utterances": 64, "bins": 4,
    }  # fmt: skip


def eval_row(step: int, wer: float) -> dict[str, Any]:
    examples = [
        {"id": row["id"], "reference": row["text"], "hypothesis": row["text"]}
        for row in corpus("dev")[:3]
    ]
    return {
        "kind": "eval", "step": step, "epoch": 0, "seconds": step / 2, "dev_loss": 2 + wer,
        "dev_accuracy": 0.4, "shuffled_audio_gap": -0.01, "dev_wer": wer, "dev_cer": wer / 2,
        "examples": examples,
    }  # fmt: skip


def transcript(row: dict[str, Any], hypothesis: str, **changes: Any) -> dict[str, Any]:
    where = {"id": row["id"], "audio": row["audio"], "start": 0, "duration": None}
    return where | {"reference": row["text"], "hypothesis": hypothesis, "wer": 0.25} | changes


SUMMARY = {
    "steps": 200, "train_loss": 2.2, "dev_loss": 2.5, "dev_wer": 0.314, "test_wer": 0.425,
    "shuffled_audio_gap": 1.25, "audio_seconds_per_second": 245.0, "tokens_per_second": 11_900.0,
    "data_wait_fraction": 0.07, "encoder_audio_seconds_per_second": 1830.0, "wall_seconds": 3725.0,
    "rejects": {}, "best_step": 150, "test_cer": None, "cached_fraction": None,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run over the embedded corpus."""
    run = tmp_path / "prompts-en-1"
    run.mkdir()
    (run / "config.yaml").write_text("optim:\n  lr: 3.0e-4\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    metrics = [train_row(step, 8 - step / 40) for step in range(0, 201, 10)]
    metrics += [eval_row(step, 1.2 - step / 200) for step in range(0, 201, 50)]
    write_rows(run / "metrics.jsonl", metrics)
    write_rows(run / "transcripts-test.jsonl", [transcript(r, r["text"]) for r in corpus("test")])
    return run


def test_the_wer_of_each_decoder_alone_stands_beside_that_of_both(run: Path) -> None:
    assert "alone" not in Page(write_report(run)).root.text
    alone = {"dev_lm_wer": 0.665, "dev_ctc_wer": 0.5, "test_lm_wer": 0.7, "test_ctc_wer": 0.65}
    decoders = {"dev_decoders": {"joint": 50, "lm": 5}}
    (run / "summary.json").write_text(json.dumps(SUMMARY | alone | decoders))
    evals = [eval_row(step, 0.5) | alone for step in (50, 100)]
    write_rows(run / "metrics.jsonl", evals)
    page = Page(write_report(run))
    assert "50 joint, 5 lm dev transcripts by decoder" in page.root.text
    assert page.root.text.count("language model alone 66.5 %; CTC alone 50 %") == 1
    assert page.root.text.count("language model alone 70 %; CTC alone 65 %") == 1
    [notice] = [p.text for p in page.all("p") if "does not use all that it hears" in p.text]
    assert "66.5%" in notice and "50.0%" in notice
    assert "Dev word error rate by decoder" in page.root.text


def test_page_is_one_well_formed_file_without_outside_references(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    attributes = [pair for element in page.all("*") for pair in element.attributes.items()]
    outside = {"src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"}
    links = [value for name, value in attributes if name in outside]
    assert len(links) > 20 and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?:|url\(|@import|\bimport\b|fetch\(", page.source)


def test_figures_come_from_the_summary(run: Path) -> None:
    page = Page(write_report(run))
    assert page.all("h1")[0].text == "prompts-en-1"
    expected = {
        "Dev WER": "31.4 %", "Test WER": "42.5 %", "Dev loss": "2.5", "Shuffled-audio gap": "1.25",
        "Audio s/s": "245", "Wall time": "1:02:05", "Steps": "200",
    }  # fmt: skip
    assert {label: page.tile(label) for label in expected} == expected
    stages = [[cell.text for cell in row.all("td")] for row in page.all("table")[0].all("tr")]
    assert stages[1:] == [["Encoder", "1830", ""], ["Trainer", "245", "7 %"]]
    assert "lr: 3.0e-4" in page.all("details")[0].all("pre")[0].text
    assert "Not finished" not in page.root.text


def test_interrupted_run_says_so_and_shows_its_curves(run: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":210,"lo')
    page = Page(write_report(run))
    assert "Not finished" in page.root.text and "skipped: 1" in page.root.text
    assert (page.tile("Dev WER"), page.tile("Test WER"), page.tile("Steps")) == ("20 %", "–", "200")
    assert page.tile("Wall time") == "0:01:40"
    assert page.curve("Loss") == {step: 8 - step / 40 for step in range(0, 201, 10)}


def test_what_limits_throughput_is_said_with_what_would_change_it(run: Path) -> None:
    verdict = "decode-bound: loaders are busy 91% of the time, trainers wait 60%"
    known = {"throughput_limit": "decode", "throughput_verdict": verdict}
    (run / "summary.json").write_text(json.dumps(SUMMARY | known))
    page = write_report(run).read_text()
    assert verdict in page and escape(ADVICE["decode"]) in page
    (run / "summary.json").unlink()
    write_rows(run / "metrics.jsonl", [train_row(1, 2.0) | {"limit": "encoder"}])
    page = write_report(run).read_text()
    assert "encoder-bound" in page and escape(ADVICE["encoder"]) in page
    for strange in ([], {}, "nobody", None):
        write_rows(run / "metrics.jsonl", [train_row(1, 2.0) | {"limit": strange}])
        page = write_report(run).read_text()
        assert not any(escape(advice) in page for advice in ADVICE.values())


def test_several_languages_are_shown_apart(run: Path) -> None:
    def rates(fr: float, zh: float) -> dict[str, Any]:
        return {
            "fr": {"wer": fr, "cer": 0.2, "utterances": 47, "by": "wer"},
            "zh": {"wer": 0.9, "cer": zh, "utterances": 3, "by": "cer"},
        }

    evals = [eval_row(step, 0.5) | {"dev_languages": rates(0.6, 0.3)} for step in (50, 100)]
    evals[-1]["dev_languages"] = rates(0.41, 0.25)
    write_rows(run / "metrics.jsonl", evals)
    languages = {"dev": rates(0.4, 0.25), "test": {"fr": {"wer": None, "cer": None, "by": "wer"}}}
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"languages": languages}))
    page = Page(write_report(run))
    assert page.curve("by language") == {50: 60, 100: 41}
    assert page.curve("by language", 1) == {50: 30, 100: 25}
    rows = [[cell.text for cell in row.all("td")] for row in page.all("table")[0].all("tr")]
    assert rows[1:] == [
        ["fr", "dev", "47", "40 %", "20 %"],
        ["fr", "test", "–", "–", "–"],
        ["zh", "dev", "3", "90 %", "25 %"],
    ]
    (run / "summary.json").unlink()
    page = Page(write_report(run))
    assert page.all("table")[0].all("tr")[1].all("td")[3].text == "41 %"
    for strange in ([], {"dev": 1}, {"dev": {HOSTILE: {"wer": HOSTILE, "by": HOSTILE}}}, None):
        (run / "summary.json").write_text(json.dumps(SUMMARY | {"languages": strange}))
        assert "<script>alert" not in Page(write_report(run)).source


def test_a_directory_with_nothing_in_it_gives_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "summary.json" in page.root.text and page.tile("Steps") == "–"
    assert len(page.all("table")) == 1, "none of rejects"


def test_last_line_of_a_repeated_step_counts(run: Path) -> None:
    again = [train_row(100, 1.5), eval_row(100, 0.111), train_row(110, 1.25)]
    with (run / "metrics.jsonl").open("a") as file:
        # The crash cut a line short, and the resumed run wrote on behind it.
        file.write('{"kind":"train","st\n' + "".join(json.dumps(row) + "\n" for row in again))
    page = Page(write_report(run))
    loss = page.curve("Loss")
    assert list(loss) == list(range(0, 201, 10))
    assert (loss[90], loss[100], loss[110], loss[120]) == (5.75, 1.5, 1.25, 5.0)
    assert page.curve("word error rate")[100] == 11.1


def test_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    run = tmp_path / "<b>run & co"
    run.mkdir()
    row = {"id": HOSTILE, "text": HOSTILE, "audio": f"/none/{HOSTILE}"}
    write_rows(run / "transcripts-test.jsonl", [transcript(row, f"{HOSTILE[::-1]}")])
    example = {"id": HOSTILE, "reference": HOSTILE, "hypothesis": HOSTILE}
    write_rows(run / "metrics.jsonl", [eval_row(1, 0.5) | {"examples": [example]}])
    reject = dict.fromkeys(("id", "uri", "reason", "detail"), HOSTILE)
    write_rows(run / "rejects.jsonl", [reject])
    write_rows(run / "events.jsonl", [{"time": 0, "event": "failure", "reason": HOSTILE}] * 2)
    (run / "config.yaml").write_text(f"name: {HOSTILE}\n</pre>")
    (run / "summary.json").write_text(json.dumps(dict.fromkeys(SUMMARY, HOSTILE)))
    page = Page(write_report(run))
    assert len(page.all("script")) == 1 and "alert" not in page.all("script")[0].text
    assert "<script>alert" not in page.source and page.source.count("&lt;script&gt;alert") > 8
    assert page.all("h1")[0].text == "<b>run & co"
    assert page.all("article")[0].all("dd")[0].text == HOSTILE
    assert page.all("article")[1].all("dd")[1].text == HOSTILE
    titles = [mark.attributes["title"] for mark in page.all("mark") if "title" in mark.attributes]
    assert titles and "reference: <script>alert(1)</script>" in titles
    assert 'reference: "quoted"' in titles


def test_transcripts_that_were_cut_are_marked_and_counted(run: Path) -> None:
    rows = [json.loads(x) for x in (run / "transcripts-test.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert "max_new_tokens" not in Page(write_report(run)).root.text
    write_rows(run / "transcripts-test.jsonl", [rows[0] | {"cut": True}, *rows[1:]])
    (run / "summary.json").write_text(json.dumps(summary | {"dev_cut": 0, "test_cut": 1}))
    page = Page(write_report(run))
    assert "1 test transcripts cut at eval.max_new_tokens" in page.root.text
    assert "dev transcripts cut" not in page.root.text
    marked = ["cut at eval.max_new_tokens" in a.text for a in page.all("article")]
    assert marked == [True] + [False] * (len(marked) - 1)


def audio_bytes(element: Element) -> tuple[str, bytes]:
    head, text = element.attributes["src"].split(",")
    return head, base64.b64decode(text, validate=True)


def test_first_twenty_clips_are_embedded_as_they_are(run: Path) -> None:
    rows = corpus("test")
    page = Page(write_report(run))
    players = page.all("audio")
    assert len(rows) > 20 == len(players)
    assert f"20 of {len(rows)}" in page.root.text
    for row, player in zip(rows, players, strict=False):
        head, data = audio_bytes(player)
        assert head == "data:audio/ogg;base64" and "controls" in player.attributes
        assert data == Path(row["audio"]).read_bytes()
        assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(row["duration"], abs=0.01)


def test_spans_and_large_files_become_wav(run: Path, tmp_path: Path) -> None:
    clip = next(row for row in corpus("test") if row["duration"] > 2)
    speech = np.concatenate([decode(row["audio"]) for row in corpus("test")])[: 16_000 * 12]
    large = tmp_path / "large.wav"
    soundfile.write(large, np.stack([speech, speech], axis=1), 16_000, subtype="PCM_16")
    small = tmp_path / "small.au"  # small, but no browser plays it
    soundfile.write(small, speech[:16_000], 16_000, format="AU")
    spans = [
        (clip["audio"], AudioSpan(0.5, 1.0)),
        (clip["audio"], AudioSpan(0.0, 1.25)),
        (str(large), AudioSpan()),
        (str(small), AudioSpan()),
    ]
    rows = [
        transcript(clip, "x", audio=path, start=span.start, duration=span.duration)
        for path, span in spans
    ]
    write_rows(run / "transcripts-test.jsonl", rows)
    players = Page(write_report(run)).all("audio")
    for (path, span), player, seconds in zip(spans, players, (1.0, 1.25, 12.0, 1.0), strict=True):
        head, data = audio_bytes(player)
        info = soundfile.info(io.BytesIO(data))
        kind = (head, info.format, info.subtype, info.samplerate, info.channels, info.duration)
        assert kind == ("data:audio/wav;base64", "WAV", "PCM_16", 16_000, 1, seconds)
        heard, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        assert np.abs(heard - np.clip(decode(path, span), -1, 1)).max() <= 2 / 2**15


def test_unplayable_audio_leaves_its_transcript_and_the_reason(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sph"
    broken.write_bytes(b"not audio")
    clip = corpus("test")[0]
    rows = [
        transcript(clip, "a", audio="/none/gone.opus"),
        transcript(clip, "b", audio=str(broken)),
        transcript(clip, "c", duration=99.0),
        transcript(clip, "d", wer=None),
    ]
    write_rows(run / "transcripts-test.jsonl", rows)
    articles = [a for a in Page(write_report(run)).all("article") if a.all("p")][:4]
    assert [len(article.all("audio")) for article in articles] == [0, 0, 0, 1]
    for article, reason in zip(
        articles, ("missing", "unreadable", "outside the file"), strict=False
    ):
        assert reason in article.text and clip["text"] in article.text
    assert "25 % WER" in articles[0].text and "– WER" in articles[3].text


@pytest.mark.parametrize(
    ("reference", "hypothesis", "marks"),
    [
        ("Call-Forward on No Answer.", "call forward, on no answer", []),
        ("press two now", "press to now", [("mark", "to")]),
        ("press two now", "press two right now!", [("ins", "right")]),
        ("Press two, now", "press now", [("del", "two,")]),
        ("hold on", "", [("del", "hold"), ("del", "on")]),
        ("", "hello there", [("ins", "hello"), ("ins", "there")]),
        ("don't", "dont", []),
        ("请稍等一下", "请稍登一下", [("mark", "登")]),
        ("हिन्दी में", "हिन्दी मे", [("mark", "मे")]),
    ],
)
def test_wrong_words_are_marked(
    run: Path, reference: str, hypothesis: str, marks: list[tuple[str, str]]
) -> None:
    row = transcript(corpus("test")[0], hypothesis, reference=reference)
    write_rows(run / "transcripts-test.jsonl", [row])
    _, shown = Page(write_report(run)).all("article")[0].all("dd")
    assert [(element.tag, element.text) for element in shown.inside] == marks
    kept = re.sub(r"<del>.*?</del>", "", shown.text)
    for element in shown.all("del"):
        kept = kept.replace(element.text, "", 1)
    assert kept.split() == hypothesis.split()


def test_marks_are_as_many_as_the_word_errors(run: Path) -> None:
    """The least number of edits, as jiwer counts them: marks must not contradict the WER."""
    rows = [row for row in corpus("train") if len(row["text"].split()) > 4][:21]
    pairs = [(row, other["text"]) for row, other in zip(rows, rows[1:], strict=False)]
    write_rows(run / "transcripts-test.jsonl", [transcript(*pair) for pair in pairs])
    articles = Page(write_report(run)).all("article")

    def plain(text: str) -> str:
        return re.sub(r"[^\w\s]", "", text.lower().replace("-", " "))

    for (row, hypothesis), article in zip(pairs, articles, strict=False):
        edits = jiwer.process_words(plain(row["text"]), plain(hypothesis))
        marks = [len(article.all(tag)) for tag in ("mark", "ins", "del")]
        assert sum(marks) == edits.substitutions + edits.insertions + edits.deletions > 0


def test_examples_of_the_last_evaluation(run: Path) -> None:
    late = {"id": "late", "reference": "press two", "hypothesis": "press to"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(eval_row(200, 0.2) | {"examples": [late]}) + "\n")
    page = Page(write_report(run))
    last = [a for a in page.all("article") if not a.all("audio")]
    assert [a.all("dd")[0].text for a in last] == ["press two"]
    assert [mark.text for mark in last[0].all("mark")] == ["to"]


def test_examples_of_the_last_evaluation_can_be_heard(run: Path) -> None:
    clip = corpus("dev")[0]
    said = {"id": "a", "reference": "press two", "hypothesis": "", "audio": clip["audio"]}
    rows = [said, said | {"start": 0.1, "duration": 0.2}, said | {"bytes": [0]}]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(eval_row(200, 0.2) | {"examples": rows}) + "\n")
    whole, part, wrong = Page(write_report(run)).all("article")[-3:]
    played = [
        base64.b64decode(a.all("audio")[0].attributes["src"].partition(",")[2])
        for a in (whole, part)
    ]
    assert played[0] == Path(clip["audio"]).read_bytes()
    assert len(decode(played[1])) == 3200
    assert wrong.all("audio") == [] and "No audio" in wrong.text


def test_rejects_are_counted_by_reason_with_five_examples(run: Path) -> None:
    assert len(Page(write_report(run)).all("table")) == 1, "none of rejects"
    reasons = ["empty"] * 3 + ["unreadable"] * 4
    rejects = [
        {"id": f"clip-{n}", "uri": f"/c/{n}", "reason": reason, "detail": "why"}
        for n, reason in enumerate(reasons)
    ]
    write_rows(run / "rejects.jsonl", rejects)
    page = Page(write_report(run))
    counts, examples = (
        [[cell.text for cell in row.all("td")] for row in table.all("tr")][1:]
        for table in page.all("table")[1:]
    )
    assert counts == [["unreadable", "4"], ["empty", "3"]]
    assert [row[0] for row in examples] == [f"clip-{n}" for n in range(5)]


@pytest.mark.parametrize(("rejects", "shown"), [(3, "3"), ({"empty": 2}, "2")])
def test_rejects_of_the_summary_are_not_denied(run: Path, rejects: Any, shown: str) -> None:
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"rejects": rejects}))
    page = Page(write_report(run))
    assert page.all("table")[1].all("td")[1].text == shown


def test_long_curves_are_thinned_without_losing_a_spike(run: Path) -> None:
    rows = [train_row(step, 2.0 + step % 7 / 100) for step in range(20_000)]
    rows[12_345]["loss"] = 50.0
    write_rows(run / "metrics.jsonl", rows)
    page = Page(write_report(run))
    for title in ("Loss", "Loss over log steps"):
        curve = page.curve(title)
        assert curve[12_345] == 50.0 and len(curve) < 1000


def test_values_that_are_not_finite_are_counted_not_drawn(run: Path) -> None:
    rows = [train_row(step, 2.0) for step in range(6)]
    rows[3]["loss"], rows[4]["loss"] = float("nan"), float("inf")
    rows[5]["lr"] = None  # not logged
    rows = [row | {"grad_norm": float("nan")} for row in rows]
    write_rows(run / "metrics.jsonl", rows)
    page = Page(write_report(run))
    assert list(page.curve("Loss")) == [0, 1, 2, 5] and "(2 not finite)" in page.root.text
    assert list(page.curve("Learning rate")) == [0, 1, 2, 3, 4]
    captions = [caption.text for caption in page.all("figcaption")]
    assert [c for c in captions if c.startswith("Gradient")] == ["Gradient norm  never finite"]


@pytest.mark.parametrize(
    ("value", "dev_loss", "dev_wer"),
    [(12.345678, "12.35", "1234.6 %"), (9999.7, "10k", "999970 %"), (0.00025, "2.5e-4", "0 %")],
)
def test_numbers_stay_short_and_plain(run: Path, value: float, dev_loss: str, dev_wer: str) -> None:
    summary = SUMMARY | {"dev_loss": value, "dev_wer": value}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    assert (page.tile("Dev loss"), page.tile("Dev WER")) == (dev_loss, dev_wer)


@pytest.mark.parametrize("steps", [[0], [7], [0, 1], list(range(0, 301))])
def test_everything_is_drawn_inside_its_plot(run: Path, steps: list[int]) -> None:
    rows = [train_row(step, 5.0 + step % 3) for step in steps]
    write_rows(run / "metrics.jsonl", rows + [eval_row(step, 0.5) for step in steps[:5]])
    svgs = Page(write_report(run)).all("svg")
    assert len(svgs) >= 9
    for svg in svgs:
        _, _, width, height = map(float, svg.attributes["viewbox"].split())
        drawn = [p for p in svg.all("path") if {"s0", "s1"} & set(p.classes)]
        for path in drawn:
            vertices = re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.attributes["d"])
            assert vertices and all(0 <= float(x) <= width for x, _ in vertices)
            assert all(0 <= float(y) <= height for _, y in vertices)
            seen = path.attributes.get("data-values")
            assert seen is None or len(seen.split()) == len(vertices), (
                "read-out and vertices differ"
            )


def test_higher_values_are_drawn_higher_and_later_steps_further_right(run: Path) -> None:
    page = Page(write_report(run))
    for title in ("Loss", "Loss over log steps"):
        (figure,) = [f for f in page.all("figure") if f.all("b")[0].text == title]
        path = figure.all("path", "s0")[0].attributes["d"]
        points = [tuple(map(float, p)) for p in re.findall(r"([\d.]+),([\d.]+)", path)]
        assert len(points) >= 20 and points == sorted(points)
        assert [y for _, y in points] == sorted(y for _, y in points), "the loss falls"


def test_notes_of_the_run_are_shown_once(run: Path) -> None:
    note = {"kind": "note", "step": 3, "text": "the feature cache is full <here>"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{json.dumps(note)}\n{json.dumps(note)}\n")
    page = write_report(run).read_text()
    assert page.count("the feature cache is full &lt;here&gt;") == 1
