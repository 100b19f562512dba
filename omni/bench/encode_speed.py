"""Measure encoding speed against transformers' best and against the peak speed of the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.audio.decode import AudioSpan, decode
from omni.audio.logmel import clip_mel
from omni.audio.windows import SAMPLING_RATE, WINDOW_SAMPLES
from omni.bench.baselines import (
    WINDOW_FRAMES,
    encode_trimmed,
    length_batches,
    reference_encoder,
)
from omni.bench.timing import Ceiling, Result, alternate, describe_machine, median, ratio_of
from omni.config import Config
from omni.corpus.index_row import span_of
from omni.corpus.mixture import build_mixture
from omni.model.encoder.weights import WhisperConfig
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.precision import compute_dtype
from omni.stream.codec import DTYPES

_CLIPS = {"cpu": 24, "cuda": 512}
_PADDED_BATCH = {"cpu": 3, "cuda": 32}
_PADDED_WINDOWS = {"cpu": 6, "cuda": 128}
"""Windows of 30 s that are timed; they cost the same, so the time is scaled to all of them."""
_BUDGETS = {
    "cpu": (600, 1500, 3000, 6000, 12_000),
    "cuda": (12_000, 24_000, 48_000, 96_000, 192_000),
}
"""Padded log-mel frames of a batch that are tried for transformers; the fastest is kept."""
# The short jobs are repeated, so that they last as long as the others.
_TRIM_REPEATS, _CEILING_REPEATS = 8, 20


def bench_encode(config: Config) -> Result:
    """Run the `encode` suite on clips with the length distribution of data.train."""
    settings = config.encoder
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if settings.gpus else "cpu")
    result = Result("encode", describe_machine(device, settings.threads))
    paths = typical_clips(config, _CLIPS[device.type])
    audio = [decode(path, span) for path, span in paths]
    seconds = sum(map(len, audio)) / SAMPLING_RATE
    result.notes.append(
        f"{len(audio)} clips, {seconds:.0f} s, at even quantiles of the lengths of data.train"
    )
    _time_encoders(config, device, audio, result)
    # What runs on the CPU is measured on as many clips everywhere.
    few = slice(None, None, -(-len(audio) // _CLIPS["cpu"]))
    _time_log_mel(audio[few], result)
    _time_decoding(paths[few], sum(map(len, audio[few])) / SAMPLING_RATE, result)
    return result


def typical_clips(config: Config, count: int) -> list[tuple[Path, AudioSpan]]:
    """Choose clips of data.train at even quantiles of length, to keep its distribution."""
    table = build_mixture(
        config.data.train, cache_dir=config.cache_dir, allow_absolute=config.data.allow_absolute
    ).table
    order = np.argsort(table["samples"].to_numpy(), kind="stable")
    count = min(count, len(order))
    chosen = order[((np.arange(count) + 0.5) / count * len(order)).astype(int)]
    return [(Path(r["uri"]), span_of(r)) for r in table.take(chosen).to_pylist()]


def encoder_flops(config: WhisperConfig, frames: int) -> float:
    """Count the floating-point operations to encode one window of `frames` output frames.

    A multiply-add counts as two. Convolutions, projections and attention are counted.
    """
    width, ffn, n_mels = config.d_model, config.encoder_ffn_dim, config.num_mel_bins
    stem = 2 * frames * 3 * n_mels * width + frames * 3 * width * width
    layer = frames * (4 * width * width + 2 * width * ffn) + 2 * frames * frames * width
    return 2.0 * (stem + config.encoder_layers * layer)


def _time_encoders(
    config: Config, device: torch.device, audio: Sequence[np.ndarray], result: Result
) -> None:
    source = config.encoder.weights
    # A CPU without bf16 instructions computes faster in fp32, on both sides.
    dtype = compute_dtype(DTYPES[config.encoder.dtype], device)
    shared: dict[str, Any] = {"dtype": dtype, "device": device}
    full = WhisperEncoder(source, mode="full", **shared)
    trim = WhisperEncoder(
        source, margin_seconds=config.encoder.margin_seconds, mode="trim", **shared
    )
    samples = [len(clip) for clip in audio]
    trim_mels = [trim.front_end(clip) for clip in audio]
    # Clips of at most 30 s are one window each; longer ones are cut there, in both.
    padded = audio[:: -(-len(audio) // _PADDED_WINDOWS[device.type])]
    padded = [clip[:WINDOW_SAMPLES] for clip in padded]
    padded_mels = [full.front_end(clip) for clip in padded]
    ceiling = Ceiling(dtype, device)
    reference = reference_encoder(source, dtype, device)
    best, budget = _best_job(reference, trim_mels, device)
    tried = ", ".join(f"{b:,}" for b in _BUDGETS[device.type])
    result.notes.append(
        f"transformers trimmed: batches of similar lengths of at most {budget:,} log-mel frames, "
        f"the fastest of {tried}; padded: {len(padded)} windows, scaled to all"
    )
    jobs: dict[str, Callable[[], Any]] = {
        "transformers padded": _padded_job(reference, padded_mels, device),
        "transformers trimmed": lambda: [best() for _ in range(_TRIM_REPEATS)],
        "full": lambda: full.encode_mels(padded_mels, list(map(len, padded))),
        "trim": lambda: [trim.encode_mels(trim_mels, samples) for _ in range(_TRIM_REPEATS)],
        "matmul": lambda: ceiling.multiply(_CEILING_REPEATS),
        "copy": ceiling.copy,
    }
    with torch.inference_mode():
        taken = alternate(jobs, rounds=3, device=device)
    for name in ("trim", "transformers trimmed"):
        taken[name] = [t / _TRIM_REPEATS for t in taken[name]]
    taken["matmul"] = [t / _CEILING_REPEATS for t in taken["matmul"]]

    windows = sum(-(-count // WINDOW_SAMPLES) for count in samples)
    for name in ("transformers padded", "full"):
        taken[name] = [t * windows / len(padded) for t in taken[name]]
    full_flops = windows * encoder_flops(full.config, 1500)
    trim_flops = sum(encoder_flops(full.config, mel.shape[1] // 2) for mel in trim_mels)
    seconds = sum(samples) / SAMPLING_RATE
    peak = ceiling.flops / median(taken["matmul"]) / 1e9
    result.add("ceiling: matmul", peak, "GFLOP/s", str(dtype).removeprefix("torch."))
    result.add("ceiling: copy", ceiling.copied_bytes / median(taken["copy"]) / 1e9, "GB/s")
    for name, flops, what in (
        ("transformers trimmed", trim_flops, "real length and margin, batched by length"),
        ("transformers padded", full_flops, "padded to 30 s"),
        ("full", full_flops, "omni, padded to 30 s"),
        ("trim", trim_flops, "omni, real length and margin"),
    ):
        result.add(f"encoder {name}", seconds / median(taken[name]), "audio-s/s", what)
        share = [
            flops / t / (ceiling.flops / c)
            for t, c in zip(taken[name], taken["matmul"], strict=True)
        ]
        result.add(f"encoder {name}", median(share), "of the ceiling")
        if name in ("full", "trim"):
            result.ratio[f"encode.{name}_share_of_ceiling"] = median(share)
    result.ratio["encode.vs_best"] = ratio_of(taken, "transformers trimmed", "trim")
    result.ratio["encode.vs_30s_padding"] = ratio_of(taken, "transformers padded", "trim")
    result.ratio["encode.full_vs_30s_padding"] = ratio_of(taken, "transformers padded", "full")


def _padded_job(model: Any, mels: Sequence[Tensor], device: torch.device) -> Callable[[], Any]:
    """Return a job that runs transformers' encoder over windows padded to 30 s, in batches."""
    batches = torch.stack(list(mels)).to(model.dtype).split(_PADDED_BATCH[device.type])
    return lambda: [model(batch.to(device)).last_hidden_state for batch in batches]


