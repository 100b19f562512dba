"""A small real run, shared by all tests that compare with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers.whole_runs import TINY, embedded, run_job, write_manifest


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all processes among which pytest-xdist divides the tests."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def tiny(shared_folder: Path) -> Path:
    """A configuration that trains a very small model on 60 real prompts in seconds."""
    folder = shared_folder / "tiny"
    config = folder / "tiny.yaml"
    with FileLock(f"{folder}.lock"):
        if not config.is_file():
            train_data = write_manifest(folder / "train", embedded("train", 60))
            dev_data = write_manifest(folder / "dev", embedded("dev", 8))
            text = TINY.replace("TRAIN", str(train_data)).replace("DEV", str(dev_data))
            config.write_text(text)
    return config


@pytest.fixture(scope="session")
def undisturbed(tiny: Path, shared_folder: Path) -> Path:
    """The run of `tiny` to its end."""
    storage = shared_folder / "undisturbed"
    with FileLock(f"{storage}.lock"):
        if not (storage / "run" / "summary.json").is_file():
            run_job(tiny, storage)
    return storage / "run"
