"""The page of a corpus and of a run's plan: its figures against the corpus, and hostile text."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import jobs.inspect
from omni.audio.decode import AudioSpan, decode
from omni.config import parse_config
from omni.metrics.run_files import write_event
from omni.model.download import ASSETS
from omni.report.audio_embed import embed, mel_picture, waveform
from omni.report.charts import histogram
from omni.report.plan_page import read_run, soft_of
from omni.run.prepare import prepare
from tests.report.test_run_page import HOSTILE, Page, corpus, write_rows

CORPUS = ASSETS / "prompts-en"


def inspect(*arguments: str) -> int:
    return jobs.inspect.main(list(arguments))


def bars(page: Page, title: str) -> list[tuple[str, int]]:
    """Ranges of a histogram's bars and how many values they hold."""
    (figure,) = [f for f in page.all("figure") if f.all("b")[0].text == title]
    told = [rect.all("title")[0].text.split(": ") for rect in figure.all("rect")]
    return [(span, int(many.replace(",", ""))) for span, many in told]


def rows_after(page: Page, heading: str) -> list[list[str]]:
    """Cells of the table behind a heading."""
    main = page.all("main")[0].inside
    at = next(i for i, e in enumerate(main) if e.tag == "h2" and e.text == heading)
    found = next(e for e in main[at:] if e.tag == "div" and "table" in e.classes)
    return [[cell.text for cell in row.all("td")] for row in found.all("tr")[1:]]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert inspect("embedded:dev", "--out", str(out), "--utterances", "5") == 0
    return Page(out)


