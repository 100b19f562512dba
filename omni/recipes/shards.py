"""Make tar shards of synthetic speech, in order, in one process or several.

A shard is a pure function of its number and the recipe, as far as the programs are deterministic,
so a killed job makes the same files when it continues, with any number of processes.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni.audio.windows import SAMPLING_RATE
from omni.recipes.takes import SpeechError, draw_take, finish, silence_share
from omni.recipes.voices import speak
from omni.storage.atomic import open_atomic, write_atomic

UTTERANCES = 250
"""Utterances per shard: about a quarter of an hour."""
_MOST_FAILURES = 0.1
"""Share of a shard's utterances; with more failures a program does not work."""


@dataclass
class ShardStats:
    """Counts of a shard. programs, speakers: seconds of each; silence: frames' share, summed."""

    utterances: int = 0
    seconds: float = 0.0
    words: int = 0
    silence: float = 0.0
    programs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    speakers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: ShardStats) -> None:
        self.utterances += other.utterances
        self.seconds += other.seconds
        self.words += other.words
        self.silence += other.silence
        self.failures.update(other.failures)
        for name, seconds in other.programs.items():
            self.programs[name] += seconds
        for name, seconds in other.speakers.items():
            self.speakers[name] += seconds

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> ShardStats:
        stats = cls(data["utterances"], data["seconds"], data["words"], data["silence"])
        stats.programs.update(data["programs"])
        stats.speakers.update(data["speakers"])
        stats.failures.update(data["failures"])
        return stats


@dataclass(frozen=True)
class Order:
    """Hold numbers and texts of the utterances of one shard."""

    number: int
    seed: int
    mixture: dict[str, float]
    texts: list[tuple[int, str]]


def shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05}.tar"


def read_stats(out: Path, number: int) -> ShardStats | None:
    """Return the counts of a finished shard; None: it is not finished."""
    if not shard_path(out, number).is_file():
        return None
    return ShardStats.of_json(json.loads(_stats_path(out, number).read_bytes()))


def _stats_path(out: Path, number: int) -> Path:
    return out / "stats" / f"shard-{number:05}.json"


def make_shard(order: Order, out: Path) -> ShardStats:
    """Speak a shard's sentences and write it. Raises RuntimeError if too many fail."""
    stats = ShardStats()
    path = shard_path(out, order.number)
    with (
        tempfile.TemporaryDirectory(prefix="omni-speech-") as folder,
        open_atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard,
    ):
        for number, text in order.texts:
            take = draw_take(order.seed, number, order.mixture)
            try:
                audio = finish(*speak(text, take, Path(folder)), take, text)
            except SpeechError as error:
                stats.failures[f"{take.speaker}: {error}"] += 1
                continue
            row = {"text": text, "speaker": take.speaker, "language": "en"}
            _add(shard, f"synthetic-{number:07}.flac", _flac(audio))
            _add(shard, f"synthetic-{number:07}.json", json.dumps(row).encode())
            seconds = len(audio) / SAMPLING_RATE
            stats.utterances += 1
            stats.seconds += seconds
            stats.words += len(text.split())
            stats.silence += silence_share(audio)
            stats.programs[take.program] += seconds
            stats.speakers[take.speaker] += seconds
        failed = sum(stats.failures.values())
        if failed > _MOST_FAILURES * len(order.texts):
            reason, count = stats.failures.most_common(1)[0]
            raise RuntimeError(
                f"{path.name}: {failed} of {len(order.texts)} sentences were not spoken; "
                f"{count} times {reason}"
            )
        # The shard's name appears after this block and says that both are there.
        write_atomic(_stats_path(out, order.number), json.dumps(vars(stats)).encode())
    return stats


def _flac(audio: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # Owner and time stay 0: the same bytes whoever runs it.
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def make_shards(
    order_of_shard: Callable[[int], Order], out: Path, seconds: float, processes: int
) -> Generator[tuple[int, ShardStats, bool], None, None]:
    """Yield number, counts and whether it was made now, of shards from 0 to `seconds` in all.

    Shards after the last one that is needed are removed: several processes work ahead.
    """
    (out / "stats").mkdir(exist_ok=True)
    for stale in [*out.glob(".*.tmp"), *out.glob("stats/.*.tmp")]:  # left by a killed job
        stale.unlink(missing_ok=True)
    total, number = 0.0, 0
    while (found := read_stats(out, number)) is not None:
        yield number, found, False
        total, number = total + found.seconds, number + 1
    made = _one_by_one if processes == 1 else _in_parallel
    shards = made(order_of_shard, out, number, processes)
    while total < seconds:
        stats, is_new = next(shards)
        yield number, stats, is_new
        total, number = total + stats.seconds, number + 1
    shards.close()
    for path in [*out.glob("shard-*.tar"), *out.glob("stats/shard-*.json")]:
        if int(path.stem.rpartition("-")[2]) >= number:
            path.unlink()


def _one_by_one(
    order_of_shard: Callable[[int], Order], out: Path, first: int, _: int
) -> Generator[tuple[ShardStats, bool], None, None]:
    number = first
    while True:
        found = read_stats(out, number)
        yield found or make_shard(order_of_shard(number), out), found is None
        number += 1


def _in_parallel(
    order_of_shard: Callable[[int], Order], out: Path, first: int, processes: int
) -> Generator[tuple[ShardStats, bool], None, None]:
    # Spawned, since a fork would copy the locks of libraries that have threads.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        ahead: deque[Any] = deque()
        number = first
        try:
            while True:
                while len(ahead) <= processes:
                    found = read_stats(out, number)
                    ahead.append(found or pool.submit(make_shard, order_of_shard(number), out))
                    number += 1
                taken = ahead.popleft()
                found = taken if isinstance(taken, ShardStats) else None
                yield found or taken.result(), found is None
        finally:
            pool.shutdown(cancel_futures=True)
