"""Configuration of a small run whose corpus has several windows."""

from __future__ import annotations

from pathlib import Path

from omni.config import Config, parse_config

STEPS, BINS = 16, 1
"""Steps of the run, and bins of each."""


def windowed_config(storage: Path) -> Config:
    return parse_config(
        {
            "run": {"storage": str(storage), "name": "run"},
            "data": {"train": ["embedded:dev"], "dev": ["embedded:test"], "window_utterances": 16},
            "tokenizer": {"vocab_size": 300},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "dropout": 0.1},
            "optim": {"bin_positions": 256, "bins_per_step": BINS, "steps": STEPS, "lr": 1e-2},
            "train": {"precision": "fp32", "log_every": 1, "checkpoint_every": 1},
            "eval": {"every": 6, "max_utterances": 3, "wer_utterances": 2, "max_new_tokens": 8},
        }
    )
