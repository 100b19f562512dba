"""Prepare a corpus of several windows: once, in parts, with the rows and notes of one window."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import characters, text

from omni.config import Config, load_config
from omni.corpus.build import index_few
from omni.corpus.sources import Options
from omni.errors import ConfigError, ManifestError
from omni.metrics.run_files import write_event
from omni.metrics.score import normalize
from omni.plan.windows_file import (
    add_window_bins,
    read_window_bins,
    read_windows_file,
    windows_path,
)
from omni.report.plan_page import plan_section, read_run
from omni.run import prepare_parts
from omni.run.prepare import Prepared, prepare
from omni.run.prepared_part import plain_sentence
from omni.run.restore_parts import restore_parts
from tests.helpers.whole_runs import ROOT, embedded, write_manifest

WINDOW = 16


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting others takes seconds."""
    monkeypatch.setattr(prepare_parts, "_FEW", 10**6)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    train = write_manifest(folder / "train", embedded("train", 60))
    # Two of its sentences are in training too.
    held = [{**row, "id": f"held-{n}"} for n, row in enumerate(embedded("train", 2))]
    return train, write_manifest(folder / "dev", embedded("dev", 6) + held)


@pytest.fixture
def config(manifests: tuple[Path, Path], tmp_path: Path) -> Callable[..., Config]:
    train, dev = manifests

    def make(window: int = WINDOW, **sections: dict[str, object]) -> Config:
        data = {"train": str(train), "dev": [str(dev)], "allow_absolute": True}
        return Config.model_validate(
            {
                "run": {"storage": str(tmp_path)},
                "tokenizer": {"vocab_size": 300},
                "model": {"n_layer": 1, "n_head": 1, "n_embd": 32},
                **sections,
                "data": {**data, "window_utterances": window, **sections.get("data", {})},
                "optim": {
                    "bin_positions": 256,
                    "bins_per_step": 2,
                    "steps": 20,
                    **sections.get("optim", {}),
                },
            }
        )

    return make


def _rows(prepared: Prepared) -> dict[str, dict[str, object]]:
    """All rows that the bins of the run hold, by id."""
    split, found = prepared.splits["train"], {}
    for number in range(split.plan.bins):
        rows = split.of_bin(number)
        taken = rows.table.take(rows.members(number).rows).to_pylist()
        found |= {row["id"]: row for row in taken}
    return found


def test_a_corpus_that_fits_one_window_is_prepared_as_before(config: Callable[..., Config]) -> None:
    whole, same = prepare(config(262_144)), prepare(config(60))
    assert whole.splits["train"].reader is None
    assert whole.fingerprints == same.fingerprints


def test_the_run_of_smoke_has_the_fingerprints_of_before_there_were_windows(tmp_path: Path) -> None:
    smoke = load_config(ROOT / "configs" / "smoke.yaml")
    run = smoke.run.model_copy(update={"storage": str(tmp_path)})
    found = prepare(smoke.model_copy(update={"run": run})).fingerprints
    assert found["data.train"] == "ce08ce9cee84eec7693c9993"
    assert found["plan"] == "52cd539e7dd364d376789c34"
    assert found["tokens"] == "580f0b8cae5fdaec6edc7090"


def test_the_rows_of_windows_are_those_of_the_whole_corpus(config: Callable[..., Config]) -> None:
    whole, windowed = prepare(config(60)), prepare(config())
    split = windowed.splits["train"]
    assert split.reader is not None and split.reader.windows.per_epoch == 4
    split = pickle.loads(pickle.dumps(split))  # As it reaches other processes.
    assert (
        split.reader is not None
        and split.rows == 60
        and split.hours == pytest.approx(whole.splits["train"].hours)
    )
    assert windowed.tokenizer.to_json() == whole.tokenizer.to_json()
    expected = {row["id"]: row for row in whole.splits["train"].table.to_pylist()}
    assert _rows(windowed) == expected
    assert split.plan.bins == 40 and split.plan.epoch(40) == pytest.approx(
        whole.splits["train"].plan.epoch(40), rel=0.25
    )
    assert [note for note in windowed.notes if "also occur" in note] == [
        note for note in whole.notes if "also occur" in note
    ]
    assert "2 of 8 dev sentences" in " ".join(windowed.notes)
    assert windowed.config.eval.max_new_tokens == whole.config.eval.max_new_tokens
    assert windowed.fingerprints["plan"] != whole.fingerprints["plan"]


