"""Checkpoints are written whole or not at all, and read only when they are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.checkpoint import save
from omni.checkpoint.checkpoint import CheckpointError, link_target, read_checkpoint
from omni.checkpoint.resume import newest_checkpoint, newest_step
from omni.checkpoint.retention import checkpoint_folders, prune_checkpoints, set_link
from omni.checkpoint.save import save_checkpoint
from omni.checkpoint.train_state import TrainState
from omni.config import Config
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.storage.digest import file_digest
from omni.storage.exclusive import create_exclusively
from omni.storage.fence import LeaseLost, register, unregister
from omni.storage.lease import make_fence
from omni.storage.path import ObjectPath, StoragePath, as_path
from tests.helpers.loopback_s3 import s3_bucket

SHAPE = OmniConfig(
    GPTConfig(sequence_len=32, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=24),
    feature_dim=4,
    stack=2,
)
TOKENIZER = SpeechTokenizer.train(["hello there"], 265)
ENCODER = {"source": "embedded", "mode": "trim", "margin_seconds": 0.5, "fingerprint": "abc"}
FILES = {
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.yaml",
    "tokenizer.json",
}


def _model(seed: int) -> OmniModel:
    model = OmniModel(SHAPE)
    model.init_weights(seed)
    return model


def _save(folder: StoragePath, step: int) -> StoragePath:
    """A checkpoint whose weights are those of `_model(step)`."""
    return save_checkpoint(
        folder,
        state=TrainState(
            step=step,
            bins_consumed=2 * step,
            epoch=step / 100,
            seconds=1.5,
            best_value=0.25,
            best_step=5,
            evaluations_since_best=1,
            fingerprints={"plan": "p"},
            rejects={"missing": 3},
        ),
        model=SHAPE,
        encoder=ENCODER,
        weights=dict(_model(step).named_parameters()),
        optimizer={"adamw/projector.fc1.weight/step": torch.tensor(float(step))},
        config_yaml=Config().to_yaml(),
        tokenizer_json=TOKENIZER.to_json(),
    )


def _newest(folder: StoragePath) -> StoragePath | None:
    """Path of the newest valid checkpoint."""
    found = newest_checkpoint(folder)
    return None if found is None else found.path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """checkpoints/ with those of steps 10 and 20."""
    for step in (10, 20):
        _save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("checkpoints") as uri:
        yield uri


@pytest.fixture(params=["disk", "bucket"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """The same, on disk and in object storage."""
    if request.param == "disk":
        folder: StoragePath = request.getfixturevalue("folder")
        return folder
    folder = as_path(request.getfixturevalue("bucket")) / tmp_path.name
    for step in (10, 20):
        _save(folder, step)
    return folder


def _flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


# -- what is written comes back ----------------------------------------------------------------


def test_a_checkpoint_holds_the_whole_state_of_a_run(checkpoints: StoragePath) -> None:
    path = _save(checkpoints, 30)
    assert path == checkpoints / "step-000030"
    assert {file.name for file in path.iterdir()} == FILES
    found = read_checkpoint(path, verify=True)
    assert found.state == TrainState(
        30,
        60,
        0.3,
        1.5,
        0.25,
        best_step=5,
        evaluations_since_best=1,
        fingerprints={"plan": "p"},
        rejects={"missing": 3},
    )
    assert found.model == SHAPE and found.encoder == ENCODER
    assert found.optimizer() == {"adamw/projector.fc1.weight/step": torch.tensor(30.0)}
    assert found.tokenizer().encode("hello") == TOKENIZER.encode("hello")
    assert (path / "config.yaml").read_text() == Config().to_yaml()


def test_the_model_comes_back_bit_for_bit(checkpoints: StoragePath) -> None:
    loaded = read_checkpoint(checkpoints / "step-000020").load_model()
    for (name, saved), value in zip(
        _model(20).named_parameters(), loaded.parameters(), strict=True
    ):
        assert torch.equal(saved, value), name
        assert value.dtype == torch.float32


def test_weights_that_do_not_fit_the_model_are_an_error(folder: Path) -> None:
    path = save_checkpoint(
        folder,
        state=TrainState(step=30),
        model=SHAPE,
        encoder=ENCODER,
        weights={"projector.fc3.weight": torch.ones(2)},
        optimizer={},
        config_yaml="",
        tokenizer_json=TOKENIZER.to_json(),
    )
    with pytest.raises(CheckpointError, match=r"projector\.fc1.*projector\.fc3"):
        read_checkpoint(path).load_model()


def test_the_same_step_can_be_saved_again(folder: Path) -> None:
    """A resumed run that repeats steps writes the same names."""
    _flip(folder / "step-000020" / "model.safetensors")
    _save(folder, 20)
    assert _newest(folder) == folder / "step-000020"


# -- links -------------------------------------------------------------------------------------


def test_last_follows_each_save_and_best_is_set_by_hand(folder: Path) -> None:
    assert read_checkpoint(folder / "last").state.step == 20
    set_link(folder / "best", folder / "step-000010")
    _save(folder, 30)
    assert read_checkpoint(folder / "last").path == (folder / "step-000030").resolve()
    assert read_checkpoint(folder / "best").state.step == 10
    set_link(folder / "best", folder / "step-000030")
    assert read_checkpoint(folder / "best").state.step == 30


def test_links_hold_when_the_run_is_moved(folder: Path) -> None:
    moved = folder.rename(folder.parent / "elsewhere")
    assert read_checkpoint(moved / "last").state.step == 20


def test_pruning_keeps_the_newest_the_best_and_the_last(checkpoints: StoragePath) -> None:
    for step in (30, 40, 50):
        _save(checkpoints, step)
    set_link(checkpoints / "best", checkpoints / "step-000020")
    prune_checkpoints(checkpoints, keep=2)
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["best", "last", "step-000020", "step-000040", "step-000050"]
    set_link(checkpoints / "last", checkpoints / "step-000020")
    prune_checkpoints(checkpoints, keep=1)
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-000020", "step-000050"]
    prune_checkpoints(checkpoints, keep=5)
    assert len(list(checkpoints.glob("step-*"))) == 2


# -- damage ------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_found(checkpoints: StoragePath) -> None:
    assert _newest(checkpoints) == checkpoints / "step-000020"
    assert newest_checkpoint(checkpoints.parent / "nowhere") is None


@pytest.mark.parametrize("name", sorted(FILES - {"state.json"}))
def test_a_checkpoint_with_a_flipped_byte_is_passed_over(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    _flip(folder / "step-000020" / name)
    assert _newest(folder) == folder / "step-000010"
    said = "".join(capfd.readouterr())
    assert "step-000020" in said and name in said
    _flip(folder / "step-000010" / name)
    assert newest_checkpoint(folder) is None


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_checkpoint_with_a_missing_file_is_passed_over(folder: Path, name: str) -> None:
    (folder / "step-000020" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step-000020\b.*\b{name}"):
        read_checkpoint(folder / "step-000020")
    assert _newest(folder) == folder / "step-000010"


@pytest.mark.parametrize("text", ["", "{", "[1", '{"format": 1'])
def test_a_checkpoint_whose_state_is_cut_off_is_passed_over(folder: Path, text: str) -> None:
    (folder / "step-000020" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-000020\b.*\bstate\.json"):
        read_checkpoint(folder / "step-000020")
    assert _newest(folder) == folder / "step-000010"


@pytest.mark.parametrize("text", ["[]", "3", '{"format": 1}', '{"format": 1, "files": {}}'])
def test_a_checkpoint_whose_state_is_something_else_is_passed_over(
    checkpoints: StoragePath, text: str
) -> None:
    (checkpoints / "step-000020" / "state.json").write_text(text)
    assert _newest(checkpoints) == checkpoints / "step-000010"


def test_a_state_with_a_flipped_byte_is_passed_over(checkpoints: StoragePath) -> None:
    path = checkpoints / "step-000020" / "state.json"
    text = path.read_text()
    assert '"bins_consumed": 40' in text
    path.write_text(text.replace('"bins_consumed": 40', '"bins_consumed": 41'))
    assert _newest(checkpoints) == checkpoints / "step-000010"


@pytest.mark.parametrize("number", [0, 3, None, "1"])
def test_another_format_is_refused_by_its_number(folder: Path, number: object) -> None:
    path = folder / "step-000020" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    with pytest.raises(CheckpointError, match=rf"format {number!r}.*\b1\b.*\b2\b"):
        read_checkpoint(folder / "last")
    assert _newest(folder) == folder / "step-000010"


def test_no_checkpoint_there(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="/step-000099: "):
        read_checkpoint(folder / "step-000099")
    (folder / "best").symlink_to("step-000099")
    with pytest.raises(CheckpointError, match="/best: "):
        read_checkpoint(folder / "best")


def test_an_interrupted_save_is_ignored_and_replaced(folder: Path) -> None:
    leftover = folder / ".step-000030.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half of it")
    (leftover / "stray").mkdir()
    assert _newest(folder) == folder / "step-000020"
    prune_checkpoints(folder, keep=1)
    saved = _save(folder, 30)
    assert not leftover.exists() and {file.name for file in saved.iterdir()} == FILES
    assert _newest(folder) == saved


@pytest.mark.parametrize("lost_after", ["begin", "writing"])
def test_a_process_that_lost_the_run_publishes_no_checkpoint(
    checkpoints: StoragePath, lost_after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is lost before the save, or while its files are written beside the others."""
    run = checkpoints / "run"
    newest = _save(run, 30)
    prune_checkpoints(run, keep=1)
    (run / "leases").mkdir(parents=True, exist_ok=True)
    assert create_exclusively(run / "leases" / "000001.json", b"{}")
    fence = make_fence(run, 1)
    register(fence)

    def lose() -> None:
        assert create_exclusively(run / "leases" / "000002.json", b"{}")

    def digest(*arguments: Any, **options: Any) -> str:
        if not (run / "leases" / "000002.json").exists():
            lose()
        return file_digest(*arguments, **options)

    if lost_after == "writing":
        monkeypatch.setattr(save, "file_digest", digest)
    else:
        lose()
    try:
        with pytest.raises(LeaseLost):
            _save(run, 40)
        with pytest.raises(LeaseLost):
            set_link(run / "best", newest)
        with pytest.raises(LeaseLost):
            prune_checkpoints(run, keep=0)
    finally:
        unregister(fence)
    assert (run / "leases" / "000002.json").exists()
    assert checkpoint_folders(run) == [newest] == [_newest(run)]
    assert link_target(run / "last").name == newest.name and not (run / "best").exists()


