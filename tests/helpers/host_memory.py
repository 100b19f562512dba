"""Measured peak memory of each rank of a sharded model, as its operating system counts it.

`python -m tests.helpers.host_memory [ranks]` prints the rows of docs/cluster.md: a GPT of 306
million parameters in fp32, on a group of processes. Peak resident memory of each phase, without
what the process held before the model (Python, torch).
"""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from omni.checkpoint.checkpoint import read_checkpoint
from omni.checkpoint.save import Facts
from omni.checkpoint.sharded_writer import ShardedCheckpoint, ShardedWriter
from omni.checkpoint.train_state import TrainState
from omni.config import parse_config
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig
from omni.run.memory import size_text
from omni.train.distributed import all_gather
from omni.train.lockstep import in_step
from omni.train.model_state import ModelState
from tests.helpers.peak_memory import speech_block
from tests.helpers.resident import PeakMemory
from tests.helpers.sharded import Log

SHAPE = OmniConfig(GPTConfig(2048, 8192, 17, 16, 16, 1024), 384)
SETTINGS = {
    "train": {"strategy": "fsdp", "precision": "fp32"},
    "optim": {"bin_positions": 256, "bins_per_step": 8},
}


def measure(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=400),
    )
    config = parse_config(SETTINGS | {"train": {**SETTINGS["train"], "workers": world}})
    found: dict[str, int] = {}
    peak = PeakMemory()
    state = ModelState(config, SHAPE, torch.device("cpu"), world)
    dist.barrier()
    found["build"] = peak.take()
    weights, rest = state.snapshot(rank)
    writer = ShardedWriter(Path(folder), 2, Log(), rank, all_gather)
    facts = Facts(TrainState(step=1), SHAPE, {}, "", "")
    writer.save(ShardedCheckpoint(facts, weights, rest, best=False))
    writer.wait()
    writer.close()
    del weights, rest, writer
    found["save"] = peak.take()
    state.load_best(read_checkpoint(Path(folder) / "last"))
    found["read"] = peak.take()
    with state.evaluating() as model, in_step(model), torch.inference_mode():
        model(speech_block(config, SHAPE, 2.4, 20))
    found["evaluate"] = peak.take()
    every = all_gather([found])
    if rank == 0:
        whole = 4 * sum(p.numel() for p in state.model.parameters())
        shard = sum(4 * p.to_local().numel() for p in state.model.parameters())  # type: ignore[operator]
        cells = [size_text(max(each[phase] for each in every)) for phase in found]
        print(f"| {world} | {size_text(whole)} | {size_text(shard)} | {' | '.join(cells)} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in map(int, sys.argv[1:] or ["2", "4"]):
        with tempfile.TemporaryDirectory() as name:
            mp.spawn(measure, (ranks, name), ranks)
