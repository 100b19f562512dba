"""The recorder writes what a run is read from, on rank 0, and what fails, on every rank."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni.checkpoint.train_state import TrainState
from omni.metrics.table import EXPORTED, PROMETHEUS, EvalRow, StepSums, TrainRow
from omni.metrics.throughput import PHASES, gpu_memory
from omni.run.prepare import make_worker_spec
from omni.train import recorder as module
from omni.train.batches import BlockReader
from omni.train.ledger import CurrentWork
from omni.train.model_state import ModelState
from omni.train.recorder import Recorder
from omni.train.step import StepResult
from omni.train.worker_spec import WorkerSpec
from tests.helpers.whole_runs import lines
from tests.helpers.worker_specs import small_run

CPU = torch.device("cpu")
WORK: CurrentWork = {"step": 3, "bins": [8, 9], "ids": ["a", "b"]}


class Dashboard:
    """A publisher that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[TrainRow] = []
        self.published: dict[str, list[float | Mapping[str, float]]] = defaultdict(list)

    def publish(self, name: str, value: float | Mapping[str, float]) -> None:
        assert PROMETHEUS[name] in EXPORTED
        self.published[name].append(value)

    def train_row(self, row: TrainRow, rejects: Mapping[str, int], cache_full: bool) -> None:
        self.rows.append(row)

    def eval_row(self, row: EvalRow) -> None:
        raise AssertionError("nothing was evaluated")


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    prepared = small_run()
    run = prepared.config.run.model_copy(update={"storage": str(tmp_path), "name": "run"})
    config = prepared.config.model_copy(update={"run": run})
    config.run_dir.mkdir()
    return make_worker_spec(replace(prepared, config=config))


def _reader(spec: WorkerSpec, recorder: Recorder, rank: int = 0) -> BlockReader:
    return BlockReader(spec, iter(()), rank, 1, CPU, recorder.watch)


def _sums(loss: float) -> StepSums:
    return StepSums(loss=loss, tokens=10, samples=160_000, tasks=torch.tensor([[loss, 10.0, 5.0]]))


def test_a_log_line_is_the_mean_of_its_steps(spec: WorkerSpec, tmp_path: Path) -> None:
    dashboard = Dashboard()
    recorder = Recorder(spec, 0, 1, CPU, dashboard)
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    for loss in (20.0, 40.0):
        recorder.add_step(StepResult(_sums(loss), 1.0, True), spent=2.0, waited=0.5)
    recorder.log_steps(TrainState(step=2), 1.5, model_state, _reader(spec, recorder))
    [row] = lines(tmp_path / "run" / "metrics.jsonl")
    assert (row["kind"], row["step"], row["loss"], row["grad_norm"]) == ("train", 2, 3.0, 1.5)
    assert (row["step_seconds"], row["data_wait_fraction"]) == (4.0, 0.25)
    assert row["audio_seconds_per_second"] == 5.0
    assert [r.loss for r in dashboard.rows] == [3.0]
    assert dashboard.published.keys() == {"omni_phase_seconds", "omni_rank_step_seconds"}, "no GPU"
    assert recorder.window.steps == 0

    later = Recorder(spec, 0, 1, CPU, None)
    state = TrainState(step=2, totals=json.loads(json.dumps(recorder.totals.to_dict())))
    later.restore(state)
    later.add_step(StepResult(_sums(40.0), 1.0, True), spent=2.0, waited=2.0)
    summary = later.summarize(state, {"dev_loss": 1.0}, {"workers": 1})
    assert summary["audio_seconds_per_second"] == 30 / 6, "of both attempts"
    assert summary["data_wait_fraction"] == 0.5
    assert (summary["train_loss"], summary["dev_loss"], summary["workers"]) == (3.0, 1.0, 1)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_log_line_after_a_restart_covers_the_steps_before_it(
    spec: WorkerSpec, tmp_path: Path
) -> None:
    recorder = Recorder(spec, 0, 1, CPU, None)
    recorder.add_step(StepResult(_sums(20.0), 1.0, True), spent=2.0, waited=0.5)
    saved = TrainState(step=1, window=json.loads(json.dumps(recorder.window.to_dict())))
    later = Recorder(spec, 0, 1, CPU, None)
    later.restore(saved)
    later.add_step(StepResult(_sums(40.0), 1.0, True), spent=2.0, waited=0.5)
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    later.log_steps(TrainState(step=2), 1.5, model_state, _reader(spec, later))
    [row] = lines(tmp_path / "run" / "metrics.jsonl")
    assert (row["loss"], row["step_seconds"]) == (3.0, 4.0)


def test_a_ranks_own_work_leaves_out_waiting(spec: WorkerSpec) -> None:
    dashboard = Dashboard()
    recorder = Recorder(spec, 1, 2, CPU, dashboard)
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    for phase, seconds in zip(PHASES, (100, 1, 2, 100, 100, 100, 100), strict=True):
        recorder.watch.add(phase, seconds)
    for _ in range(4):
        recorder.add_step(StepResult(_sums(20.0), 1.0, True), spent=2.0, waited=0.5)
    recorder.log_steps(TrainState(step=4), 1.5, model_state, _reader(spec, recorder, 1))
    assert dashboard.published["omni_rank_step_seconds"] == [(1 + 2) / 4]
    assert not dashboard.rows, "the run's figures are rank 0's"


