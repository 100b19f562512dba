"""Run a sharded model forward on ranks that have different amounts to do.

Each layer of a sharded model is gathered from all ranks, and freed behind it, so that the ranks
have to call the same layers in the same order. A rank announces each pass through the layers before
it begins; one that has finished gives its shards to the passes of the others until there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from omni.model.shards import is_sharded
from omni.model.speech_lm import OmniModel
from omni.train.distributed import all_sum


@contextmanager
def whole_root(model: OmniModel) -> Iterator[None]:
    """Hold what is outside of the layers whole inside the context, as a training step does.

    These are embeddings, head and projector. A collective call; nothing for a model that is whole.
    """
    if not _layers(model):
        yield
        return
    root: Any = model
    # Whichever FSDP module runs first would otherwise be taken for the root.
    root._get_fsdp_state()._lazy_init()
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


@contextmanager
def in_step(model: OmniModel) -> Iterator[None]:
    """Make passes through the layers inside the context, as many as this rank needs.

    On leaving it, ranks wait for each other. A collective call; nothing for a model that is whole.
    """
    layers = _layers(model)
    if not layers:
        yield
        return
    for layer in layers:
        # Buffers that are first allocated in inference mode could not be trained with later.
        layer.unshard()
        layer.reshard()

    def begin(*_: Any) -> None:
        _announce(1)

    hook = layers[0].register_forward_pre_hook(begin, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while _announce(0):
        for layer in layers:
            layer.unshard()
            layer.reshard()


def _layers(model: OmniModel) -> list[Any]:
    """List the modules that FSDP gathers one at a time; none for a model that is whole."""
    layers = model.lm.shards()
    return layers if any(is_sharded(p) for p in layers[0].parameters()) else []


def _announce(passes: int) -> int:
    """Return the number of ranks that begin a pass."""
    with torch.inference_mode(False):
        return int(all_sum(torch.tensor([float(passes)]))[0])
