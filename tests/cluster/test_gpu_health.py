"""What nvidia-smi says of GPUs, and what of it is a reason not to use them.

No GPU wrote these logs: they have the elements of real ones of drivers 535 and 590, with values of
failing GPUs. The lines of plain text are those that nvidia-smi prints when a GPU is lost.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from omni.cluster.gpu_health import GpuHealth, gpu_health, read_health

LOST = "Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error"


def log(*gpus: str) -> str:
    found = "".join(
        f'<gpu id="00000000:0{i}:00.0"><uuid>GPU-{i}abc-1</uuid>{gpu}</gpu>'
        for i, gpu in enumerate(gpus)
    )
    return (
        '<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">'
        f"<nvidia_smi_log><driver_version>580.95.05</driver_version>{found}</nvidia_smi_log>"
    )


def volatile(sram: str, dram: str) -> str:
    return (
        "<ecc_errors><volatile><sram_correctable>9</sram_correctable>"
        f"<sram_uncorrectable>{sram}</sram_uncorrectable><dram_correctable>9</dram_correctable>"
        f"<dram_uncorrectable>{dram}</dram_uncorrectable></volatile>"
        "<aggregate><dram_uncorrectable>7</dram_uncorrectable></aggregate></ecc_errors>"
    )


def reason(word: str, name: str, value: str) -> str:
    field = f"clocks_{word}_reason_{name}"
    return f"<clocks_{word}_reasons><{field}>{value}</{field}></clocks_{word}_reasons>"


HEALTHY = (
    volatile("0", "0")
    + "<remapped_rows><remapped_row_corr>1</remapped_row_corr>"
    + "<remapped_row_pending>No</remapped_row_pending>"
    + "<remapped_row_failure>No</remapped_row_failure></remapped_rows>"
    + "<gpu_reset_status><reset_required>No</reset_required></gpu_reset_status>"
    + "<gpu_recovery_action>None</gpu_recovery_action>"
    + reason("event", "sw_power_cap", "Active")
    + reason("event", "hw_thermal_slowdown", "Not Active")
    + "<temperature><gpu_temp>71 C</gpu_temp></temperature>"
)
CONSUMER = volatile("N/A", "N/A") + "<remapped_rows>N/A</remapped_rows>"


def test_gpus_in_order_are_no_reason() -> None:
    assert read_health(0, log(HEALTHY, CONSUMER, ""), "", 3) == GpuHealth([], [], "580.95.05")


@pytest.mark.parametrize(
    ("gpu", "named"),
    [
        (volatile("0", "2"), "2 uncorrectable"),
        (volatile("1", "2"), "3 uncorrectable"),
        (
            "<ecc_errors><volatile><double_bit><total>4</total></double_bit></volatile></ecc_errors>",
            "4 uncorrectable",
        ),
        (
            "<remapped_rows><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>",
            "remapped",
        ),
        (
            "<remapped_rows><remapped_row_pending>Yes</remapped_row_pending></remapped_rows>",
            "reset",
        ),
        ("<retired_pages><pending_blacklist>Yes</pending_blacklist></retired_pages>", "retired"),
        ("<gpu_reset_status><reset_required>Yes</reset_required></gpu_reset_status>", "reset"),
        ("<gpu_recovery_action>Reboot</gpu_recovery_action>", "reboot"),
        (reason("event", "hw_thermal_slowdown", "Active"), "hot"),
        (reason("throttle", "hw_power_brake_slowdown", "Active"), "power"),
        ("<temperature><gpu_temp>GPU is lost</gpu_temp></temperature>", "lost"),
    ],
)
def test_a_failing_gpu_is_named_with_its_cause(gpu: str, named: str) -> None:
    found = read_health(0, log(HEALTHY, gpu), "", 2)
    [fault] = found.faults
    assert fault.startswith("GPU 1 (00000000:01:00.0): ") and named in fault
    assert found.driver == "580.95.05"


def test_heat_that_the_driver_handles_is_a_remark() -> None:
    found = read_health(0, log(reason("event", "sw_thermal_slowdown", "Active")), "", 1)
    assert found.faults == [] and len(found.notes) == 1


@pytest.mark.parametrize(
    ("code", "out", "err", "words"),
    [
        (255, LOST, "", ("255", "GPU0000:CB:00.0")),
        (15, log(HEALTHY), LOST, ("15", "bus", "GPU0000:CB:00.0")),
        (9, "", "", ("9", "driver")),
        (14, log(HEALTHY), "", ("14", "infoROM")),
        (77, "", "", ("77",)),
        (0, LOST, "", (LOST,)),
        (0, "", "", ("nothing",)),
        (0, log(HEALTHY)[:300], "", ("XML",)),
    ],
)
def test_codes_and_text_instead_of_a_log_are_faults(
    code: int, out: str, err: str, words: tuple[str, ...]
) -> None:
    found = read_health(code, out, err, 1)
    [fault] = found.faults
    assert all(word in fault for word in words)


def test_a_query_that_is_not_supported_says_nothing_about_a_gpu() -> None:
    found = read_health(3, "", "", 1)
    assert not found.faults and "3" in found.notes[0]


def test_a_gpu_that_is_missing_is_counted() -> None:
    [fault] = read_health(0, log(HEALTHY), "", 2).faults
    assert "1 of 2" in fault
    sliced = f"<mig_devices><mig_device>{HEALTHY}</mig_device></mig_devices>"
    assert read_health(0, log(sliced), "", 7).faults == [], "Ray counts slices"


def test_gpus_that_ray_does_not_have_are_not_looked_at() -> None:
    failing = log(HEALTHY, volatile("0", "2"))
    assert read_health(0, failing, "", 1, ["0"]).faults == []
    assert len(read_health(0, failing, "", 1, ["1"]).faults) == 1
    assert len(read_health(0, failing, "", 1, ["GPU-1abc"]).faults) == 1


def test_a_program_that_hangs_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    [fault] = gpu_health(1, [], 0.2).faults
    assert "0.2 s" in fault and time.monotonic() - began < 30
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu_health(1, [], 0.2).faults == [] and gpu_health(1, [], 0.2).notes
