"""Read the health of a node's GPUs from `nvidia-smi`."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_CAUSES = {
    2: "it does not know an argument",
    3: "a GPU does not support the query",
    4: "this user may not use a GPU",
    6: "a GPU was not found",
    8: "the external power of a GPU is not connected",
    9: "the NVIDIA driver is not loaded",
    10: "the kernel has an interrupt issue with a GPU",
    12: "libnvidia-ml.so was not found",
    13: "libnvidia-ml.so and the driver are of different versions",
    14: "the infoROM of a GPU is corrupted",
    15: "a GPU has fallen off the bus",
    255: "the driver failed",
}
"""Causes of its exit codes, from its manual page."""
_OURS = {2, 3}
"""Codes that say something about the query, and nothing about a GPU."""
_FLAGS = {
    "remapped_rows/remapped_row_failure": "a memory row could not be remapped",
    "remapped_rows/remapped_row_pending": "a memory row waits for a reset to be remapped",
    "retired_pages/pending_retirement": "a memory page waits for a reset to be retired",
    "retired_pages/pending_blacklist": "a memory page waits for a reset to be retired",
    "ecc_errors/unrepairable_memory": "memory cannot be repaired",
    "ecc_errors/aggregate/sram_threshold_exceeded": "too many uncorrectable errors in SRAM",
    "gpu_reset_status/reset_required": "it must be reset",
    "gpu_reset_status/drain_and_reset_recommended": "it should be reset",
}
"""Fields that are Yes on a GPU that should not be used; those of other drivers are absent."""
_SLOW = {
    "hw_thermal_slowdown": "too hot, its clocks are halved or worse",
    "hw_power_brake_slowdown": "the power supply made it halve its clocks or worse",
}
_WARM = {"sw_thermal_slowdown": "warm, the driver lowers its clocks"}


@dataclass(frozen=True)
class GpuHealth:
    """Reasons not to use a node's GPUs, remarks about them, and the version of its driver."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    driver: str | None = None


def gpu_health(expected: int, visible: Sequence[str], seconds: float) -> GpuHealth:
    """Ask nvidia-smi for the health of this node's GPUs, for at most `seconds`.

    expected: GPUs that Ray has here. visible: indices or UUIDs of those that this process may use;
    if the node has more than Ray, the others are left out.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return GpuHealth(notes=["no nvidia-smi: the health of its GPUs is not known"])
    process = subprocess.Popen(
        [program, "-q", "-x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # It is not waited for: inside the driver, a process cannot be killed.
        return GpuHealth([f"nvidia-smi does not answer within {seconds:g} s"])
    return read_health(process.returncode, out, err, expected, visible)


def read_health(
    code: int, out: str, err: str, expected: int, visible: Sequence[str] = ()
) -> GpuHealth:
    """Read the exit code and output of `nvidia-smi -q -x`. Arguments as of `gpu_health`."""
    if code:
        said = [line.strip() for line in (*err.splitlines(), *out.splitlines()) if line.strip()]
        plain = [line for line in said if not line.startswith("<")]
        cause = _CAUSES.get(code, "a code that its manual does not list")
        text = f"nvidia-smi ends with code {code} ({cause})" + (f": {plain[0]}" if plain else "")
        return GpuHealth(notes=[text]) if code in _OURS else GpuHealth([text])
    try:
        log = ElementTree.fromstring(out)
    except ElementTree.ParseError as error:
        # It also reports a lost GPU in plain text.
        first = next((line.strip() for line in out.splitlines() if line.strip()), "nothing")
        return GpuHealth([f"nvidia-smi printed {first[:120]!r}, which is not XML ({error})"])
    gpus = list(enumerate(log.iter("gpu")))
    driver = log.findtext("driver_version")
    if log.find(".//mig_device") is None:
        if len(gpus) < expected:
            return GpuHealth([f"nvidia-smi lists {len(gpus)} of {expected} GPUs"], [], driver)
        if len(gpus) > expected:
            gpus = [(index, gpu) for index, gpu in gpus if _is_one_of(visible, index, gpu)]
    faults, notes = [], []
    for index, gpu in gpus:
        name = f"GPU {index} ({gpu.get('id', 'no bus id')})"
        faults += [f"{name}: {text}" for text in _faults(gpu)]
        notes += [f"{name}: {text}" for text in _slowdowns(gpu, _WARM)]
    return GpuHealth(faults, notes, driver)


def _is_one_of(names: Sequence[str], index: int, gpu: Element) -> bool:
    """Tell whether a GPU is one of `names`: indices or (beginnings of) UUIDs."""
    uuid = (gpu.findtext("uuid") or "").removeprefix("GPU-")
    return str(index) in names or any(
        uuid.startswith(name.removeprefix("GPU-")) for name in names if not name.isdigit()
    )


def _faults(gpu: Element) -> Iterator[str]:
    """Yield the reasons not to use a GPU. A field that is missing, or N/A, is no reason."""
    if errors := _uncorrectable(gpu):
        yield f"{errors} uncorrectable memory errors since the driver was loaded"
    for path, text in _FLAGS.items():
        if _text(gpu, path) == "yes":
            yield text
    action = _text(gpu, "gpu_recovery_action")
    if action not in ("", "none", "n/a"):
        yield f"the driver asks for: {action}"
    yield from _slowdowns(gpu, _SLOW)
    if "err!" in (lost := _text(gpu, "temperature/gpu_temp")) or "lost" in lost:
        yield f"its temperature reads {lost}"


def _uncorrectable(gpu: Element) -> int:
    """Count the uncorrectable errors of a GPU's memories since its driver was loaded."""
    volatile = gpu.find("ecc_errors/volatile")
    if volatile is None:
        return 0
    total = volatile.findtext("double_bit/total")  # of drivers before 450
    found = [total] if total else [e.text for e in volatile.iter() if "uncorrectable" in e.tag]
    count = 0
    for text in found:
        with contextlib.suppress(ValueError, TypeError):
            count += int(text)  # type: ignore[arg-type]
    return count


def _slowdowns(gpu: Element, texts: dict[str, str]) -> Iterator[str]:
    for word in ("event", "throttle"):  # Drivers before 535 call them throttle reasons.
        for name, text in texts.items():
            if _text(gpu, f"clocks_{word}_reasons/clocks_{word}_reason_{name}") == "active":
                yield text


def _text(gpu: Element, path: str) -> str:
    return (gpu.findtext(path) or "").strip().lower()
