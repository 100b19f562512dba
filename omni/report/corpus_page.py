"""Page of a corpus, and of the plan that a run made of it: one file without outside references."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from omni.audio.decode import AudioError, decode, fit
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.index import Index, build_index
from omni.corpus.index_row import IndexRow, Recording, recordings, span_of
from omni.corpus.languages import language_code
from omni.corpus.manifest import INDEX_FILE, ManifestError
from omni.corpus.rejects import count_reasons
from omni.errors import ConfigError
from omni.model.tokenizer import SpeechTokenizer
from omni.report.audio_embed import embed, mel_picture, waveform
from omni.report.charts import histogram
from omni.report.number_text import count, percent, short
from omni.report.plan_page import RunPlan, plan_section, read_run
from omni.report.render import render
from omni.storage.filesystem import StorageError
from omni.storage.http import DEFAULT_LIMITS, DownloadLimits
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import public_uri, reason_of, report_storage_errors

_VOCAB = 1024  # of the tokenizer of a corpus that no run has trained one for
_TRAINED_ON = 20_000  # texts, for that
_SPEAKERS = 12
_CHARACTERS = 200
_EXTREMES = 4  # of the slowest and of the fastest
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
    downloads: DownloadLimits = DEFAULT_LIMITS,
) -> StoragePath:
    """Write the page of a manifest (or tar, or embedded:train), or of a run's directory.

    out: default RUN/inspect.html, or inspect.html here. utterances: how many to hear, drawn by
    `seed`. tokenizer: counts tokens; default the run's, or a BPE trained on the corpus.
    Raises ConfigError naming what cannot be used.
    """
    found = as_path(target)
    with report_storage_errors(public_uri(target)):
        try:
            run = found if found.is_dir() and not (found / INDEX_FILE).is_file() else None
        except StorageError as error:
            raise ConfigError(str(error)) from None
    if run is not None:
        made = read_run(run)
        index, tokens, note = made.index, made.tokenizer, made.note
    else:
        made, note = None, ""
        try:
            with report_storage_errors(public_uri(target)):
                index = build_index([target], allow_absolute=allow_absolute, downloads=downloads)
        except ManifestError as error:
            raise ConfigError(str(error)) from None
        tokens = None
    if tokenizer is not None:
        tokens = _load(tokenizer)
    corpus = None
    if index is not None:
        counter = tokens or _train_tokenizer(index, seed)
        source = "the tokenizer given" if tokenizer else "the run's tokenizer"
        source = source if tokens else f"a BPE of {_VOCAB:,} trained on this corpus"
        corpus = _corpus(index, counter, source) | {
            "sample": _sample(index, counter, utterances, seed)
        }
    page = render(
        "corpus.html",
        name=found.resolve().name,
        note=note,
        tiles=_tiles(index, made),
        corpus=corpus,
        plan=None if made is None else plan_section(made, seed),
        seed=seed,
    )
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


def _train_tokenizer(index: Index, seed: int) -> SpeechTokenizer:
    texts = index.table["text"].to_pylist()
    if len(texts) > _TRAINED_ON:
        texts = random.Random(seed).sample(texts, _TRAINED_ON)
    return SpeechTokenizer.train(texts, _VOCAB)


def _tiles(index: Index | None, made: RunPlan | None) -> list[tuple[str, str, str]]:
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
    return tiles


def _corpus(index: Index, tokenizer: SpeechTokenizer, source: str) -> dict[str, Any]:
    """Return the values of corpus.html about an index; source: of the tokenizer, in words."""
    seconds, texts = _seconds(index), index.table["text"].to_pylist()
    tokens = [len(ids) for ids in tokenizer.encode_batch(texts)]
    pace = [len(text) / s for text, s in zip(texts, seconds, strict=True)]
    token_pace = [n / s for n, s in zip(tokens, seconds, strict=True)]
    speakers = _speakers(index)
    characters = Counter(character for text in texts for character in text)
    return {
        "tokenizer": source,
        "total": len(index),
        "figures": [
            histogram("Length", "seconds", seconds),
            histogram("Text", "characters", [len(text) for text in texts], whole=True),
            histogram("Words", "between spaces", [len(text.split()) for text in texts], whole=True),
            histogram("Tokens", "per utterance", tokens, whole=True),
            histogram("Characters a second", "pace of speech", pace),
            histogram("Tokens a second", "of audio", token_pace),
        ],
        "extremes": _extremes(index, pace),
        "languages": _languages(index, tokens),
        "speakers": speakers[:_SPEAKERS],
        "all_speakers": len(speakers),
        "characters": _characters(characters),
        "all_characters": len(characters),
        "hidden": len(characters) - _CHARACTERS,
        "unstable": sum(not unicodedata.is_normalized("NFC", text) for text in texts),
        "rejects": _rejects(index),
    }


def _extremes(index: Index, pace: list[float]) -> list[tuple[str, ...]]:
    """Return the slowest and the fastest utterances."""
    order = sorted(range(len(pace)), key=lambda i: pace[i])
    rows: list[tuple[str, ...]] = []
    for i in dict.fromkeys([*order[:_EXTREMES], *order[-_EXTREMES:]]):
        row = index.table.slice(i, 1).to_pylist()[0]
        seconds = f"{row['samples'] / SAMPLING_RATE:.1f}\u00a0s"
        rows.append((f"{pace[i]:.1f}", seconds, _cut(row["id"], _LONG_ID), _cut(row["text"], 120)))
    return rows


def _languages(index: Index, tokens: list[int]) -> list[tuple[str, ...]]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    texts, named = index.table["text"].to_pylist(), index.table["language"].to_pylist()
    for language, text, s, n in zip(named, texts, _seconds(index), tokens, strict=True):
        for column, value in enumerate((1, s, len(text), n)):
            sums[_language(language)][column] += value
    return [
        (name, count(n), f"{s / 3600:.2f}", f"{s / n:.1f}", f"{chars / s:.1f}", f"{ids / s:.1f}")
        for name, (n, s, chars, ids) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]


def _speakers(index: Index) -> list[tuple[str, ...]]:
    """Return all speakers, those with most audio first."""
    seconds: dict[str, float] = defaultdict(float)
    clips: Counter[str] = Counter()
    for name, s in zip(index.table["speaker"].to_pylist(), _seconds(index), strict=True):
        if name:
            seconds[name] += s
            clips[name] += 1
    most = sorted(seconds, key=lambda name: -seconds[name])
    return [(name, count(clips[name]), f"{seconds[name] / 60:.1f}") for name in most]


def _characters(counts: Counter[str]) -> list[tuple[str, str, int]]:
    """Return name, sign and count of the most common and of the rarest characters."""
    shown = counts.most_common()
    if len(shown) > _CHARACTERS:
        shown = shown[: _CHARACTERS // 2] + shown[-_CHARACTERS // 2 :]
    return [(unicodedata.name(c, "no name").lower(), _visible(c), n) for c, n in shown]


def _rejects(index: Index) -> list[tuple[str, ...]]:
    """Return the reasons, each with its count and an example."""
    reasons = list(count_reasons(reject.reason for reject in index.rejects).items())
    first = {reject.reason: reject for reject in reversed(index.rejects)}
    return [
        (reason, count(n), _cut(first[reason].id, _LONG_ID), _cut(first[reason].detail, 200))
        for reason, n in reasons
    ]


def _sample(
    index: Index, tokenizer: SpeechTokenizer, utterances: int, seed: int
) -> list[dict[str, Any]]:
    """Draw utterances to show and to play."""
    chosen = sorted(random.Random(seed).sample(range(len(index)), min(utterances, len(index))))
    return [_utterance(row, tokenizer) for row in index.table.take(chosen).to_pylist()]


def _utterance(row: IndexRow, tokenizer: SpeechTokenizer) -> dict[str, Any]:
    about = [row["language"], row["speaker"], f"{row['samples'] / SAMPLING_RATE:.2f} s"]
    facts = [("text", row["text"]), ("prompt", row["prompt"]), ("task", row["task"])]
    facts += [("tokens", count(len(tokenizer.encode(row["text"]))))]
    facts += [("about", " · ".join(str(a) for a in about if a))]
    return {
        "id": _cut(row["id"], 120),
        "facts": [(name, value) for name, value in facts if value],
        "recordings": [_recording(part) for part in recordings(row)],
    }


def _recording(part: Recording) -> dict[str, Any]:
    try:
        samples = fit(decode(part["uri"], span_of(part)), part["samples"])
    except (AudioError, OSError) as error:
        return {"error": str(error)}
    wave, columns = waveform(samples)
    return {
        "wave": wave,
        "columns": columns,
        "mel": mel_picture(samples),
        "audio": embed(part["uri"], span_of(part), samples),
    }


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
