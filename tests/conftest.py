"""One thread per test process: results repeat to the last bit and small machines stay usable."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

pytest_plugins = ["tests.helpers.recordings", "tests.helpers.encoder", "tests.helpers.tiny_run"]
