"""A run's figures as Ray metrics, which Prometheus collects from every node. The encoders' own
come from `omni.stream.pipeline`.

`METRICS` is the whole list, with its labels, and docs/metrics.md tells it to people. Labels are
bounded: stages, phases, reasons of rejects and ranks; never an utterance, a file or a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from omni.metrics.throughput import ADVICE


@dataclass(frozen=True)
class Known:
    kind: type[Counter] | type[Gauge] | type[Histogram]
    about: str
    labels: tuple[str, ...] = ()


METRICS = {
    "omni_step": Known(Gauge, "optimizer steps done"),
    "omni_steps": Known(Gauge, "optimizer steps that the run was asked for"),
    "omni_epoch": Known(Gauge, "passes over the training data"),
    "omni_loss": Known(Gauge, "training loss since the last log line, nats per token"),
    "omni_ctc_loss": Known(Gauge, "CTC loss of the same, nats per token"),
    "omni_learning_rate": Known(Gauge, "of the first group of parameters"),
    "omni_gradient_norm": Known(Gauge, "before clipping, of the last step"),
    "omni_dev_loss": Known(Gauge, "at the last evaluation, nats per token"),
    "omni_dev_wer": Known(Gauge, "word error rate of the last evaluation, of 1"),
    "omni_dev_cer": Known(Gauge, "character error rate of the last evaluation, of 1"),
    "omni_shuffled_audio_gap": Known(Gauge, "dev loss with another's audio, minus dev loss"),
    "omni_audio_seconds": Known(Counter, "seconds of audio: encoded, trained", ("stage",)),
    "omni_utterances": Known(Counter, "utterances trained"),
    "omni_tokens": Known(Counter, "text tokens trained"),
    "omni_bins": Known(Counter, "bins consumed"),
    "omni_cache_audio_seconds": Known(
        Counter, "seconds of audio whose features were in the cache (hit) or not (miss)", ("found",)
    ),
    "omni_cache_full": Known(Gauge, "1 when the feature cache keeps nothing more"),
    "omni_rejects": Known(Counter, "utterances that could not be used", ("reason",)),
    "omni_skipped_steps": Known(Counter, "steps whose gradients were not applied"),
    "omni_stage_seconds": Known(Counter, "work of all decoders and encoders", ("stage",)),
    "omni_phase_seconds": Known(Counter, "where a rank's time goes", ("phase", "rank")),
    "omni_busy": Known(Gauge, "share of its time that a stage works, of 1", ("stage",)),
    "omni_limit": Known(Gauge, "1 for what limits throughput, else 0", ("limit",)),
    "omni_mfu": Known(Gauge, "share of the GPUs' peak that is the model's own products, of 1"),
    "omni_encoder_batch_seconds": Known(Histogram, "of one block in an encoder actor"),
    "omni_gpu_memory_bytes": Known(Gauge, "most that tensors of a rank took up", ("rank",)),
}
_REFRESH_SECONDS = 1.0  # Ray's shortest interval between two reports of a process


class RayPublisher:
    """One rank's metrics (`omni.train.loop.Publisher`). Rank 0 also tells what concerns the run."""

    def __init__(self, run: str, rank: int) -> None:
        self._rank = str(rank)
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        for name, known in METRICS.items():
            labels = ("run", *known.labels)
            if known.kind is Gauge:
                self._gauges[name] = Gauge(name, known.about, labels)
                self._gauges[name].set_default_tags({"run": run})
            elif known.kind is Counter:
                self._counters[name] = Counter(name, known.about, labels)
                self._counters[name].set_default_tags({"run": run})
        self._counted: dict[tuple[str, str], float] = {}
        self._first_row = True
        self._shown: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
        threading.Thread(target=self._refresh, daemon=True, name="gauges").start()

    def train_row(
        self, row: Mapping[str, Any], rejects: Mapping[str, int], cache_full: bool
    ) -> None:
        """A training row of metrics.jsonl, all rejects so far by reason, and the cache."""
        # An attempt that began this run has trained for as long as its first row tells of; one that
        # continues it does not know which of the row's totals are its own.
        began = row["seconds"] - row["step_seconds"] < 0.01  # seconds are rounded
        unknown = self._first_row and not began
        self._first_row = False
        self._set("omni_cache_full", float(cache_full))
        for name, key in (
            ("omni_step", "step"),
            ("omni_steps", "steps"),
            ("omni_epoch", "epoch"),
            ("omni_loss", "loss"),
            ("omni_ctc_loss", "ctc"),
            ("omni_learning_rate", "lr"),
            ("omni_gradient_norm", "grad_norm"),
            ("omni_mfu", "mfu"),
        ):
            self._set(name, row[key])
        seconds = row["step_seconds"]
        trained = row["audio_seconds_per_second"] * seconds
        encoded = row["encoded_audio_seconds"]
        self._add("omni_audio_seconds", trained, stage="trained")
        self._add("omni_audio_seconds", encoded, stage="encoded")
        self._add("omni_cache_audio_seconds", max(0.0, trained - encoded), found="hit")
        self._add("omni_cache_audio_seconds", encoded, found="miss")
        self._add("omni_utterances", row["utterances"])
        self._add("omni_tokens", row["tokens_per_second"] * seconds)
        self._add("omni_stage_seconds", row["load_seconds"], stage="decode")
        self._add("omni_stage_seconds", row["encode_seconds"], stage="encoder")
        for stage, share in row["busy"].items():
            self._set("omni_busy", share, stage=stage)
        for limit in ADVICE:
            self._set("omni_limit", float(limit == row["limit"]), limit=limit)
        self._count("omni_bins", row["bins"], unknown)
        self._count("omni_skipped_steps", row["skipped"], unknown)
        for reason, count in rejects.items():
            self._count("omni_rejects", count, unknown, reason=reason)

    def eval_row(self, row: Mapping[str, Any]) -> None:
        """An evaluation of metrics.jsonl."""
        for name in ("dev_loss", "dev_wer", "dev_cer", "shuffled_audio_gap"):
            self._set(f"omni_{name}", row[name])

    def phases(self, seconds: Mapping[str, float]) -> None:
        for phase, spent in seconds.items():
            self._add("omni_phase_seconds", spent, phase=phase, rank=self._rank)

    def gpu_memory(self, peak: int) -> None:
        """Bytes."""
        self._set("omni_gpu_memory_bytes", peak, rank=self._rank)

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self._shown[name, str(sorted(labels.items()))] = (value, labels)
            self._show(name, value, labels)

    def _show(self, name: str, value: float, labels: dict[str, str]) -> None:
        self._gauges[name].set(value, tags=labels)

    def _refresh(self) -> None:
        """Ray forgets a gauge that is not set for two reports, as when steps or evaluations are
        minutes apart, or when the run hangs: alerts and the dashboard need it most then.
        """
        while True:
            time.sleep(_REFRESH_SECONDS)
            for (name, _), (value, labels) in list(self._shown.items()):
                self._show(name, value, labels)

    def _add(self, name: str, value: float, **labels: str) -> None:
        if value > 0:  # Ray refuses zero
            self._counters[name].inc(value, tags=labels)

    def _count(self, name: str, total: float, unknown: bool, **labels: str) -> None:
        """A counter that is known as a total; what an earlier attempt counted is not told again.

        unknown: whether `total` may hold such counts. Whatever appears later begins at 0.
        """
        key = (name, str(sorted(labels.items())))
        self._add(name, total - self._counted.get(key, total if unknown else 0.0), **labels)
        self._counted[key] = total