def test_the_page_is_one_well_formed_file_without_outside_references(embedded: Page) -> None:
    attributes = [pair for element in embedded.all("*") for pair in element.attributes.items()]
    outside = {"src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"}
    links = [value for name, value in attributes if name in outside]
    assert len(links) == 1 + 5 + 5 and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?:|url\(|@import|<script", embedded.source)


def test_figures_are_those_of_the_corpus(embedded: Page) -> None:
    rows = corpus("dev")
    assert embedded.tile("Utterances") == str(len(rows))
    assert embedded.tile("Hours") == f"{sum(r['duration'] for r in rows) / 3600:.2f}"
    assert embedded.tile("Rejects") == "0" and embedded.tile("Languages") == "1"
    for title in ("Length", "Text", "Words", "Tokens", "Characters a second", "Tokens a second"):
        assert sum(many for _, many in bars(embedded, title)) == len(rows)
    ones = sum(len(row["text"].split()) == 1 for row in rows)
    assert bars(embedded, "Words")[0] == ("1 to 2", ones)
    [english] = rows_after(embedded, "Languages")
    assert english[:2] == ["en", str(len(rows))]


def test_a_histogram_counts_every_value_once() -> None:
    values = [0.0, 0.3, 0.3, 1.0, 2.9, 3.0]
    drawn = histogram("Title", "unit", values).svg
    told = re.findall(r"<title>([^ ]+) to ([^:]+): (\d+)</title>", drawn)
    assert [int(many) for _, _, many in told if int(many)] == [1, 2, 1, 1, 1]
    for low, high, many in told[:-1]:
        assert sum(float(low) <= v < float(high) for v in values) == int(many)
    assert re.findall(r"to ([^:]+): 1,000</title>", histogram("T", "", [7.0] * 1000).svg) == ["7"]
    assert not histogram("T", "", []).svg
    far = histogram("T", "", [1.0] * 999 + [1e6]).svg
    assert sum(map(int, re.findall(r": ([\d,]+)</title>", far.replace(",", "")))) == 1000


def test_sampled_utterances_can_be_seen_and_heard(embedded: Page) -> None:
    by_id = {row["id"]: row for row in corpus("dev")}
    articles = embedded.all("article")
    assert len(articles) == 5
    for article in articles:
        row = by_id[article.all("small")[0].text]
        assert row["text"] in [cell.text for cell in article.all("dd")]
        head, data = article.all("audio")[0].attributes["src"].split(",")
        assert head == "data:audio/ogg;base64"
        assert base64.b64decode(data) == Path(row["audio"]).read_bytes()
        head, data = article.all("img")[0].attributes["src"].split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/png;base64" and picture.mode == "P"
        assert picture.size == (-(-len(decode(row["audio"])) // 160), 80)


def test_the_sample_follows_its_seed(tmp_path: Path) -> None:
    def ids(seed: int) -> list[str]:
        out = tmp_path / "page.html"
        assert (
            inspect("embedded:dev", "--out", str(out), "--utterances", "4", "--seed", str(seed))
            == 0
        )
        return [article.all("small")[0].text for article in Page(out).all("article")]

    assert ids(1) == ids(1) != ids(2)


def test_pictures_show_the_sound() -> None:
    times = np.arange(16_000) / 16_000
    quiet, loud = np.zeros(16_000, np.float32), np.sin(2 * np.pi * 4_000 * times)
    data = mel_picture(np.concatenate((quiet, loud)).astype(np.float32)).split("base64,")[1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert picture.shape == (80, 200)
    brightest = int(picture[:, 150].argmax())
    assert 5 < brightest < 40, "4 kHz of 8 is in the upper half of the mel scale"
    assert picture[brightest, 50] < picture[brightest, 150]
    assert mel_picture(np.zeros(10, np.float32)) and waveform(np.zeros(0, np.float32)) == ("", 0)
    assert "V100.5" in waveform(np.full(100, -3, np.float32))[0], "what is out of range is cut"


def test_a_span_is_played_alone(tmp_path: Path) -> None:
    samples = np.linspace(-0.5, 0.5, 16_000, dtype=np.float32)
    clip = str(next((CORPUS / "audio").iterdir()))
    span = embed(clip, AudioSpan(0, 1), samples)
    head, data = span.src.split(",")
    played, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert head == "data:audio/wav;base64" and rate == 16_000
    assert np.abs(played - samples).max() <= 1 / 2**15
    assert embed("/none/<b>").error and not embed("/none/<b>").src


def test_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    row = corpus("dev")[0]
    fields = {"text": HOSTILE, "prompt": HOSTILE, "language": HOSTILE, "speaker": HOSTILE}
    bad = {"audio": f"{HOSTILE}.wav".replace("/", ""), "id": f"bad {HOSTILE}", "text": "x"}
    manifest = tmp_path / "<b>corpus.jsonl"
    write_rows(manifest, [{**row, **fields, "id": HOSTILE, "task": HOSTILE}, bad])
    out = tmp_path / "page.html"
    assert inspect(str(manifest), "--out", str(out), "--allow_absolute") == 0
    page = Page(out)
    assert page.all("script") == [] and page.all("h1")[0].text == "<b>corpus.jsonl"
    assert page.source.count("&lt;script&gt;alert") > 6
    [article] = page.all("article")
    assert article.all("small")[0].text == HOSTILE and article.all("dd")[0].text == HOSTILE
    assert [r[:2] for r in rows_after(page, "Rejected rows")] == [["missing", "1"]]
    assert page.tile("Rejects") == "1"


# -- runs --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves before its first step: config, plan, tokenizer, an attempt."""
    rows = [row for row in corpus("train") if row["duration"] < 4][:60]
    write_rows(tmp_path / "a.jsonl", [{**row, "language": "en"} for row in rows[:40]])
    write_rows(tmp_path / "b.jsonl", [{**row, "language": "fr"} for row in rows[40:]])
    mixture: list[Any] = [
        str(tmp_path / "a.jsonl"),
        {"source": str(tmp_path / "b.jsonl"), "weight": 2},
    ]
    config = parse_config(
        {
            "run": {"storage": str(tmp_path / "runs"), "name": "mix"},
            "data": {"train": mixture, "allow_absolute": True, "language_tag": True},
            "tokenizer": {"vocab_size": 300},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 32},
            "optim": {"bin_positions": 256, "steps": 20},
        }
    )
    prepared = prepare(config)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    (config.run_dir / "tokenizer.json").write_text(prepared.tokenizer.to_json())
    prepared.write_plan_file()
    plan = prepared.fingerprints["plan"]
    write_event(config.run_dir, "attempt", 0, workers=1, plan=plan)
    return config.run_dir


def test_a_run_shows_how_its_bins_are_filled(run: Path) -> None:
    assert inspect(str(run), "--utterances", "2") == 0
    page, made = Page(run / "inspect.html"), read_run(run)
    plan = made.plan
    assert page.tile("Bins") == str(plan.bins) and page.tile("Utterances") == "60"
    assert sum(many for _, many in bars(page, "Fill")) == plan.bins
    assert sum(many for _, many in bars(page, "Soft tokens")) == 60
    assert made.index is not None and made.file.weights is not None
    words = made.file.lengths - soft_of(made.index, made.config)
    assert (words > 0).all()
    drawn = page.all("div", "bins")[0].all("svg")
    assert len(drawn) == 14
    for svg in drawn:
        members = plan.bin(int(svg.attributes["aria-label"].removeprefix("bin ")))
        assert len(svg.all("g")) == len(members)
        covered = sum(float(r.attributes["width"]) for g in svg.all("g") for r in g.all("rect"))
        assert covered == made.file.lengths[members].sum() <= 256
    assert [span.text for span in page.all("p", "legend")[0].all("span")] == ["en", "fr"]
    rows = rows_after(page, "Mixture")
    assert [row[:2] for row in rows] == [["1", "40"], ["2", "20"]]
    often = np.bincount(plan.members, minlength=60)
    assert float(rows[1][2]) == pytest.approx(often[40:].mean(), rel=1e-3)
    assert float(rows[1][2]) == pytest.approx(2 * float(rows[0][2]), rel=0.25)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"tokenizer": {}}', b'{"tokenizer": 1}'])
def test_a_run_with_a_damaged_tokenizer_shows_the_rest(run: Path, data: bytes) -> None:
    path = run / "tokenizer.json"
    whole = path.read_bytes()
    path.write_bytes(data)
    assert inspect(str(run)) == 0
    path.write_bytes(whole)
    page = Page(run / "inspect.html")
    assert "tokenizer.json" in page.root.text
    assert page.all("article") and bars(page, "Fill"), "utterances, bins"


def test_a_run_whose_corpus_changed_or_went_away_shows_its_plan(run: Path) -> None:
    manifest = run.parents[1] / "a.jsonl"
    text = manifest.read_text()
    manifest.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert inspect(str(run)) == 0
    page = Page(run / "inspect.html")
    [notice] = page.all("p", "notice")
    assert "corpus" in notice.text and bars(page, "Fill")
    assert page.all("article") == []
    manifest.unlink()
    assert inspect(str(run)) == 0
    [notice] = Page(run / "inspect.html").all("p", "notice")
    assert str(manifest) in notice.text


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere.jsonl"], "nowhere.jsonl: "),
        (["."], "config.yaml"),
        (["embedded:other"], "embedded:train, embedded:dev or embedded:test"),
        (["embedded:dev", "--out", "none/page.html"], "--out: none/page.html"),
        (["embedded:dev", "--tokenizer", "none.json"], "--tokenizer none.json"),
    ],
)
def test_what_cannot_be_shown_is_one_error(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert inspect(*arguments) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_its_plan_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (run / "plan").iterdir()
    path.write_bytes(b"PAR1")
    assert inspect(str(run)) == 2
    assert str(path) in capsys.readouterr().err


def test_numbers_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        inspect("embedded:dev", "--utterances", "-1")
    assert left.value.code == 2 and "--utterances" in capsys.readouterr().err


def test_recordings_of_a_tar_are_heard(tmp_path: Path) -> None:
    import tarfile

    row = corpus("dev")[0]
    wav = io.BytesIO()
    soundfile.write(wav, decode(row["audio"]), 16_000, format="WAV")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name, data in (("a.wav", wav.getvalue()), ("a.txt", row["text"].encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    out = tmp_path / "page.html"
    assert inspect(str(tmp_path / "shard.tar"), "--out", str(out)) == 0
    [article] = Page(out).all("article")
    head, data = article.all("audio")[0].attributes["src"].split(",")
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert head == "data:audio/wav;base64" and rate == 16_000
    assert len(heard) == len(decode(row["audio"]))
