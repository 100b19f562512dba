"""Checkpoints whose tensors several ranks write by rows. Ranks are threads with a real storage."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni.checkpoint import sharded_writer
from omni.checkpoint.checkpoint import CheckpointError, read_checkpoint
from omni.checkpoint.resume import newest_checkpoint
from omni.checkpoint.save import Facts
from omni.checkpoint.sharded_writer import ShardedCheckpoint, ShardedWriter
from omni.checkpoint.tensor_files import Rows
from omni.checkpoint.train_state import TrainState
from omni.config import Config
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.storage.path import ObjectPath, StoragePath, as_path
from tests.checkpoint.test_writer import Log
from tests.helpers.loopback_s3 import s3_bucket

WORLD = 3
SHAPE = OmniConfig(
    GPTConfig(sequence_len=32, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=24),
    feature_dim=4,
    stack=2,
)
TOKENIZER = SpeechTokenizer.train(["hello there"], 265)
PARTS = [f"{part}.rank-{r:04d}.safetensors" for part in ("model", "optimizer") for r in range(3)]


class Ranks:
    """Writers of `WORLD` ranks; each call is made by all of them together."""

    def __init__(self, folder: StoragePath) -> None:
        self._reports: list[list[Any]] = [[] for _ in range(WORLD)]
        self._meeting = threading.Barrier(WORLD, timeout=60)
        self._threads = ThreadPoolExecutor(WORLD)
        self.logs = [Log() for _ in range(WORLD)]
        self.writers = [
            ShardedWriter(folder, 2, self.logs[rank], rank, self._gather(rank))
            for rank in range(WORLD)
        ]

    def _gather(self, rank: int) -> Callable[[list[Any]], list[Any]]:
        def gather(items: list[Any]) -> list[Any]:
            self._reports[rank] = items
            self._meeting.wait()
            found = [item for part in self._reports for item in part]
            self._meeting.wait()
            return found

        return gather

    def call(self, method: Callable[[ShardedWriter, int], None]) -> None:
        made = [self._threads.submit(method, self.writers[rank], rank) for rank in range(WORLD)]
        for one in made:
            one.result()

    def save(self, step: int, best: bool = False) -> None:
        self.call(lambda writer, rank: writer.save(_part(step, rank, best)))

    def wait(self, seconds: float = 60.0) -> None:
        self.call(lambda writer, rank: writer.wait(seconds))

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def _weights(step: int) -> dict[str, Tensor]:
    model = OmniModel(SHAPE)
    model.init_weights(step)
    return {name: p.detach() for name, p in model.named_parameters()}


def _rows(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor | Rows]:
    """The rows of a rank, as FSDP splits them; some ranks have none of a small tensor."""
    parts: dict[str, Tensor | Rows] = {}
    for name, tensor in tensors.items():
        chunks = tensor.chunk(WORLD)
        if rank < len(chunks):
            first = sum(map(len, chunks[:rank]))
            parts[name] = Rows(chunks[rank], first, len(tensor))
    return parts


def _part(step: int, rank: int, best: bool = False) -> ShardedCheckpoint:
    state = TrainState(step=step, best_value=0.5)
    facts = Facts(state, SHAPE, {"source": "x"}, Config().to_yaml(), TOKENIZER.to_json())
    optimizer = _rows({f"adamw/{n}/exp_avg": 2 * t for n, t in _weights(step).items()}, rank)
    if rank == 0:
        optimizer["adamw/lm.lm_head.weight/step"] = torch.tensor(float(step))
    return ShardedCheckpoint(facts, _rows(_weights(step), rank), optimizer, best)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("sharded") as uri:
        yield uri


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "disk":
        return tmp_path / "checkpoints"
    return as_path(request.getfixturevalue("bucket")) / tmp_path.name


@pytest.fixture
def ranks(folder: StoragePath) -> Iterator[Ranks]:
    started = Ranks(folder)
    yield started
    started.close()


def _flip(path: StoragePath) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_what_the_ranks_write_is_one_checkpoint(ranks: Ranks, folder: StoragePath) -> None:
    for step in (1, 2, 3):
        ranks.save(step, best=step == 2)
    ranks.wait()
    path = folder / "step-000003"
    names = {file.name for file in path.iterdir()}
    assert names == {*PARTS, "state.json", "config.yaml", "tokenizer.json"}
    found = read_checkpoint(folder / "last", verify=True)
    assert found.state == TrainState(step=3, best_value=0.5)
    assert read_checkpoint(folder / "best").state.step == 2
    assert [step for step, _ in ranks.logs[0].written] == [1, 2, 3] and not ranks.logs[1].written
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-000002", "step-000003"]
    weights = _weights(3)
    for read in (found.weights(), dict(found.load_model().named_parameters())):
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[name], value) for name, value in weights.items())
    assert found.shapes() == {name: tuple(t.shape) for name, t in weights.items()}
    with found.open_optimizer() as optimizer:
        assert optimizer.whole("adamw/lm.lm_head.weight/step") == 3.0
        name = "lm.lm_head.weight"
        for first, end in ((0, 320), (100, 120), (319, 320), (7, 7)):
            rows = optimizer.rows(f"adamw/{name}/exp_avg", first, end)
            assert torch.equal(rows, 2 * weights[name][first:end])


@pytest.mark.parametrize("name", ["model.rank-0001.safetensors", "optimizer.rank-0002.safetensors"])
def test_a_damaged_part_is_noticed(ranks: Ranks, folder: StoragePath, name: str) -> None:
    for step in (1, 2):
        ranks.save(step)
    ranks.wait()
    _flip(folder / "step-000002" / name)
    found = newest_checkpoint(folder)
    assert found is not None
    if isinstance(folder, Path):
        assert found.state.step == 1
    else:  # A bucket's files are compared when they are read.
        with pytest.raises(CheckpointError, match=f"{name}.*checksum"):
            found.weights() if name.startswith("model") else found.optimizer()
    (folder / "step-000002" / name).unlink()
    found = newest_checkpoint(folder)
    assert found is not None and found.state.step == 1


def test_a_checkpoint_without_one_ranks_part_is_not_published(
    ranks: Ranks, folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.save(1)
    ranks.wait()
    write, refuse = sharded_writer.write_parts, threading.Event()
    refuse.set()

    def write_or_not(where: StoragePath, step: int, rank: int, *tensors: Any) -> Any:
        if rank == 1 and refuse.is_set():
            raise OSError(errno.EIO, "no answer")
        return write(where, step, rank, *tensors)

    monkeypatch.setattr(sharded_writer, "write_parts", write_or_not)
    monkeypatch.setattr(sharded_writer, "RETRY_SECONDS", 0.05)
    ranks.save(2, best=True)
    with pytest.raises(CheckpointError, match="no answer"):
        ranks.wait(0.5)
    ranks.save(3)  # Does not block: storage refuses.
    newest = newest_checkpoint(folder)
    assert newest is not None and newest.state.step == 1
    refuse.clear()
    ranks.wait()
    assert read_checkpoint(folder / "last", verify=True).state.step == 3
    assert read_checkpoint(folder / "best", verify=True).state.step == 2
    failed = ranks.logs[0].failed
    assert failed[0] == (2, "no answer", False) and all(known for *_, known in failed[1:])


def test_an_error_of_one_rank_ends_all(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, folder: StoragePath
) -> None:
    def broken(where: StoragePath, step: int, rank: int, *tensors: Any) -> Any:
        raise ValueError(f"rank {rank}")

    monkeypatch.setattr(sharded_writer, "write_parts", broken)
    ranks.save(1)
    caught = []

    def wait(writer: ShardedWriter, rank: int) -> None:
        with pytest.raises(CheckpointError, match="rank 0"):
            writer.wait()
        caught.append(rank)

    ranks.call(wait)
    assert sorted(caught) == [0, 1, 2]
    assert newest_checkpoint(folder) is None


def test_rows_that_no_file_holds_are_an_error(ranks: Ranks, folder: StoragePath) -> None:
    if isinstance(folder, ObjectPath):
        pytest.skip("the same reader")
    ranks.save(1)
    ranks.wait()
    found = read_checkpoint(folder / "last")
    digests = {n: d for n, d in found.digests.items() if n != "model.rank-0001.safetensors"}
    object.__setattr__(found, "digests", digests)
    with pytest.raises(CheckpointError, match="each row once"):
        found.weights()
