"""The frozen Whisper encoder: audio in, features for the projector out.

`preprocess` and `forward` are the interface of nanochat-omni's `audio.py`. The stream calls
`encode`, which takes clips of any length and returns one (T, d_model) tensor each. Two modes
decide how much audio the encoder sees:

- `full`: every window is padded to 30 s and yields 1500 frames, as OpenAI's Whisper does;
- `trim`: the real length plus a margin of silence is encoded and the real frames are kept.

Audio over 30 s is cut into consecutive windows whose features are concatenated. On CPU a clip's
features do not depend on the other clips of a batch, to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from omni.audio.logmel import clip_mel
from omni.audio.windows import FRAME, HOP, SAMPLING_RATE, WINDOW_SAMPLES, Mode, Window, plan_windows
from omni.model.encoder.transformer import WhisperTransformer, pad_features, pad_mels
from omni.model.encoder.weights import (
    DEFAULT_HF_ID,
    read_whisper_files,
    weights_fingerprint,
    whisper_folder,
)
from omni.model.precision import compute_dtype

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

# Encoder frames per batch: on CPU enough rows for the matrix products, few enough for the caches.
CPU_FRAMES = 1_500
GPU_FRAMES = 48_000


def load_whisper(
    hf_id: str = DEFAULT_HF_ID, ms_id: str | None = None
) -> tuple[WhisperFeatureExtractor, WhisperTransformer]:
    """Load transformers' feature extractor and the frozen encoder, in fp32 on CPU.

    hf_id, ms_id and errors: see `whisper_folder`.
    """
    folder = whisper_folder(hf_id, ms_id)
    encoder = WhisperTransformer(*read_whisper_files(folder)).float()
    return _feature_extractor(folder, encoder.config.num_mel_bins), encoder


class WhisperEncoder(nn.Module):
    """Whisper's audio encoder with frozen parameters, always in eval mode.

    hf_id, ms_id: where the weights come from, see `whisper_folder`.
    device: CPU by default.
    dtype: fp32 (default) or bf16, of features, and of weights and activations where the device
        computes in it (see `compute_dtype`).
    mode, margin_seconds: see `omni.audio.logmel.plan_windows`.
    layers: the layers whose outputs are features. "last" is the usual one, after the final
        LayerNorm. A list (0 is the input of the first layer, n the output of the n-th, as
        transformers numbers hidden states) or "all" concatenates them, each normalised (LayerNorm
        without weights), since their scales differ by orders of magnitude: `feature_dim` is
        len(layers) * d_model.
    frame_budget: encoder frames per batch in `encode`; a longer window is a batch of its own. None:
        1,500 (30 s) on CPU, 48,000 on an accelerator.
    padded: attend over a padded batch of windows instead of one window at a time. None: on
        accelerators.
    """

    def __init__(
        self,
        hf_id: str = DEFAULT_HF_ID,
        ms_id: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: Mode = "full",
        margin_seconds: float = 0.5,
        layers: Literal["last", "all"] | Sequence[int] = "last",
        frame_budget: int | None = None,
        padded: bool | None = None,
    ) -> None:
        super().__init__()
        self.folder: Path = whisper_folder(hf_id, ms_id)
        config, state = read_whisper_files(self.folder)
        self.config = config
        self.d_model = config.d_model
        self.n_mels = config.num_mel_bins
        self.sampling_rate = SAMPLING_RATE
        self.mode: Mode = mode
        self.margin_seconds = margin_seconds
        self.layer_ids = _layer_ids(layers, config.encoder_layers)
        self.feature_dim = max(1, len(self.layer_ids)) * self.d_model
        self.fingerprint = weights_fingerprint(state)
        self.encoder = WhisperTransformer(config, state)
        self.dtype = dtype or torch.float32
        device = torch.device(device or "cpu")
        self.to(device=device, dtype=compute_dtype(self.dtype, device))
        super().train(False)
        on_cpu = self.device.type == "cpu"
        self.padded = not on_cpu if padded is None else padded
        default = CPU_FRAMES if on_cpu else GPU_FRAMES
        self.frame_budget = default if frame_budget is None else frame_budget

    def train(self, mode: bool = True) -> WhisperEncoder:
        """Do nothing: the frozen encoder stays in eval mode when a parent module is switched."""
        return self

    @property
    def device(self) -> torch.device:
        return self.encoder.conv1.weight.device

    @functools.cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        """transformers' feature extractor of this model; `preprocess` equals it in mode `full`."""
        return _feature_extractor(self.folder, self.n_mels)

    def preprocess(self, audio_arrays: Sequence[np.ndarray]) -> Tensor:
        """Compute the log-mels of clips of at most 30 s: (B, n_mels, T_mel) fp32.

        audio_arrays: (S,) mono at 16 kHz each. T_mel is 3000 in `full`. In `trim`, shorter clips of
        the batch are padded with zeros: pass their lengths to `forward`, or call `encode`, which
        does not pad. Raises ValueError for a longer clip.
        """
        for number, audio in enumerate(audio_arrays):
            if len(audio) > WINDOW_SAMPLES:
                raise ValueError(
                    f"clip {number} is {len(audio) / SAMPLING_RATE:.1f} s long; preprocess takes "
                    "at most 30 s (encode cuts longer audio into windows)"
                )
        return pad_mels([self.front_end(audio) for audio in audio_arrays])

    def front_end(self, audio: np.ndarray) -> Tensor:
        """Compute `clip_mel` with this encoder's settings."""
        return clip_mel(audio, self.n_mels, self.mode, self.margin_seconds)

    def forward(self, input_features: Tensor, mel_lengths: Sequence[int] | None = None) -> Tensor:
        """Encode log-mels (B, n_mels, T_mel) to features (B, T_enc, d_model), T_enc = T_mel // 2.

        mel_lengths: valid mel frames of each row (even numbers); None: all of them. Frames beyond a
        row's length are ignored, and their features are zero.
        """
        total = input_features.shape[-1]
        lengths = [total] * len(input_features) if mel_lengths is None else list(mel_lengths)
        mels = [mel[:, :length] for mel, length in zip(input_features, lengths, strict=True)]
        return pad_features(self._encode_packed(mels), total // 2)

    def encode(self, audio_arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Encode clips of any length to one (T, d_model) tensor each, T = `encoder_frames`.

        audio_arrays: (S,) fp32 mono at 16 kHz.
        """
        mels = [self.front_end(audio) for audio in audio_arrays]
        return self.encode_mels(mels, [len(audio) for audio in audio_arrays])

    def encode_mels(self, mels: Sequence[Tensor], samples: Sequence[int]) -> list[Tensor]:
        """Encode clips whose log-mels `clip_mel` has computed; samples: length of each clip.

        Windows are sorted by length and batched under `frame_budget`; features are returned in the
        order of the clips.
        """
        jobs: list[tuple[int, Window, Tensor]] = []
        for number, (mel, count) in enumerate(zip(mels, samples, strict=True)):
            windows = plan_windows(count, self.mode, self.margin_seconds)
            parts = torch.split(mel, [window.padded // HOP for window in windows], dim=1)
            jobs += [(number, window, part) for window, part in zip(windows, parts, strict=True)]
        done: list[list[tuple[int, Tensor]]] = [[] for _ in mels]
        for batch in self._batches(jobs):
            encoded = self._encode_packed([mel for _, _, mel in batch])
            for (number, window, _), features in zip(batch, encoded, strict=True):
                done[number].append((window.start, features[: window.frames]))
        return [torch.cat([f for _, f in sorted(p, key=lambda item: item[0])]) for p in done]

    def halve_batches(self, samples: Sequence[int]) -> bool:
        """Halve `frame_budget` until clips of these lengths make smaller batches.

        Returns False, and changes nothing, where each of their windows is a batch already.
        """

        def largest(budget: int) -> int:
            jobs = [
                (number, window)
                for number, count in enumerate(samples)
                for window in plan_windows(count, self.mode, self.margin_seconds)
            ]
            return max(map(len, self._batches(jobs, budget)), default=0)

        budget = self.frame_budget
        before = largest(budget)
        while before > 1 and largest(budget) >= before:
            budget //= 2
        self.frame_budget = budget
        return before > 1

    def _batches(self, jobs: list[Any], budget: int | None = None) -> list[list[Any]]:
        """Sort windows by length and cut the list where a batch would exceed the budget."""
        budget = self.frame_budget if budget is None else budget
        batches: list[list[Any]] = []
        filled = 0
        for job in sorted(jobs, key=lambda item: item[1].padded):
            frames = job[1].padded // FRAME
            # Each row of a padded batch costs as much as its longest, which is the current window.
            filled = frames * (len(batches[-1]) + 1) if self.padded and batches else filled + frames
            if batches and filled <= budget:
                batches[-1].append(job)
            else:
                batches.append([job])
                filled = frames
        return batches

    def _encode_packed(self, mels: Sequence[Tensor]) -> list[Tensor]:
        encoded = self.encoder.encode(mels, self.padded, self.layer_ids)
        return [features.to(self.dtype) for features in encoded]


def _feature_extractor(folder: Path, n_mels: int) -> WhisperFeatureExtractor:
    """Load preprocessor_config.json, or Whisper's standard settings where the folder has none."""
    from transformers import WhisperFeatureExtractor

    if (folder / "preprocessor_config.json").is_file():
        found: WhisperFeatureExtractor = WhisperFeatureExtractor.from_pretrained(
            folder, trust_remote_code=False
        )
        return found
    return WhisperFeatureExtractor(feature_size=n_mels)


def _layer_ids(layers: Literal["last", "all"] | Sequence[int], count: int) -> list[int]:
    """Resolve `layers` to sorted numbers; an empty list for "last". Raises ValueError."""
    if layers == "last":
        return []
    if layers == "all":
        return list(range(count + 1))
    if not layers or any(not isinstance(n, int) or not 0 <= n <= count for n in layers):
        raise ValueError(f"layers {layers}: expected last, all, or numbers from 0 to {count}")
    return sorted(layers)
