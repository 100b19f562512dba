"""Checkpoints of models that have learnt nothing, on disk as a run writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni.checkpoint.save import save_checkpoint
from omni.checkpoint.train_state import TrainState
from omni.config import Config
from omni.corpus.index import build_index
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.stream.encoder_facts import describe_encoder


def write_checkpoint(
    folder: Path,
    config: Config,
    shape: OmniConfig,
    model: OmniModel,
    tokenizer: SpeechTokenizer,
    **facts: Any,
) -> Path:
    """Write a checkpoint of step 7 for the encoder that comes with omni.

    facts: what it says of the encoder, where that is to differ.
    """
    index = build_index(["embedded:dev"])
    weights = {n: p for n, p in model.named_parameters() if not model.kept_by_reference(n)}
    return save_checkpoint(
        folder,
        state=TrainState(step=7),
        model=shape,
        encoder={**describe_encoder(config, index).to_dict(), **facts},
        weights=weights,
        optimizer={},
        config_yaml=config.to_yaml(),
        tokenizer_json=tokenizer.to_json(),
    )
