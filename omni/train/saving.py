"""Save the state of training: copies at once, files in the background.

One rank writes a model that each rank holds whole; of a sharded one, every rank writes its part.
"""

from __future__ import annotations

import copy
import functools

from torch import Tensor

from omni.checkpoint.save import Facts, save_checkpoint
from omni.checkpoint.sharded_writer import ShardedCheckpoint, ShardedWriter
from omni.checkpoint.tensor_files import Rows
from omni.checkpoint.train_state import TrainState
from omni.checkpoint.writer import CheckpointWriter, WriterLog
from omni.train.distributed import all_gather, barrier
from omni.train.model_state import ModelState
from omni.train.worker_spec import WorkerSpec


class Saver:
    """All methods but `close` are collective calls."""

    def __init__(self, spec: WorkerSpec, rank: int, sharded: bool, log: WriterLog) -> None:
        self._spec, self._rank = spec, rank
        folder = spec.config.run_dir / "checkpoints"
        self._folder, keep = folder, spec.config.train.keep_checkpoints
        self._together = ShardedWriter(folder, keep, log, rank, all_gather) if sharded else None
        alone = not sharded and rank == 0
        self._alone = CheckpointWriter(folder, keep, log) if alone else None

    def save(self, model_state: ModelState, state: TrainState, best: bool) -> None:
        """Copy the state of training, and write it as a checkpoint in the background.

        The ledgers of all ranks must be on disk before it says that their steps are done.
        """
        barrier()
        if self._together is None and self._alone is None:
            return
        weights, optimizer = model_state.snapshot(self._rank)
        spec = self._spec
        facts = Facts(
            copy.deepcopy(state),
            spec.model,
            spec.encoder.to_dict(),
            spec.config.to_yaml(),
            spec.tokenizer_json,
        )
        if self._together is not None:
            self._together.save(ShardedCheckpoint(facts, weights, optimizer, best))
        elif self._alone is not None:
            write = functools.partial(
                save_checkpoint,
                self._folder,
                state=facts.state,
                model=facts.model,
                encoder=facts.encoder,
                weights=_whole(weights),
                optimizer=_whole(optimizer),
                config_yaml=facts.config_yaml,
                tokenizer_json=facts.tokenizer_json,
            )
            self._alone.save(state.step, write, best)

    def poll(self) -> None:
        """Continue with a checkpoint that several ranks write; called between two steps."""
        if self._together is not None:
            self._together.poll()

    def finish(self) -> None:
        """Wait until all checkpoints are written."""
        if self._together is not None:
            self._together.wait()
        if self._alone is not None:
            self._alone.wait()
        barrier()

    def close(self) -> None:
        for writer in (self._together, self._alone):
            if writer is not None:
                writer.close()


def _whole(tensors: dict[str, Tensor | Rows]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
