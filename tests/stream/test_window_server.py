"""Windows served by an actor: made once for all loading tasks, freed, and made again when lost."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from omni.plan.plan import EMPTY
from omni.plan.stream_order import ListedBins
from omni.plan.windows_file import read_window_bins
from omni.run import prepare_parts
from omni.run.prepare import Prepared, prepare
from omni.stream import window_server
from omni.stream.pipeline import SharedSettings, make_stream
from omni.stream.stream_settings import stream_settings
from omni.stream.window_server import ServedSplit, put_split
from tests.helpers.windowed_runs import windowed_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """A run of a few windows, whose plan is in its directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_parts, "_FEW", 10**6)
        made = prepare(windowed_config(tmp_path_factory.mktemp("run")))
    made.config.run_dir.mkdir(parents=True)
    made.write_plan_file()
    yield made


@pytest.fixture(scope="module")
def served(prepared: Prepared) -> Iterator[tuple[Any, Any]]:
    """Reference of the training split, and the actor that serves its windows."""
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=2, logging_level=logging.ERROR, **quiet)
    yield put_split(prepared.splits["train"], prepared.config, prepared.tasks)
    ray.shutdown()


def _ids(split: Any, number: int) -> list[str]:
    held = split.of_bin(number)
    ids: list[str] = held.table.take(pa.array(held.members(number).rows))["id"].to_pylist()
    return ids


def test_loading_tasks_get_the_bins_of_the_plan(prepared: Prepared, served: Any) -> None:
    reference, _ = served
    split = prepared.splits["train"]
    bins = np.asarray([*range(3, split.plan.bins), EMPTY])
    settings = stream_settings(prepared.config, prepared.encoder)
    stream = make_stream([reference], ListedBins(bins), SharedSettings.put(settings))
    stream.context.execution_options.preserve_order = True
    rows = [row for block in stream.iter_batches(batch_size=None) for row in _rows(block)]
    assert [row["bin"] for row in rows] == bins.tolist()
    assert [row["ids"] for row in rows[:-1]] == [_ids(split, n) for n in bins[:-1].tolist()]
    assert len(rows[-1]["ids"]) == 0 and all(error is None for r in rows for error in r["errors"])
    assert split.reader is not None
    counted = read_window_bins(prepared.config.run_dir, split.plan.fingerprint)
    assert counted == [split.reader.plan(number).bins for number in range(len(counted))]
    assert sum(counted) >= split.plan.bins


def _rows(block: Any) -> list[dict[str, Any]]:
    names = ("bin", "ids", "errors")
    columns = [[list(v) if v is not None and n != "bin" else v for v in block[n]] for n in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def test_a_server_that_died_is_replaced_and_old_windows_are_made_again(
    prepared: Prepared, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, server = served
    split, local = ray.get(reference), prepared.splits["train"]
    assert isinstance(split, ServedSplit)
    last = split.plan.bins - 1
    assert _ids(split, last) == _ids(local, last)
    ray.kill(server, no_restart=False)
    monkeypatch.setattr(window_server, "_WINDOWS", {})
    assert _ids(split, last) == _ids(local, last)
    assert _ids(split, 0) == _ids(local, 0), "as for a block that was lost"


def test_three_windows_at_most_are_kept(prepared: Prepared, served: Any) -> None:
    reference, server = served
    split = ray.get(reference)
    for number in range(split.plan.bins):
        split.of_bin(number)
    assert len(window_server._WINDOWS[split.plan.fingerprint]) == 2
    assert len(ray.get(server.windows.remote())) <= 3


def test_a_full_disk_stops_no_window(
    prepared: Prepared, served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bins of a window are written down for later starts, which can do without."""
    shutil.copytree(prepared.config.run_dir, tmp_path / "run")
    run = prepared.config.run.model_copy(update={"storage": str(tmp_path)})
    config = prepared.config.model_copy(update={"run": run})
    split = prepared.splits["train"]
    counts = tmp_path / "run" / "plan" / f"{split.plan.fingerprint}.windows.jsonl"
    counts.unlink(missing_ok=True)
    reference, server = put_split(split, config, prepared.tasks)
    assert ray.get(server.windows.remote()) == []
    counts.mkdir()  # Nothing can be appended to it.
    monkeypatch.setattr(window_server, "_WINDOWS", {})
    last = split.plan.bins - 1
    assert _ids(ray.get(reference), last) == _ids(split, last)
    assert counts.is_dir()
