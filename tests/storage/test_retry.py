"""Storage that comes back is waited for; what will never work is said at once."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni.audio.decode import AudioError, decode_with_retry
from omni.checkpoint.resume import find_resume_point
from omni.metrics.run_files import append_json, read_json_lines
from omni.storage.retry import retry_storage
from omni.stream.feature_cache import FeatureCache


def _later(seconds: float, what) -> threading.Thread:  # type: ignore[no-untyped-def]
    def work() -> None:
        time.sleep(seconds)
        what()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_folder_that_is_away_for_a_while_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "mount" / "metrics.jsonl"
    thread = _later(0.5, path.parent.mkdir)
    append_json(path, [{"step": 1}])
    thread.join()
    assert list(read_json_lines(path)) == [{"step": 1}]


def test_in_the_end_it_is_an_error(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        retry_storage(lambda: (tmp_path / "none").read_text(), seconds=0.5)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENAMETOOLONG])
def test_what_cannot_work_is_not_tried_again(number: int) -> None:
    tries = []

    def call() -> None:
        tries.append(1)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        retry_storage(call)
    assert len(tries) == 1


def test_recordings_whose_storage_is_away_are_not_rejected(tmp_path: Path) -> None:
    """A link to storage that is taken away and given back, as a lost mount."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    soundfile.write(real / "a.wav", np.linspace(-0.5, 0.5, 1600, dtype="float32"), 16_000)
    thread = _later(0.5, lambda: link.symlink_to(real))
    assert len(decode_with_retry(link / "a.wav")) == 1600
    thread.join()
    (real / "bad.wav").write_bytes(b"x")
    for name in ("bad.wav", "gone.wav"):
        with pytest.raises(AudioError, match="unreadable"):
            decode_with_retry(link / name)


def test_an_attempt_does_not_take_lost_storage_for_a_new_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    thread = _later(0.5, lambda: (run.mkdir(), (run / "config.yaml").touch()))
    assert find_resume_point(run) == (None, [])
    thread.join()


def test_features_wait_in_memory_for_their_storage(tmp_path: Path) -> None:
    home = tmp_path / "cache"
    home.symlink_to(tmp_path / "real")  # leads nowhere yet
    cache = FeatureCache(home, flush_bytes=10)
    cache.put({"a": b"x" * 20})
    assert cache.full is None and cache.get(["a"]) == {"a": b"x" * 20}
    with pytest.raises(OSError):
        cache.flush(strict=True)
    (tmp_path / "real").mkdir()
    cache.flush()
    assert FeatureCache(home).get(["a"]) == {"a": b"x" * 20}


def test_features_do_not_fill_the_memory(tmp_path: Path) -> None:
    home = tmp_path / "cache"
    home.symlink_to(tmp_path / "real")
    cache = FeatureCache(home, flush_bytes=10)
    for number in range(20):
        cache.put({str(number): b"x" * 10})
    assert cache.full is not None and str(home) in cache.full
    assert len(cache) == 0
