"""Networks in plain torch, and their weights.

The names of nanochat-omni's modules can be imported from here. They are loaded on first use, so
that importing a file of this room does not import all of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni.model.encoder.whisper import WhisperEncoder, load_whisper
    from omni.model.lm.gpt import GPT
    from omni.model.lm.nanochat import load_nanochat
    from omni.model.projector import Projector

__all__ = ["GPT", "Projector", "WhisperEncoder", "load_nanochat", "load_whisper"]

_MODULES = {
    "GPT": "omni.model.lm.gpt",
    "Projector": "omni.model.projector",
    "WhisperEncoder": "omni.model.encoder.whisper",
    "load_nanochat": "omni.model.lm.nanochat",
    "load_whisper": "omni.model.encoder.whisper",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
