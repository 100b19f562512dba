"""The frozen Whisper encoder: recordings in, soft-token features out.

`WhisperEncoder.encode` is what the stream calls: clips of any length, one (T, d_model) tensor each.
Two modes decide how much audio the encoder looks at:

- `full`: every window is padded to 30 s and yields 1500 frames, as OpenAI's Whisper does;
- `trim`: the real length plus a margin of silence is encoded and the real frames are kept.

Audio over 30 s is cut into consecutive windows whose features are concatenated. A batch of windows
is packed, not padded: their frames lie one after another, N of them, and only attention looks at
one window at a time. On CPU a clip's features are the same to the last bit whoever shares it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.audio.logmel import (
    FRAME,
    HOP,
    SAMPLING_RATE,
    WINDOW_SAMPLES,
    Mode,
    Window,
    clip_mel,
    plan_windows,
)
from omni.model.download import read_whisper_files, whisper_folder
from omni.model.precision import compute_dtype

CPU_FRAMES = 1_500  # per batch: enough rows for the matrix products, small enough for the caches
GPU_FRAMES = 48_000
_TILE_QUERIES, _TILE_SCORES = 256, 400_000  # bf16 scores of a tile: 0.8 MB


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer; parameter names as in transformers' Whisper."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width),
                "k_proj": nn.Linear(width, width, bias=False),
                "v_proj": nn.Linear(width, width),
                "out_proj": nn.Linear(width, width),
            }
        )
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x_NC: Tensor, packing: _Packing) -> Tensor:
        normed = self.self_attn_layer_norm(x_NC)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (self.heads, -1))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = packing.attend(q, k, v).flatten(1)
        x_NC = x_NC + self.self_attn["out_proj"](attended)
        hidden = F.gelu(self.fc1(self.final_layer_norm(x_NC)))
        return x_NC + self.fc2(hidden)


class _Packing:
    """Where each window's frames lie among N, and attention inside windows.

    `each` takes window after window, which a CPU does best; `padded` takes all of them as one
    (windows, longest) batch, with a key mask only where lengths differ, for accelerators.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, padded: bool) -> None:
        self.lengths = list(lengths)
        self._padded = padded
        if padded:
            longest = max(lengths)
            counts = torch.tensor(self.lengths)
            valid_BL = torch.arange(longest) < counts[:, None]
            self._shape = (len(lengths), longest)
            self._places_N = valid_BL.flatten().nonzero().squeeze(1).to(device)
            ragged = min(lengths) < longest
            self._mask = valid_BL[:, None, None, :].to(device) if ragged else None

    def attend(self, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        if not self._padded:
            parts = [t.split(self.lengths) for t in (q_NHD, k_NHD, v_NHD)]
            return torch.cat([_attend_one(*window) for window in zip(*parts, strict=True)])
        q, k, v = (self._unpack(t).transpose(1, 2) for t in (q_NHD, k_NHD, v_NHD))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._places_N)

    def _unpack(self, x_NHD: Tensor) -> Tensor:
        batch, longest = self._shape
        rows = x_NHD.new_zeros(batch * longest, *x_NHD.shape[1:])
        return rows.index_copy_(0, self._places_N, x_NHD).view(batch, longest, *x_NHD.shape[1:])


