"""A training of one rank over several windows: interrupted in the third and continued, audited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from jobs.audit import main as audit_job
from omni.checkpoint.resume import ResumePoint
from omni.plan.windows_file import windows_path
from omni.run import prepare_parts
from omni.run.audit import AuditError, audit
from omni.run.prepare import Prepared, make_worker_spec, prepare
from omni.train.loop import TrainLoop
from tests.helpers.stream_order import planned_stream
from tests.helpers.whole_runs import curve, ledger, lines
from tests.helpers.windowed_runs import BINS, STEPS, windowed_config
from tests.helpers.worker_specs import encoded_block


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_parts, "_FEW", 10**6)
        yield


def _blocks(prepared: Prepared, first: int, held_step: int, last: int) -> Iterator[pa.Table]:
    """Yield the blocks of the stream, those of training up to step `last`."""
    splits = list(prepared.splits.values())
    for one in planned_stream(splits, (first, held_step, STEPS)):
        if splits[one.split].name == "train" and one.bin >= last * BINS:
            return
        yield encoded_block(prepared, splits[one.split], [one.bin])


def _train(storage: Path, last: int = STEPS) -> Path:
    """Start or continue a run, whose stream breaks off after step `last`."""
    prepared = prepare(windowed_config(storage))
    run = prepared.config.run_dir
    run.mkdir(parents=True, exist_ok=True)
    prepared.write_plan_file()
    resume = None if prepared.resume is None else ResumePoint.of(prepared.resume, run)
    spec = make_worker_spec(prepared, resume=resume)
    first = 0 if resume is None else resume.step
    blocks = _blocks(prepared, first, spec.held_step, last)
    loop = TrainLoop(spec, blocks, 0, 1, torch.device("cpu"))
    if last == STEPS:
        assert loop.run() is not None
    else:
        with pytest.raises(RuntimeError, match="the stream has ended"):
            loop.run()
    return run


def test_a_run_broken_off_in_its_third_window_continues_as_if_nothing_had_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = _train(whole)
    reader = prepare(windowed_config(whole)).splits["train"].reader
    assert reader is not None and reader.windows.per_epoch == 4
    assert reader.find((STEPS - 1) * BINS)[0] >= 4, "more windows than an epoch has"
    broken_off = next(s for s in range(1, STEPS) if reader.find(s * BINS - 1)[0] == 2)
    assert reader.find(broken_off * BINS)[0] == 2, "in the middle of the third"
    assert _train(broken, last=broken_off) == _train(broken) == broken / "run"
    assert curve(broken / "run") == curve(run) and len(curve(run)) == STEPS
    assert ledger(broken / "run") == ledger(run)
    for storage in (whole, broken):
        assert audit_job([str(storage / "run")]) == 0
    found = audit(run)
    assert found.bins == STEPS * BINS and found.utterances == sum(
        sum(utterances.values()) for _, utterances in ledger(run).values()
    )
    prepared = prepare(windowed_config(whole))
    assert found.epochs == pytest.approx(prepared.splits["train"].plan.epoch(found.bins), rel=0.2)
    _check_faults(run, tmp_path / "damaged")


def _check_faults(run: Path, copy: Path) -> None:
    """An audit finds an utterance that is missing, and needs the prepared corpus."""
    shutil.copytree(run, copy, symlinks=True)
    [path] = (copy / "ledger").glob("*.jsonl")
    rows = lines(path)
    utterances = next(row["utterances"] for row in rows if row["step"] == 9)
    missing = utterances.pop()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [problem] = audit(copy).problems
    assert problem.startswith("step 9: bin ") and "lacks" in problem and str(missing) not in problem
    plan = next(path.stem for path in (copy / "plan").glob("*.json"))
    saved = json.loads(windows_path(copy, plan).read_text())
    saved["paths"] = [path + ".gone" for path in saved["paths"]]
    windows_path(copy, plan).write_text(json.dumps(saved))
    with pytest.raises(AuditError, match="the prepared corpus cannot be read"):
        audit(copy)