def test_figures_of_checkpoints_begin_with_the_attempt_and_follow_each_write(
    spec: WorkerSpec, tmp_path: Path
) -> None:
    dashboard, other = Dashboard(), Dashboard()
    recorder, began = Recorder(spec, 0, 2, CPU, dashboard), time.time()
    Recorder(spec, 1, 2, CPU, other).restore(TrainState(step=20))
    recorder.restore(TrainState(step=20))
    assert not other.published
    recorder.log_failed_checkpoint(40, "no space left", known=False)
    recorder.log_failed_checkpoint(40, "no space left", known=True)
    recorder.log_checkpoint(40, 1.5)
    published = dashboard.published
    assert published["omni_checkpoint_every"] == [spec.config.train.checkpoint_every]
    assert published["omni_checkpoint_step"] == [20, 40]
    assert published["omni_checkpoint_write_seconds"] == [1.5]
    assert published["omni_checkpoint_failures"] == [1, 1]
    first, second = published["omni_checkpoint_time"]
    assert isinstance(first, float) and isinstance(second, float)
    assert began <= first <= second <= time.time()
    [row] = lines(tmp_path / "run" / "events.rank-0000.jsonl")
    assert (row["event"], row["step"], row["reason"]) == ("checkpoint failed", 40, "no space left")


def test_memory_of_a_gpu_is_that_of_torch_and_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 4))
    sizes = gpu_memory(torch.device("cuda"))
    assert sizes == {"memory": 1, "reserved": 2, "free": 3, "size": 4}
    assert all(f"omni_gpu_{name}_bytes" in PROMETHEUS for name in sizes)
    assert gpu_memory(CPU) == {}


def test_utilisation_counts_the_head_at_supervised_positions_and_no_model_that_rests(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "peak_flops", lambda device: 1e9)  # A CPU's is not known.
    dashboard = Dashboard()
    recorder = Recorder(spec, 0, 1, CPU, dashboard)
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    lm = model_state.model.lm
    head = lm.head().weight.numel()
    layers = sum(p.numel() for p in lm.transformer.h.parameters()) + lm.smear_gate.weight.numel()
    recorder.add_step(StepResult(StepSums(tokens=10, ctc=1.0), 1.0, True), spent=1.0, waited=0.0)
    recorder.add_step(StepResult(_sums(20.0), 1.0, True), spent=1.0, waited=0.0)
    recorder.log_steps(TrainState(step=2), 1.5, model_state, _reader(spec, recorder))
    positions = 4 * 256
    wanted = 6 * (positions * layers + 10 * head) / 2.0 / 1e9
    assert [row.mfu for row in dashboard.rows] == [pytest.approx(wanted)]


def test_steps_without_an_update_make_no_line(spec: WorkerSpec, tmp_path: Path) -> None:
    recorder = Recorder(spec, 0, 1, CPU, None)
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    recorder.add_step(StepResult(_sums(float("nan")), 1.0, False), 1.0, 0.0)
    recorder.log_steps(TrainState(step=1), 1.0, model_state, _reader(spec, recorder))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_cache_is_noted_once_by_rank_0(spec: WorkerSpec, tmp_path: Path) -> None:
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    for rank in (1, 0):
        recorder = Recorder(spec, rank, 2, CPU, None)
        reader = _reader(spec, recorder, rank)
        reader.cache_full = "no space left"
        for step in (1, 2):
            recorder.add_step(StepResult(_sums(10.0), 1.0, True), 1.0, 0.0)
            recorder.log_steps(TrainState(step=step), 1.0, model_state, reader)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["train", "note", "train"]
    assert "no space left" in rows[1]["text"]


def test_halved_batches_of_encoders_are_counted_and_noted_once(
    spec: WorkerSpec, tmp_path: Path
) -> None:
    model_state = ModelState(spec.config, spec.model, CPU, 1)
    recorder = Recorder(spec, 0, 1, CPU, None)
    for step, halvings in ((1, 3.0), (2, 1.0), (3, 0.0)):
        sums = replace(_sums(10.0), halvings=halvings)
        recorder.add_step(StepResult(sums, 1.0, True), 1.0, 0.0)
        recorder.log_steps(TrainState(step=step), 1.0, model_state, _reader(spec, recorder))
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["train", "note", "train", "train"]
    assert [row.get("halvings") for row in rows if row["kind"] == "train"] == [3, 1, None]
    assert "encoder.gpu_memory" in rows[1]["text"]


def test_events_of_all_ranks_are_written_by_rank_0_and_failures_by_each(
    spec: WorkerSpec, tmp_path: Path
) -> None:
    for rank in (0, 1):
        recorder = Recorder(spec, rank, 2, CPU, None)
        recorder.log_event("attempt", 0, workers=2)
        recorder.log_stall("training step 3", 60.0, WORK)
        recorder.log_failure(ValueError("one\nthe last line"), WORK)
    first, second = (lines(tmp_path / "run" / f"events.rank-{rank:04d}.jsonl") for rank in (0, 1))
    rows = first + second
    assert [(row["rank"], row["event"]) for row in rows] == [
        (0, "attempt"),
        (0, "stalled"),
        (0, "rank failed"),
        (1, "stalled"),
        (1, "rank failed"),
    ]
    assert rows[-1]["reason"] == "ValueError: the last line"
    assert {name: rows[-1][name] for name in WORK} == WORK


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_rank_does_not_wait_for_storage_that_hangs(
    spec: WorkerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe that nobody reads blocks, as a lost mount does."""
    os.mkfifo(tmp_path / "run" / "events.rank-0000.jsonl")
    monkeypatch.setattr(module, "_FAILURE_LOG_TIMEOUT", 0.2)
    began = time.monotonic()
    Recorder(spec, 0, 1, CPU, None).log_failure(OSError("gone"), WORK)
    assert time.monotonic() - began < 60
    (tmp_path / "run" / "events.rank-0000.jsonl").open("rb").close()