def test_a_run_may_pass_a_million_steps(checkpoints: StoragePath) -> None:
    _save(checkpoints, 999_999)
    newest = _save(checkpoints, 1_000_000)
    assert _newest(checkpoints) == newest


def test_damaged_checkpoints_are_named_on_stderr(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard output belongs to a job's result."""
    _flip(folder / "step-000020" / "model.safetensors")
    newest_checkpoint(folder)
    assert "step-000020" in capfd.readouterr().err


# -- object storage ----------------------------------------------------------------------------


@pytest.fixture
def uploaded(bucket: str, tmp_path: Path) -> ObjectPath:
    """Checkpoints of steps 10 and 20 in a bucket."""
    folder = as_path(bucket) / tmp_path.name
    assert isinstance(folder, ObjectPath)
    for step in (10, 20):
        _save(folder, step)
    return folder


def test_last_and_best_are_names_in_a_bucket(uploaded: ObjectPath) -> None:
    set_link(uploaded / "best", uploaded / "step-000010")
    assert read_checkpoint(uploaded / "best").path == uploaded / "step-000010"
    assert read_checkpoint(uploaded / "last").state.step == 20
    with pytest.raises(CheckpointError, match="/step-000099: "):
        read_checkpoint(uploaded / "step-000099")


def test_an_upload_that_was_cut_off_is_no_checkpoint(
    uploaded: ObjectPath, capfd: pytest.CaptureFixture[str]
) -> None:
    (uploaded / "step-000030" / "model.safetensors").write_bytes(b"half of it")
    assert _newest(uploaded) == uploaded / "step-000020"
    assert newest_step(uploaded) == 20
    assert not capfd.readouterr().err, "nothing was lost"
    saved = _save(uploaded, 30)
    assert _newest(uploaded) == saved and newest_step(uploaded) == 30
    assert {file.name for file in saved.iterdir()} == FILES


def test_what_a_bucket_lost_is_noticed(
    uploaded: ObjectPath, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = uploaded / "step-000020" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*\bchecksum\b"):
        read_checkpoint(uploaded / "step-000020").weights()
    weights.write_bytes(data[:-1])
    assert _newest(uploaded) == uploaded / "step-000010"
    assert "model.safetensors" in capfd.readouterr().err


def test_a_bucket_that_is_away_is_not_an_empty_one() -> None:
    away = as_path("s3://runs?endpoint_override=127.0.0.1:9&scheme=http&region=r")
    with pytest.raises(OSError):
        newest_checkpoint(away / "checkpoints")
