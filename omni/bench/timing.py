"""Timing side by side: everything is measured in turns in one process, and reported as ratios.

A machine shared with others changes its speed by the minute. Two things measured one after the
other therefore compare the minutes; measured A B A B, with medians, they compare the things.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

_COPY_BYTES = 256 << 20


@dataclass
class Result:
    """What a suite found. `ratio` holds what the targets are about, under dotted names."""

    suite: str
    machine: dict[str, Any]
    ratio: dict[str, float] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)  # rows of the table
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.figures.append({"name": name, "value": value, "unit": unit, "note": note})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def alternate(
    jobs: Mapping[str, Callable[[], Any]], rounds: int = 5, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each job in each round, the jobs taking turns; one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            _finish(device)
            began = time.perf_counter()
            job()
            _finish(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio_of(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes: the median over rounds of the two in one round."""
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def median(values: list[float]) -> float:
    return statistics.median(values)


class Ceiling:
    """What the machine can do: matrix products of a dtype, and copies, of a size that is easy."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._size = 2048 if device.type == "cpu" else 8192
        self._device = device
        shape = (self._size, self._size)
        self._a, self._b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        self._source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def multiply(self, times: int = 1) -> None:
        for _ in range(times):
            F.linear(self._a, self._b)

    def copy(self) -> None:
        self._target.copy_(self._source)

    @property
    def flops(self) -> float:
        """Floating-point operations of one `multiply`."""
        return 2.0 * self._size**3

    @property
    def copied_bytes(self) -> float:
        """Bytes read and written by one `copy`."""
        return 2.0 * _COPY_BYTES


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _finish(device: torch.device | None) -> None:
    """GPU work is only queued when a call returns."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