def _attend_one(q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> Tensor:
    """Attention of one window, (L, H, D).

    In bf16 on CPU, torch 2.13's fused kernel takes 60 % longer than two matrix products over tiles
    whose scores stay in the second-level cache. In fp32 it is as fast, and what transformers calls.
    """
    q, k, v = (t.transpose(0, 1) for t in (q_LHD, k_LHD, v_LHD))
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
    heads, length, width = q.shape
    # The scale is a power of two for Whisper's heads of 64, hence exact.
    keys, values = (k / math.sqrt(width)).transpose(1, 2).contiguous(), v.contiguous()
    queries, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = min(length, _TILE_QUERIES)
    step = max(1, _TILE_SCORES // (rows * length))  # heads per tile
    for h in range(0, heads, step):
        for i in range(0, length, rows):
            scores = torch.bmm(queries[h : h + step, i : i + rows], keys[h : h + step])
            out[h : h + step, i : i + rows] = torch.bmm(scores.softmax(-1), values[h : h + step])
    return out.transpose(0, 1)


class WhisperEncoder(nn.Module):
    """Whisper's audio encoder with frozen parameters, in eval mode from `__init__` on.

    source: None (the hubs, see `omni.model.download`), "embedded", or a folder in transformers
        layout.
    layers: whose outputs are features. "last" is the usual one, after the final LayerNorm. A list
        (0 is the first layer's input, n the n-th layer's output, as transformers numbers
        hidden states) or "all" puts them side by side, each normalised (LayerNorm without
        weights), since their sizes differ by orders of magnitude: `feature_dim` is
        len(layers) * d_model.
    dtype: fp32 or bf16, of features, and of weights and activations where the device computes in it
        (see `compute_dtype`).
    frame_budget: encoder frames per batch in `encode`; a longer window is a batch of its own. None:
        1,500 (30 s) on CPU, 48,000 on an accelerator.
    padded: how windows of a batch attend, see `_Packing`. None: by device.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        mode: Mode = "full",
        margin_seconds: float = 0.5,
        layers: Literal["last", "all"] | Sequence[int] = "last",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        frame_budget: int | None = None,
        padded: bool | None = None,
    ) -> None:
        super().__init__()
        folder = whisper_folder(source)
        config, state = read_whisper_files(folder)
        self.config: dict[str, Any] = config
        self.d_model: int = config["d_model"]
        self.n_mels: int = config["num_mel_bins"]
        self.sampling_rate = SAMPLING_RATE
        self.mode: Mode = mode
        self.margin_seconds = margin_seconds
        heads, ffn = config["encoder_attention_heads"], config["encoder_ffn_dim"]
        with torch.device("meta"):
            self.conv1 = nn.Conv1d(self.n_mels, self.d_model, 3, padding=1)
            self.conv2 = nn.Conv1d(self.d_model, self.d_model, 3, stride=2, padding=1)
            # Given its (meta) weight, it skips an initialisation that would import the compiler.
            positions = (config["max_source_positions"], self.d_model)
            self.embed_positions = nn.Embedding(*positions, _weight=torch.empty(positions))
            self.layers = nn.ModuleList(
                EncoderLayer(self.d_model, heads, ffn) for _ in range(config["encoder_layers"])
            )
            self.layer_norm = nn.LayerNorm(self.d_model)
        self.layer_ids = _layer_ids(layers, config["encoder_layers"])
        self.feature_dim = max(1, len(self.layer_ids)) * self.d_model
        self.load_state_dict(state, assign=True)
        self.fingerprint = _fingerprint(state)
        self.dtype = dtype
        self.to(device=device, dtype=compute_dtype(dtype, torch.device(device)))
        self.requires_grad_(False)
        super().train(False)
        on_cpu = self.device.type == "cpu"
        self.padded = not on_cpu if padded is None else padded
        default = CPU_FRAMES if on_cpu else GPU_FRAMES
        self.frame_budget = default if frame_budget is None else frame_budget

    def train(self, mode: bool = True) -> WhisperEncoder:
        """The encoder is frozen: it stays in eval mode whatever a parent module switches to."""
        return self

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    def preprocess(self, audio_arrays: Sequence[np.ndarray]) -> Tensor:
        """Log-mel of clips of at most 30 s: (B, n_mels, T_mel) fp32, padded to the longest.

        T_mel is 3000 in `full`. In `trim`, shorter clips of the batch are padded with zeros; pass
        their lengths to `forward` (or call `encode`, which does without padding).
        """
        for number, audio in enumerate(audio_arrays):
            if len(audio) > WINDOW_SAMPLES:
                raise ValueError(
                    f"clip {number} is {len(audio) / SAMPLING_RATE:.1f} s long; preprocess takes "
                    "at most 30 s (encode cuts longer audio into windows)"
                )
        return _pad([self.front_end(audio) for audio in audio_arrays])

    def front_end(self, audio: np.ndarray) -> Tensor:
        """`clip_mel` with this encoder's settings."""
        return clip_mel(audio, self.n_mels, self.mode, self.margin_seconds)

    def forward(self, input_features: Tensor, mel_lengths: Sequence[int] | None = None) -> Tensor:
        """Encode log-mels (B, n_mels, T_mel) to features (B, T_enc, d_model), T_enc = T_mel // 2.

        mel_lengths: valid mel frames of each row (even numbers); None means all of them. Frames
        beyond a row's length are not looked at, and their outputs are zero.
        """
        total = input_features.shape[-1]
        lengths = [total] * len(input_features) if mel_lengths is None else list(mel_lengths)
        mels = [mel[:, :length] for mel, length in zip(input_features, lengths, strict=True)]
        rows = self._encode_packed(mels)
        out = torch.zeros(
            len(mels), total // 2, self.feature_dim, dtype=self.dtype, device=self.device
        )
        for number, row in enumerate(rows):
            out[number, : len(row)] = row
        return out

    def encode(self, audio_arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Features of clips of any length: one (T, d_model) tensor each, T = `encoder_frames`.

        audio_arrays: (S,) fp32 mono at 16 kHz.
        """
        mels = [self.front_end(audio) for audio in audio_arrays]
        return self.encode_mels(mels, [len(audio) for audio in audio_arrays])

    def encode_mels(self, mels: Sequence[Tensor], samples: Sequence[int]) -> list[Tensor]:
        """`encode` after the front end: mels from `clip_mel`, samples of each clip.

        Windows are sorted by length and batched under `frame_budget`; results come back in the
        order of the input.
        """
        jobs: list[tuple[int, Window, Tensor]] = []
        for number, (mel, count) in enumerate(zip(mels, samples, strict=True)):
            windows = plan_windows(count, self.mode, self.margin_seconds)
            parts = mel.split([window.padded // HOP for window in windows], dim=1)
            jobs += [(number, window, part) for window, part in zip(windows, parts, strict=True)]
        done: list[list[tuple[int, Tensor]]] = [[] for _ in mels]
        for batch in self._batches(jobs):
            encoded = self._encode_packed([mel for _, _, mel in batch])
            for (number, window, _), features in zip(batch, encoded, strict=True):
                done[number].append((window.start, features[: window.frames]))
        return [torch.cat([f for _, f in sorted(p, key=lambda item: item[0])]) for p in done]

    def _batches(self, jobs: list[Any]) -> list[list[Any]]:
        """Sort windows by length and cut the list where a batch would exceed the budget."""
        batches: list[list[Any]] = []
        filled = 0
        for job in sorted(jobs, key=lambda item: item[1].padded):
            frames = job[1].padded // FRAME
            # A padded batch costs its longest row, which is this one, times its rows.
            filled = frames * (len(batches[-1]) + 1) if self.padded and batches else filled + frames
            if batches and filled <= self.frame_budget:
                batches[-1].append(job)
            else:
                batches.append([job])
                filled = frames
        return batches

    @torch.inference_mode()
    def _encode_packed(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Features (T // 2, d_model) of log-mels (n_mels, T), each with T even and at most 3000."""
        lengths = [mel.shape[1] // 2 for mel in mels]
        packing = _Packing(lengths, self.device, self.padded)
        x = self._stem_padded(mels) if self.padded else self._stem_each(mels)
        hidden = [x]
        for layer in self.layers:
            x = layer(x, packing)
            if self.layer_ids:
                hidden.append(x)
        x = self.layer_norm(x)
        if self.layer_ids:
            hidden[-1] = x
            x = torch.cat([F.layer_norm(hidden[n], (self.d_model,)) for n in self.layer_ids], -1)
        return list(x.to(self.dtype).split(lengths))

    def _stem_each(self, mels: Sequence[Tensor]) -> Tensor:
        """Convolutions and positions, window after window: (N, d_model)."""
        parts = []
        for mel in mels:
            x = F.gelu(self.conv1(mel[None].to(self.conv1.weight)))
            x = F.gelu(self.conv2(x))[0].transpose(0, 1)
            parts.append(x + self.embed_positions.weight[: len(x)])
        return torch.cat(parts)

    def _stem_padded(self, mels: Sequence[Tensor]) -> Tensor:
        """The same in one batch. Lengths are even, so no kept frame sees beyond its own mel."""
        batch = _pad(mels)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        x = F.gelu(self.conv1(batch.to(self.conv1.weight, non_blocking=True)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        return torch.cat([row[: mel.shape[1] // 2] for row, mel in zip(x, mels, strict=True)])


def load_whisper(source: str | None = None, **kwargs: Any) -> WhisperEncoder:
    """A frozen `WhisperEncoder` from `source`; keyword arguments are `WhisperEncoder`'s.

    source None asks ModelScope for `WHISPER_MS_ID` when that is set, then Hugging Face for
    `WHISPER_HF_ID` (default openai/whisper-base) at `HF_ENDPOINT`. Raises `SourceError` that
    lists each source with its reason when none serves.
    """
    return WhisperEncoder(source, **kwargs)


def _layer_ids(layers: Literal["last", "all"] | Sequence[int], count: int) -> list[int]:
    """The chosen layers in order; none for "last". Raises ValueError."""
    if layers == "last":
        return []
    if layers == "all":
        return list(range(count + 1))
    if not layers or any(not isinstance(n, int) or not 0 <= n <= count for n in layers):
        raise ValueError(f"layers {layers}: expected last, all, or numbers from 0 to {count}")
    return sorted(layers)


def _pad(mels: Sequence[Tensor]) -> Tensor:
    """(n_mels, T) tensors as one zero-padded batch (B, n_mels, max T)."""
    batch = torch.zeros(len(mels), mels[0].shape[0], max(mel.shape[1] for mel in mels))
    for row, mel in enumerate(mels):
        batch[row, :, : mel.shape[1]] = mel
    return batch


def _fingerprint(state: dict[str, Tensor]) -> str:
    """Hash of the weights as stored: which encoder made a feature."""
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
