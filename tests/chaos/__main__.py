"""A training run on a cluster of several nodes while everything breaks: python -m tests.chaos.

First the run undisturbed; then the same run with faults at random moments. It must end with a clean
audit and with the same model: bit for bit with one worker, else a dev loss within 0.001.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jobs import audit
from tests.chaos.faults import all_faults
from tests.chaos.world import ChaosError, World

STEPS_PER_FAULT = 45
AHEAD = 20  # steps after a fault until its costs are known
FAULTS = all_faults()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", default="1", help="train.workers: 2, or [1,2]")
    parser.add_argument("--nodes", type=int, default=2, help="besides the head")
    parser.add_argument("--only", action="append", metavar="NAME", help="faults by name")
    parser.add_argument("--uncached", action="store_true", help="encode in every epoch")
    parser.add_argument("--streams", type=int, default=1, help="streams that feed the ranks")
    parser.add_argument("--window", type=int, default=262_144, help="data.window_utterances")
    parser.add_argument("--keep", type=Path, help="work in this empty folder and leave it there")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    names = _sequence(arguments.only or list(FAULTS), arguments.faults, rng)
    with tempfile.TemporaryDirectory(prefix="omni-chaos-") as temporary:
        base = arguments.keep or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        steps = STEPS_PER_FAULT * arguments.faults
        world = World(
            base,
            steps=steps,
            workers=arguments.workers,
            nodes=arguments.nodes,
            cached=not arguments.uncached,
            streams=arguments.streams,
            window=arguments.window,
        )
        lost: dict[str, list[float]] = defaultdict(list)
        injected: dict[str, int] = defaultdict(int)
        try:
            expected = _undisturbed(world)
            _say(f"undisturbed: {steps} steps, dev loss {expected['dev_loss']:.6f}")
            world.start_cluster()
            world.start_job()
            world.wait(lambda: world.step() > 5, "the run began")
            for number, name in enumerate(names, start=1):
                injected[name] += 1
                lost[name].append(_inject(world, name, rng))
                _say(
                    f"{number:>3}/{len(names)} step {world.step():>5}  "
                    f"{lost[name][-1]:6.1f} s lost  {name}"
                )
            world.wait(world.finished, "the run ended", 1800)
            world.job_ended(60)
            return _verdict(world, expected, arguments.workers)
        except ChaosError as error:
            _say(f"NOT SURVIVED: {error}")
            _say((base / "job.log").read_text()[-3000:])
            return 1
        finally:
            _table(injected, lost)
            world.close()


def _sequence(names: list[str], count: int, rng: random.Random) -> list[str]:
    """Every fault about equally often, in random order."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += rng.sample(names, len(names))
    chosen = chosen[:count]
    rng.shuffle(chosen)
    return chosen


def _undisturbed(world: World) -> dict[str, object]:
    world.start_job(address=False)
    code = world.job_ended(1800)
    if code != 0:
        raise ChaosError(f"the undisturbed run ended with {code}")
    aside = world.storage / "undisturbed"
    os.rename(world.run_dir, aside)
    for folder in (world.storage / "cache").glob("*/"):  # the disturbed run makes its own features
        shutil.rmtree(folder)
    summary: dict[str, object] = json.loads((aside / "summary.json").read_text())
    return summary


def _inject(world: World, name: str, rng: random.Random) -> float:
    """Do it at a random moment; the seconds that it costs the training."""
    first = world.step()
    world.wait(lambda: world.step() > first, f"progress before: {name}")
    first, began = world.step(), time.monotonic()
    target = first + rng.randint(5, 25)
    world.wait(lambda: world.step() >= target, f"progress before: {name}")
    pace = (time.monotonic() - began) / (world.step() - first)
    time.sleep(rng.uniform(0, 0.3))
    reached = world.step()
    began = time.monotonic()
    FAULTS[name](world, rng)
    # What lay ready in buffers hides a fault for a moment: look a little further.
    ahead = reached + AHEAD
    world.wait(lambda: world.step() >= ahead or world.finished(), f"progress after: {name}")
    return max(0.0, time.monotonic() - began - pace * (world.step() - reached))


def _verdict(world: World, expected: dict[str, object], workers: str) -> int:
    summary = json.loads((world.run_dir / "summary.json").read_text())
    clean = audit.main([str(world.run_dir)]) == 0
    difference = abs(summary["dev_loss"] - float(str(expected["dev_loss"])))
    last = Path("checkpoints/last/model.safetensors")
    same = (world.run_dir / last).read_bytes() == (
        world.storage / "undisturbed" / last
    ).read_bytes()
    _say(
        f"dev loss {summary['dev_loss']:.6f}, {difference:.2e} from the undisturbed run; weights "
        f"{'bit-identical' if same else 'not bit-identical'}"
    )
    survived = clean and difference < 1e-3 and (same or workers != "1")
    _say("survived" if survived else "NOT SURVIVED")
    return 0 if survived else 1


def _table(injected: dict[str, int], lost: dict[str, list[float]]) -> None:
    width = max(map(len, FAULTS))
    _say(f"\n{'fault':<{width}}  injected  survived  seconds lost: mean  worst")
    for name in FAULTS:
        if injected[name]:
            times = lost[name] or [0.0]
            cost = f"{sum(times) / len(times):>18.1f}  {max(times):>5.1f}"
            _say(f"{name:<{width}}  {injected[name]:>8}  {len(lost[name]):>8}  {cost}")
    _say(f"{'all':<{width}}  {sum(injected.values()):>8}  {sum(map(len, lost.values())):>8}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
