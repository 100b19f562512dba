"""Checkpoints written beside training: order, full disks, storage that is away."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from omni.checkpoint import writer as module
from omni.checkpoint.checkpoint import CheckpointError
from omni.checkpoint.writer import CheckpointWriter


@dataclass
class Log:
    """What a writer reports. written: steps and seconds; failed: steps, reasons, and if known."""

    written: list[tuple[int, float]] = field(default_factory=list)
    failed: list[tuple[int, str, bool]] = field(default_factory=list)

    def log_checkpoint(self, step: int, seconds: float) -> None:
        self.written.append((step, seconds))

    def log_failed_checkpoint(self, step: int, reason: str, known: bool) -> None:
        self.failed.append((step, reason, known))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def saver(tmp_path: Path, log: Log) -> Iterator[CheckpointWriter]:
    saver = CheckpointWriter(tmp_path, 2, log)
    yield saver
    saver.close()


def _writes(folder: Path, step: int) -> Callable[[], Path]:
    def write() -> Path:
        path = folder / f"step-{step:06d}"
        path.mkdir(exist_ok=True)
        return path

    return write


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_step_does_not_wait_for_storage(saver: CheckpointWriter, tmp_path: Path) -> None:
    go = threading.Event()

    def slow() -> Path:
        go.wait(30)
        return _writes(tmp_path, 1)()

    saver.save(1, slow, best=True)  # returns, though nothing can be written yet
    assert _names(tmp_path) == []
    go.set()
    saver.wait()
    assert _names(tmp_path) == ["step-000001"]
    assert (tmp_path / "best").resolve().name == "step-000001"


def test_all_are_written_in_order_and_old_ones_go(saver: CheckpointWriter, tmp_path: Path) -> None:
    for step in range(1, 7):
        saver.save(step, _writes(tmp_path, step), best=step == 2)
    saver.wait()
    assert _names(tmp_path) == ["step-000002", "step-000005", "step-000006"]


def test_each_write_is_reported_with_its_time(
    saver: CheckpointWriter, tmp_path: Path, log: Log
) -> None:
    def slow() -> Path:
        time.sleep(0.2)
        return _writes(tmp_path, 1)()

    saver.save(1, slow, best=False)
    saver.save(2, _writes(tmp_path, 2), best=False)
    saver.close()
    assert [step for step, _ in log.written] == [1, 2] and not log.failed
    assert log.written[0][1] >= 0.2


def test_a_full_disk_is_said_once_and_only_newest_and_best_are_kept(
    saver: CheckpointWriter, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    full = threading.Event()
    full.set()

    def limited(step: int) -> Callable[[], Path]:
        def write() -> Path:
            if full.is_set():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return _writes(tmp_path, step)()

        return write

    for step in range(1, 8):
        saver.save(step, limited(step), best=step in (2, 4))
        while not log.failed:
            threading.Event().wait(0.01)
    assert log.failed[0] == (1, os.strerror(errno.ENOSPC), False)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        saver.wait(0.1)
    full.clear()
    saver.wait()
    saver.close()
    assert len(log.failed) > 1 and all(known for _, _, known in log.failed[1:])
    assert [step for step, _ in log.written] == [4, 7]
    assert _names(tmp_path)[-2:] == ["step-000004", "step-000007"]
    assert (tmp_path / "best").resolve().name == "step-000004"


def test_a_fault_that_is_not_storages_is_raised(saver: CheckpointWriter) -> None:
    def broken() -> Path:
        raise ValueError("no such tensor")

    saver.save(1, broken, best=False)
    with pytest.raises(CheckpointError, match="no such tensor"):
        saver.wait()


_FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from omni.model.speech_lm import OmniConfig
from omni.checkpoint.resume import newest_checkpoint
from omni.checkpoint.save import save_checkpoint
from omni.checkpoint.train_state import TrainState
shape = OmniConfig.from_dict({"gpt": dict(sequence_len=8, vocab_size=9, n_layer=1, n_head=1,
    n_kv_head=1, n_embd=24), "feature_dim": 4})
def save(step):
    save_checkpoint(Path(sys.argv[1]), state=TrainState(step=step), model=shape, encoder={},
        weights={"a": torch.zeros(100_000)}, optimizer={}, config_yaml="", tokenizer_json="")
save(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save(2)
except OSError as error:
    print(error.errno, newest_checkpoint(Path(sys.argv[1])).path.name)
"""


def test_no_room_in_the_middle_of_a_file_is_an_oserror_and_harms_nothing(tmp_path: Path) -> None:
    """The system's own limit on file sizes, in a process of its own."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(errno.EFBIG), "step-000001"]
