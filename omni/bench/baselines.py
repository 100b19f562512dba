"""Run what a careful user of transformers and PyTorch would: baselines that omni is compared with.

Audio is encoded at its length in batches of similar lengths, and batches of utterances are sorted
by length under a budget of padded positions. The habit of padding to 30 s is beside them, since
half of the field still has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.model.batch import Batch
from omni.model.encoder.weights import read_whisper_files, whisper_folder
from omni.model.packed_attention import SegmentLayout

WINDOW_FRAMES = 3000
"""Log-mel frames of a window of 30 s."""


def reference_encoder(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load transformers' Whisper encoder with the weights of `encoder.weights`."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = whisper_folder(source)
    _, state = read_whisper_files(folder)
    model = WhisperEncoder(WhisperConfig.from_pretrained(folder, trust_remote_code=False)).eval()
    model.load_state_dict(state)
    return model.to(device, dtype)


def encode_trimmed(model: Any, mels: Sequence[Tensor]) -> list[Tensor]:
    """Encode one batch of log-mels, padded to its longest, with transformers' layers.

    transformers' own forward takes windows of 30 s only. This one cuts the position embeddings and
    masks the padding, as ultravox does (ultravox/model/ultravox_model.py, ModifiedWhisperEncoder).
    Log-mels: (n_mels, T_mel) each. Returns (ceil(T_mel / 2), d_model) each.
    """
    weight = model.conv1.weight
    longest = max(mel.shape[1] for mel in mels)
    padded = [F.pad(mel, (0, longest - mel.shape[1])) for mel in mels]
    batch = torch.stack(padded).to(weight.device, weight.dtype)
    hidden = F.gelu(model.conv2(F.gelu(model.conv1(batch)))).transpose(1, 2)
    hidden = hidden + model.embed_positions.weight[: hidden.shape[1]]
    frames = [(mel.shape[1] + 1) // 2 for mel in mels]
    mask = None
    if min(frames) < hidden.shape[1]:
        steps = torch.arange(hidden.shape[1], device=weight.device)
        valid = steps < torch.tensor(frames, device=weight.device)[:, None]
        mask = torch.zeros(valid.shape, dtype=weight.dtype, device=weight.device)
        mask = mask.masked_fill_(~valid, torch.finfo(weight.dtype).min)[:, None, None]
    for layer in model.layers:
        hidden = layer(hidden, mask)
    hidden = model.layer_norm(hidden)
    return [row[:count] for row, count in zip(hidden, frames, strict=True)]


@dataclass(frozen=True)
class PaddedBatch(Batch):
    """Hold one utterance per row, padded on the right.

    On a GPU, rows attend by torch's fused causal kernel, whose shapes may vary; packed rows need a
    kernel that is compiled for each shape.
    """

    def layout(self) -> SegmentLayout:
        device = self.segments_BT.device
        if device.type == "cuda":
            return SegmentLayout.plain(self.segments_BT.shape, device)
        return super().layout()

    @classmethod
    def of(cls, batch: Batch) -> PaddedBatch:
        """Mark a batch whose rows hold one utterance each."""
        return cls(**vars(batch))


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Sort items by length, and cut them into batches of at most `budget` padded positions.

    Returns the items' numbers. An item longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(number)
    return batches


def budget_for(lengths: Sequence[int], batches: int) -> int:
    """Find the smallest budget with which `length_batches` makes at most so many batches."""
    low, high = max(lengths), max(lengths) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(length_batches(lengths, middle)) <= batches:
            high = middle
        else:
            low = middle + 1
    return low