def _best_job(
    model: Any, mels: Sequence[Tensor], device: torch.device
) -> tuple[Callable[[], Any], int]:
    """Return a job that runs transformers' layers at real length, and the budget of its batches."""
    parts = [part for mel in mels for part in mel.split(WINDOW_FRAMES, dim=1)]
    lengths = [part.shape[1] for part in parts]

    def job_of(budget: int) -> Callable[[], Any]:
        batches = [[parts[n] for n in batch] for batch in length_batches(lengths, budget)]
        return lambda: [encode_trimmed(model, batch) for batch in batches]

    jobs = {str(budget): job_of(budget) for budget in _BUDGETS[device.type]}
    with torch.inference_mode():
        taken = alternate(jobs, rounds=2, device=device)
    best = min(taken, key=lambda name: median(taken[name]))
    return jobs[best], int(best)


def _time_log_mel(audio: Sequence[np.ndarray], result: Result) -> None:
    """Time log-mels: transformers' clip by clip at real length, and padded to 30 s, and omni's."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    given: dict[str, Any] = {"sampling_rate": SAMPLING_RATE, "return_tensors": "np"}
    jobs: dict[str, Callable[[], Any]] = {
        "transformers trimmed": lambda: [
            extractor(clip, padding="do_not_pad", **given) for clip in audio
        ],
        "transformers padded": lambda: extractor(list(audio), **given),
        "full": lambda: [clip_mel(clip, 80, "full", 0.0) for clip in audio],
        "trim": lambda: [clip_mel(clip, 80, "trim", 0.5) for clip in audio],
    }
    taken = alternate(jobs, rounds=5)
    seconds = sum(map(len, audio)) / SAMPLING_RATE
    for name in jobs:
        result.add(f"log-mel {name}", seconds / median(taken[name]), "audio-s/s")
    result.ratio["mel.vs_best"] = ratio_of(taken, "transformers trimmed", "trim")
    result.ratio["mel.vs_30s_padding"] = ratio_of(taken, "transformers padded", "trim")
    result.ratio["mel.full_vs_30s_padding"] = ratio_of(taken, "transformers padded", "full")


def _time_decoding(paths: Sequence[tuple[Path, AudioSpan]], seconds: float, result: Result) -> None:
    taken = alternate({"decode": lambda: [decode(path, span) for path, span in paths]}, rounds=5)
    result.add("decode and resample", seconds / median(taken["decode"]), "audio-s/s")