def test_a_second_start_reads_totals_and_lengths_only(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config())

    def refuse(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(prepare_parts, "prepare_part", refuse)
    assert prepare(config()).notes == first.notes
    assert prepare(config(optim={"steps": 30})).fingerprints == first.fingerprints
    # Another text, tokenizer or number of positions makes other rows.
    for changed in ({"data": {"case": "lower"}}, {"tokenizer": {"vocab_size": 280}}):
        with pytest.raises(AssertionError, match="prepared again"):
            prepare(config(**changed))


def test_parts_that_are_there_are_not_prepared_again(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: some parts are finished, their totals are not. Or a file was deleted."""
    first = prepare(config())
    [summary] = (tmp_path / "cache" / "prepared").glob("*.json")
    summary.unlink()
    parts = sorted((tmp_path / "cache" / "prepared").glob("*.parquet"))
    assert len(parts) == 60
    parts[3].write_bytes(parts[3].read_bytes()[:-9])
    times = {path: path.stat().st_mtime_ns for path in parts}
    assert prepare(config()).fingerprints == first.fingerprints
    changed = [path for path in parts if path.stat().st_mtime_ns != times[path]]
    assert changed == [parts[3]], "the damaged one"
    parts[5].unlink()
    assert prepare(config()).fingerprints == first.fingerprints and parts[5].is_file()


def test_parts_of_an_index_are_kept_beside_it(
    config: Callable[..., Config], manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    index = tmp_path / "index"
    index_few(str(manifests[0]), index, Options(allow_absolute=True))
    prepared = prepare(config(data={"train": str(index)}))
    assert len([*(index / "prepared").glob("*.parquet")]) == 1
    assert not [*(tmp_path / "cache" / "prepared").glob("*.parquet")]
    expected = prepare(config(60)).splits["train"].table["id"].to_pylist()
    assert sorted(_rows(prepared)) == sorted(expected)


def test_ids_of_several_sources_are_compared(
    config: Callable[..., Config], manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    index, few = tmp_path / "index", write_manifest(tmp_path / "few", embedded("train", 2))
    index_few(str(manifests[0]), index, Options(allow_absolute=True))
    twice = embedded("train", 1)[0]["id"]
    with pytest.raises((ConfigError, ManifestError), match=f"the id '{twice}' occurs twice"):
        prepare(config(data={"train": [str(index), str(few)]}))


def test_a_mixture_keeps_prompts_languages_and_weights_of_its_sources(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    rows = embedded("train", 60)
    for row in rows:
        row.pop("language", None)
    sources = [
        {"source": str(write_manifest(tmp_path / "a", rows[:40])), "prompt": "A", "language": "en"},
        {"source": str(write_manifest(tmp_path / "b", rows[40:])), "weight": 2, "language": "fr"},
    ]
    prepared = prepare(config(data={"train": sources}))
    split = prepared.splits["train"]
    assert split.reader is not None and split.reader.windows.per_epoch == 5
    found = _rows(prepared)
    assert {(row["prompt"], row["language"]) for row in found.values()} == {("A", "en"), ("", "fr")}
    for number in range(5):
        members = split.reader.plan(number).members
        assert (members < 40).sum() == 8 and (members >= 40).sum() == 8


def test_speeds_are_those_of_the_whole_corpus(config: Callable[..., Config]) -> None:
    speed = {"augment": {"speed": [0.9, 1.0, 1.1]}}
    whole, windowed = prepare(config(60, **speed)), prepare(config(**speed))
    by_id = {name: n for n, name in enumerate(whole.splits["train"].table["id"].to_pylist())}
    augmentation = whole.splits["train"].augmentation
    assert augmentation is not None and augmentation.speeds is not None
    split = windowed.splits["train"]
    for number in range(split.plan.bins):
        rows = split.of_bin(number)
        members = rows.members(number)
        ids = rows.table.take(members.rows)["id"].to_pylist()
        assert rows.augmentation is not None and rows.augmentation.speeds is not None
        need = 0
        for row, name, pass_ in zip(members.rows, ids, members.passes, strict=True):
            speeds = rows.augmentation.speeds
            assert speeds.of(row, pass_) == augmentation.speeds.of(by_id[name], pass_)
            need += augmentation.speeds.lengths(pass_)[by_id[name]]
        assert need <= 256


def test_rejects_and_wrong_rows_are_counted_and_named(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    rows = embedded("train", 60)
    rows[7]["text"] = "word " * 300
    train = str(write_manifest(tmp_path / "long", rows))
    prepared = prepare(config(data={"train": train}))
    [reject] = prepared.rejects
    assert (reject.id, reject.reason) == (str(rows[7]["id"]), "longer than a bin")
    with pytest.raises(ConfigError, match=r"data.max_rejects: 1 of 60 rows"):
        prepare(config(data={"train": train, "max_rejects": 0.01}))
    with pytest.raises(ConfigError, match="data.tasks: data.train has rows of the task"):
        prepare(config(data={"tasks": {"translate": {}}}))


def test_the_plan_is_made_again_from_the_run_directory(config: Callable[..., Config]) -> None:
    prepared = prepare(config())
    split, run = prepared.splits["train"], prepared.config.run_dir
    run.mkdir(parents=True)
    prepared.write_plan_file()
    fingerprint = prepared.fingerprints["plan"]
    saved = read_windows_file(windows_path(run, fingerprint))
    windows = saved.windows()
    assert windows.fingerprint(saved.index_fingerprint, saved.bins_per_step) == fingerprint
    assert split.reader is not None
    assert np.array_equal(windows.plan(5).members, split.reader.windows.plan(5).members)
    assert split.first is not None
    (run / "config.yaml").write_text(prepared.config.to_yaml())
    write_event(run, "attempt", 0, plan=fingerprint)
    shown = read_run(run)
    section = plan_section(shown, seed=0)
    assert shown.plan.bins == split.first.window.bins and "4 windows" in shown.note
    assert section["filled"] == pytest.approx(prepared.filled)
    for number in (0, 1, 3):
        add_window_bins(run, fingerprint, number, 7 + number)
    assert read_window_bins(run, fingerprint) == [7, 8], "one is missing from here on"
    path = windows_path(run, fingerprint)
    facts = json.loads(path.read_text())
    facts["digests"][0] = "other"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="other positions than were planned"):
        [read_windows_file(path).windows().plan(n) for n in range(4)]


@settings(deadline=None)
@given(text(characters(max_codepoint=0x7F)) | text(alphabet="aB 0'-.,<>[]()é\t\n"))
def test_plain_sentences_are_those_of_the_normalizer(said: str) -> None:
    assert plain_sentence(said) == normalize(said, language="")


@pytest.mark.slow
def test_processes_prepare_what_one_does(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = prepare(config())
    monkeypatch.setattr(prepare_parts, "_FEW", 0)
    monkeypatch.setattr(prepare_parts.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(prepare_parts, "_PROGRESS_SECONDS", 0.0)
    said: list[str] = []
    elsewhere = config(run={"storage": str(tmp_path / "other")})
    together = prepare(elsewhere, said.append)
    assert together.fingerprints == alone.fingerprints and said


def test_parts_that_were_removed_during_a_run_are_made_again(
    config: Callable[..., Config], manifests: tuple[Path, Path]
) -> None:
    prepared = prepare(config())
    reader = prepared.splits["train"].reader
    assert reader is not None and not restore_parts(prepared), "nothing is gone"
    window = reader.plan(3)
    rows, lengths = reader.files.rows(window)
    for part in range(len(reader.files)):
        Path(reader.files.path(part)).unlink()
    with pytest.raises(FileNotFoundError):
        reader.files.rows(window)
    assert restore_parts(prepared)
    again, same = reader.files.rows(window)
    assert again.equals(rows) and (same.natural == lengths.natural).all()

    Path(reader.files.path(0)).unlink()
    train, _ = manifests
    text = train.read_text()
    train.write_text("".join(text.splitlines(keepends=True)[1:]))
    try:
        with pytest.raises(ConfigError, match=r"^data\.train\b.*\bchanged"):
            restore_parts(prepared)
    finally:
        train.write_text(text)
