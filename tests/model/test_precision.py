"""bf16 where the processor has instructions for it, fp32 where it would be emulated."""

from __future__ import annotations

import pytest
import torch

from omni.model import precision
from omni.model.encoder.whisper import WhisperEncoder

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "hardware, wanted, computed",
    [
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.bfloat16, torch.float32),
        (True, torch.float32, torch.float32),
        (False, torch.float32, torch.float32),
    ],
)
def test_bf16_is_computed_in_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, hardware: bool, wanted: torch.dtype, computed: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device_type: hardware)
    assert precision.compute_dtype(wanted, CPU) == computed
    encoder = WhisperEncoder("embedded", mode="trim", dtype=wanted)
    assert encoder.encoder.conv1.weight.dtype == computed
    assert encoder.encode([torch.zeros(8000).numpy()])[0].dtype == wanted
