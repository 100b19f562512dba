"""A run on this machine's CPUs tries its first blocks in the driver, while Ray starts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omni.errors import ConfigError
from omni.run.early_trial import EarlyTrial
from omni.run.prepare import Prepared, make_worker_spec
from omni.run.trial import try_here, whole_bytes
from tests.helpers.worker_specs import small_run


def _with(prepared: Prepared, section: str, **changes: Any) -> Prepared:
    settings = getattr(prepared.config, section).model_copy(update=changes)
    return replace(prepared, config=prepared.config.model_copy(update={section: settings}))


def test_blocks_come_through_and_leave_this_process_as_it_was() -> None:
    prepared = small_run()
    threads = torch.get_num_threads()
    early = EarlyTrial.begin(_with(prepared, "train", threads=2))
    assert early is not None
    found = early.result()
    assert found.decode_rate > found.encoder_rate > 0
    assert found.block is not None and found.block.seconds > 0
    assert torch.get_num_threads() == threads
    assert not prepared.config.run_dir.exists()


def test_what_needs_the_cluster_is_not_tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = small_run()
    assert EarlyTrial.begin(_with(prepared, "encoder", actors="auto")) is None
    assert EarlyTrial.begin(_with(prepared, "train", gpus=1.0)) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert EarlyTrial.begin(prepared) is None


def test_a_block_without_room_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any, **more: Any) -> None:
        raise MemoryError("cannot allocate 3 GB")

    monkeypatch.setattr("omni.model.speech_lm.OmniModel.forward", exhausted)
    with pytest.raises(ConfigError, match=r"^optim\.bins_per_block\b.*\btrainer\b.*\b3 GB"):
        try_here(small_run())


def test_a_sharded_model_that_no_node_holds_whole_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = _with(small_run(), "train", strategy="fsdp", workers=2)
    assert try_here(prepared).block is not None
    needed = whole_bytes(make_worker_spec(prepared))
    free = SimpleNamespace(available=needed - 1)
    monkeypatch.setattr("omni.run.trial.psutil.virtual_memory", lambda: free)
    assert try_here(prepared).block is None
