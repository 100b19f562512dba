"""The page of a corpus, and of what a run made of it: one file that needs no network."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from omni.audio.decode import AudioError, decode, fit
from omni.audio.logmel import SAMPLING_RATE
from omni.corpus.index import Index, build_index
from omni.corpus.index_row import IndexRow, Recording, recordings
from omni.corpus.lengths import span_of
from omni.corpus.manifest import INDEX_FILE, ManifestError
from omni.corpus.text import language_code
from omni.errors import ConfigError
from omni.model.download import ASSETS
from omni.model.tokenizer import SpeechTokenizer
from omni.report.audio_embed import mel_picture, player, waveform
from omni.report.charts import count, histogram, percent, short
from omni.report.plan_page import RunPlan, plan_sections, read_run
from omni.report.run_page import table
from omni.storage.path import StorageError, StoragePath, as_path, public_uri, reason_of

_VOCAB = 1024  # of the tokenizer of a corpus that no run has trained one for
_TRAINED_ON = 20_000  # texts, for that
_SPEAKERS = 12
_CHARACTERS = 200
_ODD = 4  # of the slowest and of the fastest
_LONG_ID = 60
_NAMED = 6  # languages


def write_page(
    target: str,
    out: Path | None = None,
    *,
    utterances: int = 12,
    seed: int = 0,
    tokenizer: Path | None = None,
    allow_absolute: bool = False,
) -> StoragePath:
    """Write the page of a manifest (or tar, or embedded:train), or of a run's directory.

    out: default RUN/inspect.html, or inspect.html here. utterances: how many to hear, drawn by
    `seed`. tokenizer: counts tokens; default the run's, or a BPE trained on the corpus.
    Raises ConfigError naming what cannot be used.
    """
    found = as_path(target)
    try:
        run = found if found.is_dir() and not (found / INDEX_FILE).is_file() else None
    except StorageError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:  # of storage, which may answer later
        raise RuntimeError(f"{public_uri(target)}: {reason_of(error)}") from error
    if run is not None:
        made = read_run(run)
        index, tokens, note = made.index, made.tokenizer, made.note
    else:
        made, note = None, ""
        try:
            index = build_index([target], allow_absolute=allow_absolute)
        except ManifestError as error:
            raise ConfigError(str(error)) from None
        except OSError as error:  # of storage, which may answer later
            raise RuntimeError(f"{public_uri(target)}: {reason_of(error)}") from error
        tokens = None
    if tokenizer is not None:
        tokens = _load(tokenizer)
    name = escape((found.resolve() if isinstance(found, Path) else found).name)
    sections = "" if made is None else plan_sections(made, seed)
    if index is not None:
        counter = tokens or _trained(index, seed)
        whose = "the tokenizer given" if tokenizer else "the run's tokenizer"
        whose = whose if tokens else f"a BPE of {_VOCAB:,} trained on this corpus"
        sections = _corpus(index, counter, whose) + sections + _rejects(index)
        sections += _sample(index, counter, utterances, seed)
    style = "".join((ASSETS / n).read_text() for n in ("report.css", "inspect.css"))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name} · omni</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{style}</style></head><body><main>
<h1>{name}</h1>{f'<p class="notice">{escape(note)}</p>' if note else ""}{_tiles(index, made)}
{sections}</main></body></html>
"""
    path: StoragePath = out or (run / "inspect.html" if run else Path("inspect.html"))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {reason_of(error)}") from None
    return path


def _load(path: Path) -> SpeechTokenizer:
    try:
        return SpeechTokenizer.load(path)
    except Exception as error:  # the library raises plain Exception for a bad file
        raise ConfigError(f"--tokenizer {path}: {error}") from None


def _trained(index: Index, seed: int) -> SpeechTokenizer:
    texts = index.table["text"].to_pylist()
    if len(texts) > _TRAINED_ON:
        texts = random.Random(seed).sample(texts, _TRAINED_ON)
    return SpeechTokenizer.train(texts, _VOCAB)


# ---- sections


