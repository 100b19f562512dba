"""Trackers get every logged step once: through crashes, restarts, and when one of them fails."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import train
from omni.config import Config, load_config
from omni.errors import ConfigError
from omni.metrics.follower import METRICS, Follower
from omni.metrics.run_files import append_json, keep_lines
from omni.metrics.tracker_process import CLOSE_SECONDS, Trackers
from omni.metrics.trackers import OPEN, check_trackers, flat, results, scalars

SUMMARY = {"steps": 10, "dev_wer": 0.5, "rejects": {"missing": 2}, "throughput_limit": "decode"}


def _train(step: int, attempt: int = 0) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "steps": 10,
        "epoch": step / 10,
        "seconds": 0.5 * step,
        "loss": 10.0 * attempt + 1 / step,
        "accuracy": None,
        "lr": 1e-3,
        "tokens_per_second": 100.0,
        "limit": "decode",
        "busy": {"trainer": 0.5, "encoder": 0.1},
        "phases": {"forward": 1.0},
        "tasks": {"write": {"loss": 2.0, "tokens": 7}},
    }


def _eval(step: int, attempt: int = 0) -> dict[str, Any]:
    said = {"id": "a", "reference": "you are number seven", "hypothesis": "<b>you</b>\nare seven"}
    return {
        "kind": "eval",
        "step": step,
        "epoch": step / 10,
        "seconds": 0.5 * step,
        "dev_loss": attempt + 2 / step,
        "dev_wer": None if step < 5 else 0.25,
        "shuffled_audio_gap": 0.1,
        "layers": {"3": 0.75},
        "examples": [said],
    }


class _Run:
    """The metrics file of a run as its workers write it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.config = load_config(None, ["--run.storage", str(folder), *overrides])
        self.folder = self.config.run_dir
        self.folder.mkdir(parents=True)
        self.metrics = self.folder / METRICS
        self.said: list[str] = []

    def log(self, steps: Sequence[int], attempt: int = 0) -> None:
        for step in steps:
            append_json(self.metrics, [_train(step, attempt)])
            if step % 5 == 0:
                append_json(self.metrics, [_eval(step, attempt)])

    def restart(self, step: int) -> None:
        """What a group of workers does that continues from a checkpoint."""
        keep_lines(self.metrics, lambda row: row["step"] <= step)

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in _rows(self.metrics) if row["kind"] == "train"}

    def points(self, tag: str) -> list[tuple[int, float]]:
        """A curve as TensorBoard shows it."""
        return [(e.step, e.value) for e in board(self.folder).Scalars(tag)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def board(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def _once(points: list[tuple[int, float]], expected: dict[int, float]) -> None:
    assert [step for step, _ in points] == sorted(expected)
    assert dict(points) == pytest.approx(expected, rel=1e-6)


# -- names -------------------------------------------------------------------------------------


def test_figures_have_groups_and_nothing_else_is_sent() -> None:
    assert scalars(_train(2)) == {
        "progress/epoch": 0.2,
        "progress/seconds": 1.0,
        "train/loss": 0.5,
        "train/lr": 1e-3,
        "train/tasks/write/loss": 2.0,
        "train/tasks/write/tokens": 7.0,
        "throughput/tokens_per_second": 100.0,
        "throughput/busy/trainer": 0.5,
        "throughput/busy/encoder": 0.1,
        "phases/forward": 1.0,
    }
    assert scalars(_eval(5)) == {
        "dev/loss": 0.4,
        "dev/wer": 0.25,
        "dev/shuffled_audio_gap": 0.1,
        "layers/3": 0.75,
    }
    assert "dev/wer" not in scalars(_eval(1)), "not measured"
    assert scalars({"kind": "train", "step": 1, "loss": float("nan")}) == {}
    assert scalars({"kind": "note", "step": 1, "text": "the cache is full"}) == {}
    assert results(SUMMARY) == {
        "summary/steps": 10.0,
        "summary/dev_wer": 0.5,
        "summary/rejects/missing": 2.0,
    }
    assert flat({"a": {"b": {"c": 1}}, "d": []}) == {"a/b/c": 1, "d": []}


# -- TensorBoard -------------------------------------------------------------------------------


def test_a_rewound_and_continued_run_has_each_step_once(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    with Trackers(run.config, run.said.append) as trackers:
        follower = Follower(run.folder, [trackers.tensorboard])
        run.log(range(1, 8))
        follower.poll()
        run.restart(3)  # a worker was killed
        follower.poll()
        run.log(range(4, 6), attempt=1)
        follower.poll()
        _once(run.points("train/loss"), run.losses())
        run.restart(4)  # another, and nobody looks before the step is done again
        run.log(range(5, 7), attempt=2)
        follower.poll()
        _once(run.points("train/loss"), run.losses())
        run.log([7], attempt=2)  # logged, then the driver was killed with everything

    run.restart(5)  # a new driver
    with Trackers(run.config, run.said.append) as trackers:
        follower = Follower(run.folder, [trackers.tensorboard])
        follower.poll()
        files = sorted((run.folder / "tensorboard").iterdir())
        assert len(files) == 3, "the second driver has nothing to write yet"
        run.log(range(6, 11), attempt=3)
        follower.poll()
        trackers.complete(SUMMARY)
    _once(run.points("train/loss"), run.losses())
    _once(run.points("dev/loss"), {5: 2 + 0.4, 10: 3 + 0.2})
    _once(run.points("summary/dev_wer"), {10: 0.5})
    assert run.said == []


def test_a_run_that_goes_on_repeats_nothing(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.log(range(1, 4))  # before there were trackers
    for steps in (range(4, 6), range(6, 6), range(6, 9)):
        with (
            Trackers(run.config, run.said.append) as trackers,
            Follower(run.folder, [trackers.tensorboard]),
        ):
            run.log(steps)
        _once(run.points("train/loss"), run.losses())
    assert len(list((run.folder / "tensorboard").iterdir())) == 2, "one driver had no news"
    _once(run.points("dev/loss"), {5: 0.4})


def test_a_step_that_was_sent_in_part_comes_again_whole(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    for row in (_train(4), _train(5)):
        append_json(run.metrics, [row])
        with Trackers(run.config, run.said.append) as trackers:
            Follower(run.folder, [trackers.tensorboard]).poll()
    append_json(run.metrics, [_eval(5), _train(6)])
    with Trackers(run.config, run.said.append) as trackers:
        Follower(run.folder, [trackers.tensorboard]).poll()
    _once(run.points("train/loss"), run.losses())
    _once(run.points("dev/loss"), {5: 0.4})


def test_a_line_under_way_waits_for_its_end(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    line = json.dumps(_train(1)) + "\n"
    with Trackers(run.config, run.said.append) as trackers:
        follower = Follower(run.folder, [trackers.tensorboard])
        with run.metrics.open("w") as file:
            for part in (line[:30], line[30:] + "not json\n" + line[:9]):
                file.write(part)
                file.flush()
                follower.poll()
    assert run.points("train/loss") == [(1, 1.0)]


def test_what_the_model_wrote_and_the_settings_are_shown_as_text(tmp_path: Path) -> None:
    run = _Run(tmp_path, "--data.cache", SECRET, "--optim.lr", "0.125")
    run.log([5])
    with Trackers(run.config, run.said.append) as trackers:
        Follower(run.folder, [trackers.tensorboard]).poll()
    found = board(run.folder)
    (text,) = found.Tensors("dev/examples/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    said, wrote = shown.splitlines()
    assert said.startswith("    ") and said.endswith(" you are number seven")
    assert wrote.startswith("    ") and wrote.endswith(" <b>you</b> are seven")
    (text,) = found.Tensors("config/text_summary")
    assert "lr: 0.125" in text.tensor_proto.string_val[0].decode()
    assert any("hparams" in tag for tag in found.summary_metadata)
    _no_secret_within(run.folder)


def test_a_whole_run_is_in_tensorboard(undisturbed: Path) -> None:
    losses = {r["step"]: r["loss"] for r in _rows(undisturbed / METRICS) if r["kind"] == "train"}
    assert len(losses) == 50
    _once([(e.step, e.value) for e in board(undisturbed).Scalars("train/loss")], losses)
    assert {e.step for e in board(undisturbed).Scalars("dev/wer")} == {25, 50}
    wer = json.loads((undisturbed / "summary.json").read_text())["dev_wer"]
    (point,) = board(undisturbed).Scalars("summary/dev_wer")
    assert (point.step, point.value) == (50, pytest.approx(wer))


# -- what can go wrong -------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    without = [entry for entry in sys.path if not (Path(entry) / "swanlab").exists()]
    monkeypatch.setattr(sys, "path", without)
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    arguments = ["--config", "smoke", "--run.storage", str(tmp_path), "--run.trackers", "swanlab"]
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: run.trackers: swanlab") and said.count("\n") == 1
    assert not ray.is_initialized() and not (tmp_path / "smoke").exists()


def test_trackers_are_given_by_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: {trackers: wandb}")
    assert load_config(path).run.trackers == ["wandb"]
    assert load_config(None, ["--run.trackers", "mlflow"]).run.trackers == ["mlflow"]
    both = ["--run.trackers", "mlflow", "--run.trackers", "swanlab"]
    assert load_config(None, both).run.trackers == ["mlflow", "swanlab"]
    with pytest.raises(ConfigError, match=r"run\.trackers\.0: .*'wandb', 'mlflow'.*'tensorboard'"):
        load_config(None, ["--run.trackers", "tensorboard"])
    check_trackers(Config())


def test_tensorboard_that_cannot_write_is_dropped_with_one_line(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    (run.folder / "tensorboard").write_text("a file where the folder should be")
    with Trackers(run.config, run.said.append) as trackers:
        with Follower(run.folder, [trackers.tensorboard]):
            run.log(range(1, 4))
        trackers.complete(SUMMARY)
    assert len(run.said) == 1
    assert re.match(r"TensorBoard\b.*\bFileExistsError\b", run.said[0])
    kept = json.loads((run.folder / "trackers" / "tensorboard.json").read_text())
    assert kept == {"rows": 0}, "the next driver tries again from the beginning"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Nobody listens there, and nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _until(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_is_away_costs_one_line(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:SECRET@127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run = _Run(tmp_path, "--run.trackers", "mlflow")
    with Trackers(run.config, run.said.append) as trackers:
        with Follower(run.folder, [trackers.tensorboard]):
            run.log(range(1, 4))
            _until(lambda: run.said)
            run.log(range(4, 7))
        began = time.monotonic()
        trackers.complete(SUMMARY)
    assert time.monotonic() - began < CLOSE_SECONDS / 2
    assert len(run.said) == 1 and "\n" not in run.said[0]
    assert re.match(r"mlflow\b.*\bMlflowException: ", run.said[0])
    assert "SECRET" not in run.said[0]
    _once(run.points("train/loss"), run.losses())


@pytest.mark.slow
def test_a_server_that_is_silent_holds_up_the_end_for_a_bounded_time_and_no_other_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        run = _Run(tmp_path, "--run.trackers", "mlflow", "--run.trackers", "wandb")
        with Trackers(run.config, run.said.append) as trackers:
            with Follower(run.folder, [trackers.tensorboard]):
                run.log(range(1, 4))
            silent.settimeout(120)
            connection, _ = silent.accept()  # now it waits for an answer
            sent = run.folder / "trackers" / "wandb.json"
            _until(lambda: sent.exists() and json.loads(sent.read_text())["rows"] == 3)
            began = time.monotonic()
            trackers.complete(SUMMARY)
        connection.close()
    assert time.monotonic() - began < CLOSE_SECONDS + 5
    assert len(run.said) == 1
    assert re.match(rf"mlflow\b.*\b{CLOSE_SECONDS:g} s\b", run.said[0])
    _once(run.points("train/loss"), run.losses())


# -- the packages themselves -------------------------------------------------------------------


SECRET = "oss://KEY:SEC/RET@bucket/cache"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A setting with credentials, given on the command line."""
    monkeypatch.setattr(sys, "argv", ["train", "--data.cache", SECRET])
    return ["--data.cache", SECRET]


def _no_secret_within(folder: Path) -> None:
    held = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert any(b"***@bucket" in data for data in held)
    assert not any(b"SEC/RET" in data for data in held)


def _two_drivers(run: _Run) -> str:
    """A run with a crash of its workers that a second driver continues; the tracker's id."""
    (name,) = run.config.run.trackers
    kept = run.folder / "trackers" / f"{name}.json"

    def has(rows: int) -> None:
        _until(lambda: kept.exists() and json.loads(kept.read_text())["rows"] == rows or run.said)
        assert run.said == []

    with Trackers(run.config, run.said.append):
        run.log(range(1, 5))
        has(4)
        run.restart(3)
        has(3)
        run.log(range(4, 7), attempt=1)
        has(7)
    id = json.loads(kept.read_text())["id"]
    with Trackers(run.config, run.said.append) as trackers:
        run.log(range(7, 11), attempt=1)
        has(12)
        trackers.complete(SUMMARY)
    assert run.said == []
    assert json.loads(kept.read_text()) == {"rows": 12, "id": id}
    return str(id)


SENT = [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]  # step 4 was logged twice, no other


@pytest.mark.slow
def test_mlflow_has_one_run_with_every_row(
    tmp_path: Path,
    secret: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = _Run(tmp_path, "--run.trackers", "mlflow", "--optim.lr", "0.125", *secret)
    id = _two_drivers(run)
    assert capfd.readouterr() == ("", "")
    _no_secret_within(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:

        def ask(query: str) -> list[Any]:
            return database.execute(query).fetchall()

        assert ask("select run_uuid, name, status from runs") == [(id, "omni", "FINISHED")]
        steps = ask("select step from metrics where key = 'train/loss' order by timestamp, step")
        assert [step for (step,) in steps] == SENT
        assert ask("select value from metrics where key = 'summary/dev_wer'") == [(0.5,)]
        assert ask("select value from params where key = 'optim.lr'") == [("0.125",)]


@pytest.mark.slow
def test_wandb_has_one_run_with_every_row(
    tmp_path: Path,
    secret: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = _Run(tmp_path, "--run.trackers", "wandb", "--optim.lr", "0.125", *secret)
    id = _two_drivers(run)
    assert capfd.readouterr() == ("", "")
    _no_secret_within(run.folder)
    files = sorted((run.folder / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{id}.wandb"}
    history = [row for file in files for row in _wandb_history(file)]
    steps = [int(row["step"]) for row in history if "train/loss" in row]
    assert steps == SENT
    assert any(key.startswith("dev/examples") for row in history for key in row)


def _wandb_history(path: Path) -> Iterator[dict[str, Any]]:
    """What `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    for record in _records(path):
        items = Record.FromString(record).history.item
        yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def _records(path: Path) -> Iterator[bytes]:
    """Records in LevelDB's log format, after 7 bytes, as W&B and SwanLab keep them."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header at the end of a block
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_without_a_key_is_dropped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    run = _Run(tmp_path, "--run.trackers", "wandb")
    with Trackers(run.config, run.said.append):
        _until(lambda: run.said)
    assert len(run.said) == 1 and "\n" not in run.said[0]
    assert run.said[0].startswith("wandb ")
    assert "key" in run.said[0].lower()


@pytest.mark.slow
def test_swanlab_has_every_row(
    tmp_path: Path,
    secret: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "settings"))
    run = _Run(tmp_path, "--run.trackers", "swanlab", "--optim.lr", "0.125", *secret)
    id = _two_drivers(run)
    assert capfd.readouterr() == ("", "")
    _no_secret_within(run.folder)
    files = sorted((run.folder / "trackers" / "swanlab").glob("run-*/*.swanlab"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{id}.swanlab"}
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    sent = [Record.FromString(record).scalar for file in files for record in _records(file)]
    steps = [point.step for point in sent if point.key == "train/loss"]
    assert steps == sorted(set(SENT)), "it keeps the first figure that it gets for a step"
    assert [p.value.number for p in sent if p.key == "summary/dev_wer"] == [0.5]


def test_every_tracker_of_the_setting_can_be_opened() -> None:
    from typing import get_args

    from omni.config.field_types import Trackers
    from omni.metrics.trackers import PACKAGES

    assert set(get_args(get_args(get_args(Trackers)[0])[0])) == set(OPEN) == set(PACKAGES)
