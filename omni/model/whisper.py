"""The frozen Whisper encoder: recordings in, soft-token features out.

`WhisperEncoder.encode` is what the stream calls: clips of any length, one (T, d_model) tensor each.
Two modes decide how much audio the encoder looks at:

- `full`: every window is padded to 30 s and yields 1500 frames, as OpenAI's Whisper does;
- `trim`: the real length plus a margin of silence is encoded and the real frames are kept.

Audio over 30 s is cut into consecutive windows whose features are concatenated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.model.hub import read_whisper_files, whisper_folder
from omni.model.logmel import FRAME, HOP, SAMPLING_RATE, WINDOW_SAMPLES, log_mel

Mode = Literal["full", "trim"]
FULL_FRAMES = WINDOW_SAMPLES // FRAME  # 1500
MIN_SAMPLES = SAMPLING_RATE // 2  # shorter input leaves the encoder without context


@dataclass(frozen=True)
class Window:
    """A span of one clip that is encoded at once; all numbers are samples at 16 kHz."""

    start: int
    stop: int
    padded: int  # length given to the encoder, a multiple of FRAME
    frames: int  # encoder frames that are kept


def plan_windows(samples: int, mode: Mode, margin_seconds: float = 0.5) -> list[Window]:
    """Cut a clip of `samples` into encoder windows of at most 30 s.

    A tail under 0.5 s would be encoded without context, so the window before it ends 0.5 s
    earlier and the tail takes those samples over: nothing is encoded twice or dropped.
    """
    starts = list(range(0, max(samples, 1), WINDOW_SAMPLES))
    if len(starts) > 1 and samples - starts[-1] < MIN_SAMPLES:
        starts[-1] -= MIN_SAMPLES
    windows = []
    for start, stop in zip(starts, starts[1:] + [samples], strict=True):
        real = stop - start
        if mode == "full":
            windows.append(Window(start, stop, WINDOW_SAMPLES, FULL_FRAMES))
            continue
        wanted = max(real + round(margin_seconds * SAMPLING_RATE), MIN_SAMPLES)
        padded = min(-(-wanted // FRAME) * FRAME, WINDOW_SAMPLES)
        windows.append(Window(start, stop, padded, -(-real // FRAME)))
    return windows


def encoder_frames(samples: int, mode: Mode) -> int:
    """Number of feature frames (20 ms each in `trim`) that a clip of `samples` yields."""
    return sum(window.frames for window in plan_windows(samples, mode))


def clip_mel(audio: np.ndarray, n_mels: int, mode: Mode, margin_seconds: float) -> Tensor:
    """Log-mels of a clip's windows side by side, (n_mels, T_mel) fp32; needs no weights."""
    windows = plan_windows(len(audio), mode, margin_seconds)
    parts = [log_mel(audio[w.start : w.stop], n_mels, w.padded) for w in windows]
    return torch.cat(parts, dim=1)


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

    def forward(self, x_BTC: Tensor, key_mask: Tensor | None) -> Tensor:
        batch, length, width = x_BTC.shape
        normed = self.self_attn_layer_norm(x_BTC)
        q, k, v = (
            self.self_attn[name](normed)
            .view(batch, length, self.heads, width // self.heads)
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        attended = attended.transpose(1, 2).reshape(batch, length, width)
        x_BTC = x_BTC + self.self_attn["out_proj"](attended)
        hidden = F.gelu(self.fc1(self.final_layer_norm(x_BTC)))
        return x_BTC + self.fc2(hidden)


class WhisperEncoder(nn.Module):
    """Whisper's audio encoder with frozen parameters, in eval mode from `__init__` on.

    source: None (the hubs, see `omni.model.hub`), "embedded", or a folder in transformers layout.
    dtype: fp32 or bf16, for weights, activations and features.
    frame_budget: encoder frames (padding included) per batch in `encode`. None is one clip at a
        time on CPU, where it is as fast as any batch and makes features independent of their
        neighbours to the last bit, and 48,000 (16 minutes of audio) on an accelerator.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        mode: Mode = "full",
        margin_seconds: float = 0.5,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        frame_budget: int | None = None,
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
        self.load_state_dict(state, assign=True)
        self.fingerprint = _fingerprint(state)
        self.to(device=device, dtype=dtype)
        self.requires_grad_(False)
        super().train(False)
        if frame_budget is None:
            frame_budget = 0 if self.device.type == "cpu" else 48_000
        self.frame_budget = frame_budget

    def train(self, mode: bool = True) -> WhisperEncoder:
        """The encoder is frozen: it stays in eval mode whatever a parent module switches to."""
        return self

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def preprocess(self, audio_arrays: Sequence[np.ndarray]) -> Tensor:
        """Log-mel of clips of at most 30 s: (B, n_mels, T_mel) fp32, padded to the longest.

        T_mel is 3000 in `full`. In `trim`, shorter clips of the batch are padded with zeros; pass
        their lengths to `forward` (or call `encode`, which does).
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

    @torch.inference_mode()
    def forward(self, input_features: Tensor, mel_lengths: Sequence[int] | None = None) -> Tensor:
        """Encode log-mels (B, n_mels, T_mel) to features (B, T_enc, d_model), T_enc = T_mel // 2.

        mel_lengths: valid mel frames of each row (even numbers); None means all of them. Frames
        beyond a row's length are masked as attention keys, and their outputs are meaningless.
        """
        x = input_features.to(self.device, self.dtype)
        total = x.shape[-1]
        ragged = mel_lengths is not None and any(n != total for n in mel_lengths)
        key_mask = None
        x = F.gelu(self.conv1(x))
        if ragged:
            lengths = torch.as_tensor(mel_lengths, device=self.device)
            valid = torch.arange(total, device=self.device) < lengths[:, None]
            key_mask = valid[:, None, None, ::2]
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, key_mask)
        return self.layer_norm(x)

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
            padded = _pad([mel for _, _, mel in batch])
            features = self.forward(padded, [mel.shape[1] for _, _, mel in batch])
            for row, (number, window, _) in enumerate(batch):
                done[number].append((window.start, features[row, : window.frames]))
        return [torch.cat([f for _, f in sorted(p, key=lambda item: item[0])]) for p in done]

    def _batches(self, jobs: list[Any]) -> list[list[Any]]:
        """Sort windows by length and cut the list where a padded batch would exceed the budget."""
        batches: list[list[Any]] = []
        for job in sorted(jobs, key=lambda item: item[1].padded):
            frames = job[1].padded // FRAME
            if batches and frames * (len(batches[-1]) + 1) <= self.frame_budget:
                batches[-1].append(job)
            else:
                batches.append([job])
        return batches


def load_whisper(source: str | None = None, **kwargs: Any) -> WhisperEncoder:
    """A frozen `WhisperEncoder` from `source`; keyword arguments are `WhisperEncoder`'s.

    source None asks ModelScope for `WHISPER_MS_ID` when that is set, then Hugging Face for
    `WHISPER_HF_ID` (default openai/whisper-base) at `HF_ENDPOINT`. Raises `SourceError` that
    lists each source with its reason when none serves.
    """
    return WhisperEncoder(source, **kwargs)


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