def _tiles(index: Index | None, made: RunPlan | None) -> str:
    tiles: list[tuple[str, str, str]] = []
    if index is not None:
        texts = index.table["text"].to_pylist()
        seconds = _seconds(index)
        speakers = {s for s in index.table["speaker"].to_pylist() if s}
        languages = Counter(_language(value) for value in index.table["language"].to_pylist())
        spoken = ", ".join(name for name, _ in languages.most_common(_NAMED))
        spoken += ", …" if len(languages) > _NAMED else ""
        bad = len(index.rejects)
        per_second = sum(map(len, texts)) / sum(seconds)
        tiles = [
            ("Utterances", count(len(index)), f"{count(len(set(texts)))} different texts"),
            ("Hours", f"{index.hours:.2f}", f"longest clip {max(seconds):.1f} s"),
            ("Languages", count(len(languages)), spoken),
            (
                "Speakers",
                count(len(speakers)) if speakers else "–",
                "" if speakers else "none named",
            ),
            ("Characters/s", f"{per_second:.1f}", "of the transcripts"),
            ("Rejects", count(bad), percent(bad / (bad + len(index)))),
        ]
    if made is not None:
        mean = len(made.plan.members) / made.plan.bins
        tiles += [("Bins", count(made.plan.bins), f"of {count(made.positions)} positions")]
        if index is None:
            tiles += [("Utterances per bin", short(mean), "mean")]
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd><dd>{escape(note)}</dd></div>"
        for label, value, note in tiles
    )
    return f'<dl class="figures">{cells}</dl>'


def _corpus(index: Index, tokenizer: SpeechTokenizer, whose: str) -> str:
    seconds, texts = _seconds(index), index.table["text"].to_pylist()
    tokens = [len(ids) for ids in tokenizer.encode_batch(texts)]
    pace = [len(text) / s for text, s in zip(texts, seconds, strict=True)]
    token_pace = [n / s for n, s in zip(tokens, seconds, strict=True)]
    figures = [
        histogram("Length", "seconds", seconds),
        histogram("Text", "characters", [len(text) for text in texts], whole=True),
        histogram("Words", "between spaces", [len(text.split()) for text in texts], whole=True),
        histogram("Tokens", "per utterance", tokens, whole=True),
        histogram("Characters a second", "pace of speech", pace),
        histogram("Tokens a second", "of audio", token_pace),
    ]
    return f"""<h2>Lengths and texts</h2><p class="quiet">Tokens are those of {escape(whose)}. The
last bar of each holds everything beyond 99.5 % of the utterances.</p>
<div class="small">{"".join(figures)}</div>{_odd(index, pace)}{_languages(index, tokens)}
{_speakers(index)}{_characters(texts)}"""


def _odd(index: Index, pace: list[float]) -> str:
    """Where text and audio may not belong together."""
    order = sorted(range(len(pace)), key=lambda i: pace[i])
    chosen = dict.fromkeys([*order[:_ODD], *order[-_ODD:]])
    rows = []
    for i in chosen:
        row = index.table.slice(i, 1).to_pylist()[0]
        rows.append(
            (
                f"{pace[i]:.1f}",
                f"{row['samples'] / SAMPLING_RATE:.1f}\u00a0s",
                _cut(row["id"], _LONG_ID),
                _cut(row["text"], 120),
            )
        )
    head = ("Characters/s", "Length", "Id", "Text")
    return f"""<h2>Slowest and fastest</h2><p class="quiet">A pace far from the others often means
that text and audio do not belong together, or that a clip is cut.</p>{table(head, rows)}"""


def _languages(index: Index, tokens: list[int]) -> str:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    texts, named = index.table["text"].to_pylist(), index.table["language"].to_pylist()
    for language, text, s, n in zip(named, texts, _seconds(index), tokens, strict=True):
        for at, value in enumerate((1, s, len(text), n)):
            sums[_language(language)][at] += value
    rows = [
        (name, count(n), f"{s / 3600:.2f}", f"{s / n:.1f}", f"{chars / s:.1f}", f"{ids / s:.1f}")
        for name, (n, s, chars, ids) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]
    head = ("Language", "Utterances", "Hours", "Mean seconds", "Characters/s", "Tokens/s")
    return f"<h2>Languages</h2>{table(head, rows)}"


