"""Measure a call in a process of its own: its seconds, and its peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """Record a call in a process of its own: its value, its seconds, its peak resident memory.

    peak_gb: in units of 10^9 bytes.
    """

    value: Any
    seconds: float
    peak_gb: float


def alone(function: Callable[..., Any], *arguments: Any) -> Measured:
    """Call a module-level function in a fresh process, and measure it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured, function, arguments).result()


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Measured:
    torch.set_num_threads(1)
    began = time.perf_counter()
    value = function(*arguments)
    return Measured(value, time.perf_counter() - began, _peak_bytes() / 1e9)


def _peak_bytes() -> int:
    """Read the peak resident bytes of this process; getrusage would count its parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status: expected a line VmHWM")
