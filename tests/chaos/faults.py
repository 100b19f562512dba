"""What can go wrong in days of training, done to real processes.

A fault returns once it has been done; where it ends the job, it starts the same command again.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from omni.errors import ExitCode
from tests.chaos.world import ChaosError, World

Fault = Callable[[World, random.Random], None]
_FAULTS: dict[str, Fault] = {}


def _fault(name: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        _FAULTS[name] = function
        return function

    return register


def all_faults() -> dict[str, Fault]:
    return dict(_FAULTS)


def _one(found: list[psutil.Process], rng: random.Random, what: str) -> psutil.Process:
    if not found:
        raise ChaosError(f"no {what} process is running")
    return rng.choice(sorted(found, key=lambda process: process.pid))


def _encoder(world: World, rng: random.Random) -> psutil.Process:
    """An encoder; a train worker in an attempt whose features are all cached, without encoders."""
    return _one(world.encoders() or world.trainers(), rng, "encoder or train worker")


@_fault("encoder actor killed")
def _encoder_killed(world: World, rng: random.Random) -> None:
    _encoder(world, rng).send_signal(signal.SIGKILL)


@_fault("train worker killed")
def _worker_killed(world: World, rng: random.Random) -> None:
    _one(world.trainers(), rng, "train worker").send_signal(signal.SIGKILL)


@_fault("node killed, another comes")
def _node_killed(world: World, rng: random.Random) -> None:
    assert world.cluster is not None
    world.cluster.remove_node(rng.choice(world.worker_nodes()), allow_graceful=False)
    world.add_node()


@_fault("driver killed, same command")
def _driver_killed(world: World, rng: random.Random) -> None:
    assert world.job is not None
    world.job.send_signal(signal.SIGKILL)
    world.job_ended(10)
    world.start_job()


@_fault("head killed, new cluster")
def _head_killed(world: World, rng: random.Random) -> None:
    world.kill_cluster()
    code = world.job_ended(150)
    if code in (0, 2):
        raise ChaosError(f"the job ended with {code} when its cluster died")
    world.start_cluster()
    world.start_job()


@_fault("encoder stopped (SIGSTOP)")
def _encoder_stopped(world: World, rng: random.Random) -> None:
    _encoder(world, rng).send_signal(signal.SIGSTOP)


@_fault("encoder hangs in a call")
def _encoder_hangs(world: World, rng: random.Random) -> None:
    world.order("hang", _encoder(world, rng))


@_fault("train worker stopped (SIGSTOP)")
def _worker_stopped(world: World, rng: random.Random) -> None:
    _one(world.trainers(), rng, "train worker").send_signal(signal.SIGSTOP)


@_fault("out-of-memory kill of the largest")
def _largest_killed(world: World, rng: random.Random) -> None:
    """What the kernel does, to whom it does it."""
    largest = max(world.processes(""), key=lambda process: process.memory_info().rss)
    largest.send_signal(signal.SIGKILL)


@_fault("disk full for checkpoint and cache")
def _disk_full(world: World, rng: random.Random) -> None:
    if not world.disk.bounded:
        raise ChaosError("a full disk needs the right to mount a small one")
    # So that features are written again. A run without its prepared parts would write no checkpoint
    # that could be refused: it waits for room to make them again.
    _wipe_cache(world, keep="prepared")
    seen = len(world.events())

    def refused() -> bool:
        return any(row["event"] == "checkpoint failed" for row in world.events()[seen:])

    with world.disk.full(leave=150_000):
        world.wait(refused, "a checkpoint was refused", 60)
    newest = world.step()
    world.wait(lambda: _newest(world) >= newest - 20, "a checkpoint after the disk had room", 60)


def _newest(world: World) -> int:
    names = [path.name for path in (world.run_dir / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@_fault("storage away for a while")
def _storage_away(world: World, rng: random.Random) -> None:
    with world.disk.away():
        time.sleep(rng.uniform(3, 20))


@_fault("preemption notice, then the node goes")
def _preempted(world: World, rng: random.Random) -> None:
    assert world.cluster is not None
    attempts = [row for row in world.events() if row["event"] == "attempt"]
    home = next(n for n in world.worker_nodes() if n.node_id in attempts[-1]["nodes"])
    subprocess.run(
        [
            *(Path(sys.executable).with_name("ray"), "drain-node"),
            *("--address", world.cluster.address, "--node-id", home.node_id),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", "20"),
        ],
        check=True,
        capture_output=True,
    )
    seen = len(world.events())
    world.add_node()

    def moved() -> bool:
        return any(row["event"] == "stopped" for row in world.events()[seen:])

    world.wait(moved, "a checkpoint before the node went", 20)
    with contextlib.suppress(Exception):  # it may have gone by itself
        world.cluster.remove_node(home, allow_graceful=False)


@_fault("NaN in a gradient")
def _nan(world: World, rng: random.Random) -> None:
    world.order("nan", _one(world.trainers(), rng, "train worker"))
    seen = len(world.events())

    def recomputed() -> bool:
        return any(row["event"] == "recomputed" for row in world.events()[seen:])

    world.wait(recomputed, "the step was computed again", 30)


@_fault("SIGTERM, same command")
def _sigterm(world: World, rng: random.Random) -> None:
    _signal(world, signal.SIGTERM, 143)


@_fault("Ctrl-C, same command")
def _ctrl_c(world: World, rng: random.Random) -> None:
    _signal(world, signal.SIGINT, 130)


def _signal(world: World, number: signal.Signals, expected: int) -> None:
    assert world.job is not None
    world.job.send_signal(number)
    code = world.job_ended(60)
    if code != expected:
        raise ChaosError(f"{number.name}: exit code {code}, not {expected}")
    if world.events()[-1]["event"] != "stopped":
        raise ChaosError(f"{number.name}: no checkpoint of the last step")
    world.start_job()


@_fault("newest checkpoint damaged, worker killed")
def _damaged(world: World, rng: random.Random) -> None:
    newest = world.run_dir / "checkpoints" / f"step-{_newest(world):06d}"
    _flip(newest / rng.choice(["model.safetensors", "optimizer.safetensors", "state.json"]), rng)
    _worker_killed(world, rng)


def _flip(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        place = rng.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))


@_fault("second driver")
def _second_driver(world: World, rng: random.Random) -> None:
    """What a job server does that believes the first one dead."""
    code = world.second_job()
    if code != ExitCode.RUN_TAKEN:
        raise ChaosError(f"a second driver of the run ended with {code}")


@_fault("room lost at the start")
def _room_lost(world: World, rng: random.Random) -> None:
    """All nodes go when the next attempt has been decided, and come back after it was given up."""
    assert world.cluster is not None
    seen = len(world.events())
    _worker_killed(world, rng)
    world.wait(lambda: _happened(world, seen, "failure"), "the driver noticed a killed worker", 90)
    nodes = world.worker_nodes()
    for node in nodes:
        world.cluster.remove_node(node, allow_graceful=False)
    world.wait(lambda: _happened(world, seen, "no room"), "a start without room was given up", 150)
    for _ in nodes:
        world.add_node()


def _happened(world: World, seen: int, event: str) -> bool:
    return any(row["event"] == event for row in world.events()[seen:])


@_fault("feature cache wiped")
def _cache_wiped(world: World, rng: random.Random) -> None:
    _wipe_cache(world)


def _wipe_cache(world: World, keep: str = "") -> None:
    for folder in (world.storage / "cache").glob("*/"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)
