"""Manifests become an index: one row per utterance, lengths from the recordings themselves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

import omni
from omni.corpus.index import SCHEMA, Index, build_index
from omni.corpus.lengths import measure_data
from omni.corpus.manifest import ManifestError, manifest_path
from omni.metrics.score import normalize

Record = Callable[..., Path]
Manifest = Callable[..., str]
CORPUS = Path(omni.__file__).parent / "assets" / "prompts-en"


def _rows(index: Index) -> list[dict[str, Any]]:
    return index.table.to_pylist()


# -- rows --------------------------------------------------------------------------------------


def test_a_row_holds_what_the_manifest_says(record: Record, manifest: Manifest) -> None:
    path = record("one.wav", 1.5)
    row = {
        "id": "u1",
        "audio": "one.wav",
        "text": "  Hello there. ",
        "prompt": "Write:",
        "language": "en",
        "speaker": "Ann",
        "task": "dictation",
    }
    index = build_index([manifest(row)], prompt="unused where a row has its own")
    assert index.table.schema == SCHEMA and index.rejects == []
    [found] = _rows(index)
    assert len(found.pop("key")) == 32
    assert found == {
        "id": "u1",
        "uri": str(path),
        "offset": None,
        "length": None,
        "start": 0.0,
        "duration": None,
        "samples": 24_000,
        "text": "Hello there.",
        "prompt": "Write:",
        "language": "en",
        "speaker": "Ann",
        "task": "dictation",
        "messages": None,
        "audios": None,
        "labels": None,
    }


def test_audio_and_text_are_enough(record: Record, manifest: Manifest) -> None:
    record("one.wav")
    spec = manifest({"audio": "one.wav", "text": "a"}, name="speech/train.jsonl")
    record("speech/one.wav")
    [row] = _rows(build_index([spec], prompt="Transcribe:"))
    assert row["id"] == "speech/train:1"
    assert row["prompt"] == "Transcribe:"
    assert row["language"] is None and row["speaker"] is None


def test_paths_are_relative_to_the_manifest(
    record: Record, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    near, far = record("corpus/clips/near.wav"), record("elsewhere/far.wav")
    manifest(
        {"audio": "clips/near.wav", "text": "near"},
        {"audio": str(far), "text": "far"},
        name="corpus/train.jsonl",
    )
    (tmp_path / "corpus" / "clips").joinpath("deeper").mkdir()
    monkeypatch.chdir(tmp_path / "corpus" / "clips" / "deeper")
    assert [
        row["uri"] for row in _rows(build_index(["../../train.jsonl"], allow_absolute=True))
    ] == [
        str(Path.cwd() / "../../clips/near.wav"),
        str(far),
    ]
    assert near.is_file()


def test_manifests_and_rows_keep_their_order(record: Record, manifest: Manifest) -> None:
    record("one.wav")
    first = manifest(*({"audio": "one.wav", "text": t} for t in "dab"), name="first.jsonl")
    second = manifest(*({"audio": "one.wav", "text": t} for t in "ce"), name="second.jsonl")
    assert [row["text"] for row in _rows(build_index([second, first]))] == list("cedab")


def test_blank_lines_and_unknown_fields_are_passed_over(record: Record, manifest: Manifest) -> None:
    record("one.wav")
    row = {"audio": "one.wav", "text": "a", "source": {"corpus": 3}, "id": 17}
    [found] = _rows(build_index([manifest("", row, "   ")]))
    assert found["id"] == "17", "numbers are as good an id as text"


def test_the_duration_of_a_manifest_is_no_length_but_a_check(
    record: Record, manifest: Manifest
) -> None:
    record("one.wav", 1.0)
    spec = manifest(
        *(
            {"audio": "one.wav", "text": "a", "id": name, "duration": seconds}
            for name, seconds in (("less", 0.1), ("near", 1.2), ("more", 1.3), ("far", 3600))
        )
    )
    index = build_index([spec])
    assert [(r["id"], r["samples"], r["duration"]) for r in _rows(index)] == [
        ("less", 16_000, None),
        ("near", 16_000, None),
    ]
    assert [(r.id, r.reason) for r in index.rejects] == [
        ("more", "shorter than the manifest says"),
        ("far", "shorter than the manifest says"),
    ]
    assert len(build_index([spec], duration_tolerance=0.2)) == 3


def test_offset_and_duration_give_a_span(record: Record, manifest: Manifest) -> None:
    record("long.wav", 3.0)
    spec = manifest(
        {"audio": "long.wav", "text": "a", "offset": 0, "duration": 1.25},
        {"audio": "long.wav", "text": "b", "offset": 1.25, "duration": 0.5},
        {"audio": "long.wav", "text": "c", "offset": 1.75},
    )
    rows = _rows(build_index([spec]))
    assert [(r["start"], r["duration"], r["samples"]) for r in rows] == [
        (0.0, 1.25, 20_000),
        (1.25, 0.5, 8_000),
        (1.75, None, 20_000),
    ]
    assert len({r["key"] for r in rows}) == 3, "each span has features of its own"


# -- errors ------------------------------------------------------------------------------------


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere\.jsonl"):
        build_index([str(tmp_path / "nowhere.jsonl")])


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"audio": "one.wav", "te', ["JSON"]),
        ("one.wav|hello", ["JSON"]),
        ('["one.wav", "hello"]', ["one.wav"]),
        ('{"audio": "one.wav"}', ["'text'"]),
        ('{"text": "hello"}', ["'audio'"]),
        ('{"audio": 3, "text": "a"}', ["'audio'", "3"]),
        ('{"audio": "one.wav", "text": null}', ["'text'", "None"]),
        ('{"audio": "one.wav", "text": "a", "offset": "0.5"}', ["'offset'", "'0.5'"]),
        ('{"audio": "one.wav", "text": "a", "duration": true}', ["'duration'", "True"]),
        ('{"audio": "one.wav", "text": "a", "id": false}', ["'id'", "False"]),
        ('{"audio": "one.wav", "text": "a", "language": ["en"]}', ["'language'", "['en']"]),
        ('{"audio": "one.wav", "text": "a", "prompt": 1}', ["'prompt'", "1"]),
        ('{"audio": "one.wav", "text": "a", "speaker": 7}', ["'speaker'", "7"]),
    ],
)
def test_a_wrong_row_is_an_error_with_its_place(
    record: Record, manifest: Manifest, line: str, named: list[str]
) -> None:
    record("one.wav")
    spec = manifest({"audio": "one.wav", "text": "fine"}, line)
    with pytest.raises(ManifestError) as caught:
        build_index([spec])
    place, _, detail = str(caught.value).partition(":2: ")
    assert place == spec and all(name in detail for name in named)


def test_a_manifest_of_another_encoding_is_an_error_with_its_place(manifest: Manifest) -> None:
    spec = manifest()
    Path(spec).write_bytes('{"audio": "one.wav", "text": "für"}\n'.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"corpus\.jsonl:1: "):
        build_index([spec])


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_manifest(manifest: Manifest, lines: tuple[str, ...]) -> None:
    with pytest.raises(ManifestError, match=r"corpus\.jsonl"):
        build_index([manifest(*lines)])


def test_ids_must_not_repeat_within_a_split(record: Record, manifest: Manifest) -> None:
    record("one.wav")
    first = manifest({"id": "u1", "audio": "one.wav", "text": "a"}, name="first.jsonl")
    second = manifest({"id": "u1", "audio": "one.wav", "text": "b"}, name="second.jsonl")
    with pytest.raises(ManifestError, match="'u1'") as caught:
        build_index([first, second])
    assert first in str(caught.value) and second in str(caught.value)


@pytest.mark.parametrize(
    "field", ['"offset": NaN', '"offset": Infinity', '"offset": 0, "duration": NaN']
)
def test_a_number_that_is_not_finite_is_an_error_with_its_place(
    record: Record, manifest: Manifest, field: str
) -> None:
    record("one.wav")
    with pytest.raises(ManifestError, match="corpus.jsonl:1: "):
        build_index([manifest('{"audio": "one.wav", "text": "a", ' + field + "}")])


@pytest.mark.parametrize(
    "line",
    [
        '{"audio": "one.wav", "text": "half a pair \\ud83d"}',
        '{"audio": "o\\u0000ne.wav", "text": "a"}',
    ],
)
def test_text_that_no_file_can_hold_is_an_error_with_its_place(
    record: Record, manifest: Manifest, line: str
) -> None:
    record("one.wav")
    with pytest.raises(ManifestError, match="corpus.jsonl:1: "):
        build_index([manifest(line)])


def test_zero_is_an_id(record: Record, manifest: Manifest) -> None:
    record("one.wav")
    [row] = _rows(build_index([manifest({"id": 0, "audio": "one.wav", "text": "a"})]))
    assert row["id"] == "0"


# -- rejects -----------------------------------------------------------------------------------


def test_a_bad_recording_is_left_out_and_the_rest_kept(
    record: Record, manifest: Manifest, tmp_path: Path
) -> None:
    record("good.wav")
    (tmp_path / "text.wav").write_text("no recording at all")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16_000)
    spec = manifest(
        {"id": "a", "audio": "nowhere.wav", "text": "a"},
        {"id": "b", "audio": "text.wav", "text": "b"},
        {"id": "c", "audio": "good.wav", "text": "c"},
        {"id": "d", "audio": "silent.wav", "text": "d"},
        {"id": "e", "audio": "good.wav", "text": "e", "offset": 0.5, "duration": 9},
        {"id": "f", "audio": "good.wav", "text": " \n"},
        {"id": "g", "audio": "good.wav", "text": "g"},
        {"id": "h", "audio": "", "text": "h"},
    )
    index = build_index([spec])
    assert [row["id"] for row in _rows(index)] == ["c", "g"]
    assert {reject.id: reject.reason for reject in index.rejects} == {
        "a": "missing",
        "b": "unreadable",
        "d": "empty",
        "e": "span outside the file",
        "f": "empty text",
        "h": "missing",
    }
    first = index.rejects[0].to_dict()
    assert set(first) == {"id", "uri", "reason", "detail"}
    assert first["uri"] == str(tmp_path / "nowhere.wav") and first["uri"] in first["detail"]


def test_no_row_left_is_an_error_that_shows_the_first_reason(manifest: Manifest) -> None:
    spec = manifest(*({"id": t, "audio": f"{t}.wav", "text": t} for t in "xyz"))
    with pytest.raises(ManifestError, match=r"\b3\b.*\bx: missing: .*x\.wav"):
        build_index([spec])


# -- measurements kept between runs ------------------------------------------------------------


@pytest.fixture
def measured(record: Record, manifest: Manifest, tmp_path: Path) -> tuple[str, Path]:
    """A manifest of two recordings whose measurements are in a cache folder."""
    record("one.wav", 1.0)
    record("two.wav", 2.0)
    spec = manifest({"audio": "one.wav", "text": "a"}, {"audio": "two.wav", "text": "b"})
    cache = tmp_path / "cache"
    build_index([spec], cache_dir=cache)
    return spec, cache


def _lengths(index: Index) -> list[int]:
    return index.table["samples"].to_pylist()


def test_measurements_are_kept_and_used(measured: tuple[str, Path]) -> None:
    spec, cache = measured
    [kept] = cache.glob("*.parquet")
    assert build_index([spec], cache_dir=cache).table == build_index([spec]).table
    # Another number in the file shows that it is the file that answers.
    table = pq.read_table(kept)
    column = table.column_names.index("samples")
    pq.write_table(table.set_column(column, "samples", pa.array([111, 222])), kept)
    assert sorted(_lengths(build_index([spec], cache_dir=cache))) == [111, 222]


def test_a_replaced_recording_is_measured_anew(measured: tuple[str, Path], record: Record) -> None:
    spec, cache = measured
    before = build_index([spec], cache_dir=cache)
    record("one.wav", 1.5)
    after = build_index([spec], cache_dir=cache)
    assert _lengths(after) == [24_000, 32_000]
    assert after.table["key"][0] != before.table["key"][0]
    assert after.table["key"][1] == before.table["key"][1]


def test_a_recording_replaced_by_one_of_the_same_size_is_measured_anew(
    measured: tuple[str, Path], record: Record, tmp_path: Path
) -> None:
    spec, cache = measured
    before = build_index([spec], cache_dir=cache)
    size = (tmp_path / "one.wav").stat().st_size
    path = record("one.wav", 2.0, rate=8_000)
    assert path.stat().st_size == size
    os.utime(path, ns=(0, 0))  # a clock too coarse to tell the two apart is not the point here
    after = build_index([spec], cache_dir=cache)
    assert _lengths(after) == [32_000, 32_000]
    assert after.table["key"][0] != before.table["key"][0]


def test_a_recording_that_vanished_is_missing_whatever_is_kept(
    measured: tuple[str, Path], tmp_path: Path
) -> None:
    spec, cache = measured
    (tmp_path / "one.wav").unlink()
    assert [r.reason for r in build_index([spec], cache_dir=cache).rejects] == ["missing"]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"garbage" * 50, lambda b: b[:-20]])
def test_damaged_measurements_are_ignored_and_replaced(
    measured: tuple[str, Path], damage: Callable[[bytes], bytes]
) -> None:
    spec, cache = measured
    [kept] = cache.glob("*.parquet")
    kept.write_bytes(damage(kept.read_bytes()))
    assert _lengths(build_index([spec], cache_dir=cache)) == [16_000, 32_000]
    assert sorted(pq.read_table(kept)["samples"].to_pylist()) == [16_000, 32_000]


def test_a_table_of_something_else_is_ignored_and_replaced(measured: tuple[str, Path]) -> None:
    spec, cache = measured
    [kept] = cache.glob("*.parquet")
    pq.write_table(pa.table({"something": ["else"]}), kept)
    assert _lengths(build_index([spec], cache_dir=cache)) == [16_000, 32_000]


def test_manifests_do_not_share_measurements(
    measured: tuple[str, Path], record: Record, manifest: Manifest
) -> None:
    spec, cache = measured
    record("other/one.wav", 0.5)
    other = manifest({"audio": "one.wav", "text": "a"}, name="other/corpus.jsonl")
    both = build_index([spec, other], cache_dir=cache)
    assert _lengths(both) == [16_000, 32_000, 8_000]
    assert len(list(cache.glob("*.parquet"))) == 2


# -- fingerprint -------------------------------------------------------------------------------


def _fingerprint(*specs: str, prompt: str = "") -> str:
    return build_index(specs, prompt=prompt).fingerprint


def test_the_fingerprint_follows_content_and_order_not_the_place(
    record: Record, manifest: Manifest, tmp_path: Path
) -> None:
    a, b = {"audio": "one.wav", "text": "a"}, {"audio": "two.wav", "text": "b"}
    record("corpus/one.wav", 1.0)
    record("corpus/two.wav", 2.0)
    spec = manifest(a, b, name="corpus/train.jsonl")
    original = _fingerprint(spec)
    shutil.copytree(tmp_path / "corpus", tmp_path / "moved" / "here")
    assert _fingerprint(str(tmp_path / "moved" / "here" / "train.jsonl")) == original

    variants = {
        "order": _fingerprint(manifest(b, a, name="corpus/train.jsonl")),
        "text": _fingerprint(manifest(a, b | {"text": "c"}, name="corpus/train.jsonl")),
        "prompt": _fingerprint(manifest(a, b | {"prompt": "c"}, name="corpus/train.jsonl")),
        "span": _fingerprint(manifest(a, b | {"offset": 1}, name="corpus/train.jsonl")),
        "fewer": _fingerprint(manifest(a, name="corpus/train.jsonl")),
    }
    spec = manifest(a, b, name="corpus/train.jsonl")
    variants["default prompt"] = _fingerprint(spec, prompt="Write:")
    record("corpus/two.wav", 2.0, hertz=441)
    variants["audio of the same length"] = _fingerprint(spec)
    record("corpus/two.wav", 2.0)
    assert _fingerprint(spec) == original
    assert len({original, *variants.values()}) == len(variants) + 1, variants


def test_a_file_has_the_same_key_wherever_it_lies(record: Record, manifest: Manifest) -> None:
    """The feature cache encodes a recording once, under however many names it is listed."""
    record("one.wav")
    record("copy/one-again.wav")
    record("other.wav", hertz=441)
    spec = manifest(
        *({"audio": a, "text": "a"} for a in ("one.wav", "copy/one-again.wav", "other.wav"))
    )
    one, again, other = build_index([spec]).table["key"].to_pylist()
    assert one == again != other


def _between_silence(path: Path, seed: int, subtype: str) -> None:
    """A second of noise with five seconds of digital silence before it and after it."""
    silence, rng = np.zeros(5 * 16_000), np.random.default_rng(seed)
    samples = np.concatenate([silence, rng.uniform(-0.1, 0.1, 16_000), silence])
    soundfile.write(path, samples, 16_000, subtype)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "ULAW"])
def test_recordings_that_begin_and_end_in_silence_have_keys_of_their_own(
    manifest: Manifest, tmp_path: Path, subtype: str
) -> None:
    """They are as long as each other, and have the same bytes at both ends."""
    names = ["one.wav", "another.wav", "again.wav"]
    for name, seed in zip(names, (0, 1, 0), strict=True):
        _between_silence(tmp_path / name, seed, subtype)
    data = [(tmp_path / name).read_bytes() for name in names]
    assert data[0] != data[1] and len(data[0]) == len(data[1])
    assert (data[0][:65536], data[0][-65536:]) == (data[1][:65536], data[1][-65536:])
    spec = manifest(*({"audio": name, "text": "a"} for name in names))
    one, another, again = build_index([spec]).table["key"].to_pylist()
    assert one == again != another
    assert [measure_data(d, 0.0, None)["key"] for d in data] == [one, another, again]


# -- the corpus that comes with omni -----------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> dict[str, Index]:
    return {name: build_index([f"embedded:{name}"]) for name in ("train", "dev", "test")}


def test_the_embedded_corpus_is_whole(embedded: dict[str, Index]) -> None:
    assert {name: len(index) for name, index in embedded.items()} == {
        "train": 392,
        "dev": 55,
        "test": 32,
    }
    assert all(index.rejects == [] for index in embedded.values())
    assert embedded["train"].hours == pytest.approx(0.2835, abs=1e-4)


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_durations_of_the_embedded_manifests_are_those_of_the_clips(
    embedded: dict[str, Index], name: str
) -> None:
    lines = (CORPUS / f"{name}.jsonl").read_text().splitlines()
    claimed = [json.loads(line)["duration"] for line in lines]
    assert np.allclose(np.array(_lengths(embedded[name])) / 16_000, claimed, atol=0.02)


@pytest.mark.parametrize("name", ["dev", "test"])
def test_no_held_out_sentence_occurs_in_training(embedded: dict[str, Index], name: str) -> None:
    def sentences(split: str) -> set[str]:
        # Without case and punctuation; the English normaliser would write both "zero" and the
        # letter "o" as 0.
        return {normalize(text, "basic") for text in embedded[split].table["text"].to_pylist()}

    assert sentences(name) & sentences("train") == set()


def test_an_embedded_name_that_does_not_exist() -> None:
    with pytest.raises(ManifestError, match="embedded:train.*embedded:dev.*embedded:test"):
        manifest_path("embedded:nope")


@pytest.mark.parametrize("field", ["offset", "duration"])
@pytest.mark.parametrize("value", ["1e308", "-1e308", "1" + "0" * 400])
def test_spans_of_no_recording_are_named(
    manifest: Manifest, record: Record, field: str, value: str
) -> None:
    record("one.wav")
    row = '{"audio": "one.wav", "text": "a", "offset": 0, "duration": 1}'
    line = row.replace(f'"{field}": {0 if field == "offset" else 1}', f'"{field}": {value}')
    with pytest.raises(ManifestError, match=rf"corpus\.jsonl:1: .*'{field}'"):
        build_index([manifest(line)])


# -- files of others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "clips/../../secret.wav", "..", "./../x.wav"]
)
def test_a_manifest_cannot_read_outside_its_folder(
    manifest: Manifest, record: Record, name: str
) -> None:
    record("one.wav")
    spec = manifest({"audio": "one.wav", "text": "a"}, {"audio": name, "text": "b"})
    with pytest.raises(ManifestError) as caught:
        build_index([spec])
    said = str(caught.value)
    assert said.startswith(f"{spec}:2: ") and "'audio'" in said
    assert repr(name) in said and "data.allow_absolute" in said


def test_paths_that_come_back_and_links_of_the_owner_stay_inside(
    manifest: Manifest, record: Record, tmp_path: Path
) -> None:
    record("corpus/clips/one.wav")
    record("elsewhere/two.wav")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    spec = manifest(
        {"audio": "clips/../clips/one.wav", "text": "a"},
        {"audio": "link/two.wav", "text": "b"},
        name="corpus/train.jsonl",
    )
    assert len(build_index([spec])) == 2