def _speakers(index: Index) -> str:
    hours: dict[str, float] = defaultdict(float)
    clips: Counter[str] = Counter()
    for name, s in zip(index.table["speaker"].to_pylist(), _seconds(index), strict=True):
        if name:
            hours[name] += s
            clips[name] += 1
    if not hours:
        return ""
    most = sorted(hours, key=lambda name: -hours[name])[:_SPEAKERS]
    rows = [(name, count(clips[name]), f"{hours[name] / 60:.1f}") for name in most]
    title = (
        f"the {_SPEAKERS} with most audio of {count(len(hours))}" if len(hours) > _SPEAKERS else ""
    )
    return f"""<h2>Speakers</h2><p class="quiet">{title}</p>
{table(("Speaker", "Utterances", "Minutes"), rows)}"""


def _characters(texts: Sequence[str]) -> str:
    """Every character with its name: stray ones show here first."""
    counts = Counter(character for text in texts for character in text)
    shown = counts.most_common()
    rare = len(shown) - _CHARACTERS
    if rare > 0:  # both ends: the common ones, and what occurs once
        shown = shown[: _CHARACTERS // 2] + shown[-_CHARACTERS // 2 :]
    named = [(unicodedata.name(c, "no name").lower(), _visible(c), n) for c, n in shown]
    cells = "".join(
        f'<div title="{escape(name)}"><b>{escape(c)}</b> {count(n)}</div>' for name, c, n in named
    )
    unstable = sum(not unicodedata.is_normalized("NFC", text) for text in texts)
    note = f"{count(unstable)} texts are not NFC; data.unicode makes them so. " * bool(unstable)
    note += f"The most common and the rarest are shown, {count(rare)} are not." * (rare > 0)
    return f"""<h2>Characters</h2><details><summary>{count(len(counts))} different characters.
{note}</summary><div class="characters">{cells}</div></details>"""


def _rejects(index: Index) -> str:
    if not index.rejects:
        return '<h2>Rejected rows</h2><p class="quiet">None.</p>'
    reasons = Counter(reject.reason for reject in index.rejects).most_common()
    first = {reject.reason: reject for reject in reversed(index.rejects)}
    rows = [
        (reason, count(n), _cut(first[reason].id, _LONG_ID), _cut(first[reason].detail, 200))
        for reason, n in reasons
    ]
    return f"<h2>Rejected rows</h2>{table(('Reason', 'Count', 'For example', 'Detail'), rows)}"


def _sample(index: Index, tokenizer: SpeechTokenizer, utterances: int, seed: int) -> str:
    chosen = sorted(random.Random(seed).sample(range(len(index)), min(utterances, len(index))))
    shown = "".join(_utterance(row, tokenizer) for row in index.table.take(chosen).to_pylist())
    return f"""<h2>Utterances</h2><p class="quiet">{len(chosen)} of {count(len(index))}, drawn by
seed {seed}. Waveforms are at full scale; log-mels are what the encoder sees, 80 bands up to 8 kHz,
the first 30 s.</p>{shown}"""


def _utterance(row: IndexRow, tokenizer: SpeechTokenizer) -> str:
    heard = "".join(_recording(part) for part in recordings(row))
    about = [row["language"], row["speaker"], f"{row['samples'] / SAMPLING_RATE:.2f} s"]
    facts = [("text", row["text"]), ("prompt", row["prompt"]), ("task", row["task"])]
    facts += [("tokens", count(len(tokenizer.encode(row["text"]))))]
    facts += [("about", " · ".join(str(a) for a in about if a))]
    listed = "".join(f"<dt>{n}</dt><dd>{escape(v)}</dd>" for n, v in facts if v)
    return f"""<article class="utterance"><div>{heard}</div>
<div><small>{escape(_cut(row["id"], 120))}</small><dl>{listed}</dl></div></article>"""


def _recording(part: Recording) -> str:
    try:
        samples = fit(decode(part["uri"], span_of(part)), part["samples"])
    except (AudioError, OSError) as error:
        return f'<p class="quiet">No audio: {escape(str(error))}</p>'
    return waveform(samples) + mel_picture(samples) + player(part["uri"], span_of(part), samples)


# ---- words


def _seconds(index: Index) -> list[float]:
    return [n / SAMPLING_RATE for n in index.table["samples"].to_pylist()]


def _language(name: str | None) -> str:
    return language_code(name) if name else "none named"


def _visible(character: str) -> str:
    if character == " ":
        return "space"
    kind = unicodedata.category(character)
    if kind[0] in "CZ":
        return f"U+{ord(character):04X}"
    return f"◌{character}" if kind[0] == "M" else character


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
