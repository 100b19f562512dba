"""A small real run, shared by all tests that compare with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.whole_runs import TINY, embedded, run_job, write_manifest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains a very small model on 60 real prompts in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    train_data = write_manifest(folder / "train", embedded("train", 60))
    dev_data = write_manifest(folder / "dev", embedded("dev", 8))
    text = TINY.replace("TRAIN", str(train_data)).replace("DEV", str(dev_data))
    config = folder / "tiny.yaml"
    config.write_text(text)
    return config


@pytest.fixture(scope="session")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    run_job(tiny, storage)
    return storage / "run"
