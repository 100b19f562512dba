"""Time jobs in turns in one process, and report ratios of their times.

The speed of a shared machine changes by the minute. Jobs timed one after the other would therefore
compare the minutes; timed in turns (A B A B), with medians, they compare the jobs.
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
    """Collect the results of a suite. `ratio` holds those that have targets, by dotted name."""

    suite: str
    machine: dict[str, Any]
    ratio: dict[str, float] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the printed table."""
    notes: list[str] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)
    """Points of curves over a size: chart, unit, curve, size, value (`omni.bench.growth_chart`)."""

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.figures.append({"name": name, "value": value, "unit": unit, "note": note})

    def add_point(self, chart: str, unit: str, curve: str, size: float, value: float) -> None:
        point = {"chart": chart, "unit": unit, "curve": curve, "size": size, "value": value}
        self.growth.append(point)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def alternate(
    jobs: Mapping[str, Callable[[], Any]], rounds: int = 5, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Run the jobs in turns, and return the seconds of each in each round.

    A first round is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            _synchronize(device)
            began = time.perf_counter()
            job()
            _synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio_of(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Compute the median over rounds of the time of `slow` divided by that of `fast`."""
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def median(values: list[float]) -> float:
    return statistics.median(values)


class Ceiling:
    """Run large matrix products and copies, to measure the peak speed of the machine."""

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
        """Return the floating-point operations of one matrix product of `multiply`."""
        return 2.0 * self._size**3

    @property
    def copied_bytes(self) -> float:
        """Return the bytes read and written by one `copy`."""
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


def _synchronize(device: torch.device | None) -> None:
    """Wait for the GPU, since a call returns as soon as its work is queued."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
