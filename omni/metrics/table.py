"""Table of a run's metrics: name, unit, help, kind, and the formula from the sums of steps.

The fields of `TrainRow` and `EvalRow` are the rows of metrics.jsonl. Prometheus names, the groups
of curves in trackers and the table in docs/metrics.md are generated from them and from `EXPORTED`.
To add a metric, add its line here (and a field of `StepSums`, if it needs a new sum), and fill it
where it is measured. `python -m omni.metrics.doc_table` then writes it into docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypedDict

from omni.audio.windows import SAMPLING_RATE
from omni.metrics.metric import Metric, metric, metrics_of
from omni.metrics.sums import LossTotals
from omni.metrics.throughput import ADVICE


@dataclass
class StepSums(LossTotals):
    """Sums over the bins of one or more steps."""

    utterances: float = 0.0
    samples: float = 0.0  # of audio at 16 kHz
    load_seconds: float = 0.0  # work of the loading tasks
    encode_seconds: float = 0.0  # work of the encoder actors
    encoded_samples: float = 0.0  # of audio whose features were not in the cache
    rejected: float = 0.0  # utterances
    halvings: float = 0.0
    """Times that an encoder ran out of memory and halved its batches."""
    stop: float = 0.0  # ranks that were asked to stop


progress = partial(metric, group="progress")
throughput = partial(metric, group="throughput")
no_curve = partial(metric, group="")


class _TaskGap(TypedDict, total=False):
    gap: float
    """Loss with another recording's audio, minus loss; of evaluations."""


class TaskFigures(_TaskGap):
    """Means per token of one task."""

    loss: float
    accuracy: float
    tokens: int


class _Location(TypedDict, total=False):
    """Location of a recording: a file, seconds in it, and (offset, length) in an archive."""

    audio: str
    start: float
    duration: float
    bytes: tuple[int, int]


class _Cut(TypedDict, total=False):
    cut: bool
    """Present where the transcript ends at `eval.max_new_tokens`."""


class _Answered(TypedDict, total=False):
    """Fields of rows of named tasks, see `omni.metrics.task_scores`."""

    task: str
    metric: str
    right: bool
    tags: dict[str, dict[str, str | None]]
    choices: dict[str, float]


class Example(_Location, _Cut, _Answered):
    """A transcript of an evaluation."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class TrainRow:
    """A logged step: means over the steps since the last log line, rates per second of them.

    The formulas take `omni.metrics.rows.Measured`.
    """

    kind: str
    step: int = no_curve("steps", "optimizer steps done", lambda m: m.state.step, "omni_step")
    steps: int = no_curve("steps", "optimizer steps of the plan", lambda m: m.steps, "omni_steps")
    epoch: float = progress(
        "epochs", "passes over the training data", lambda m: round(m.state.epoch, 4), "omni_epoch"
    )
    seconds: float = progress(
        "s", "training steps, over all attempts", lambda m: round(m.state.seconds, 2)
    )
    loss: float | None = metric(
        "nats/token",
        "training loss, null while `optim.ctc_only_steps` leaves the language model out",
        lambda m: m.sums.loss / m.lm_tokens if m.sums.counted else None,
        "omni_loss",
    )
    accuracy: float | None = metric(
        "of 1",
        "text tokens that are predicted rightly",
        lambda m: m.sums.correct / m.sums.counted if m.sums.counted else None,
    )
    ctc: float = metric("nats/token", "CTC loss", lambda m: m.sums.ctc / m.tokens, "omni_ctc_loss")
    kl: float | None = metric(
        "nats/token",
        "divergence from the language model given the transcript (`optim.kl_weight`)",
        lambda m: m.sums.kl / m.lm_tokens if m.sums.kl else None,
        optional=True,
    )
    tasks: dict[str, TaskFigures] | None = metric(
        "", "loss, accuracy and tokens by task, of several", lambda m: m.by_task, optional=True
    )
    lr: float = metric(
        "", "learning rate of the first parameter group", lambda m: m.rate, "omni_learning_rate"
    )
    grad_norm: float = metric(
        "", "gradient norm of the last step, unclipped", lambda m: m.norm, "omni_gradient_norm"
    )
    bins: int = progress(
        "bins", "bins consumed", lambda m: m.state.bins_consumed, "omni_bins", "total"
    )
    utterances: int = progress(
        "utterances",
        "utterances trained",
        lambda m: int(m.sums.utterances),
        "omni_utterances",
        "counter",
    )
    audio_seconds_per_second: float = throughput(
        "s/s", "audio trained", lambda m: m.sums.samples / SAMPLING_RATE / m.busy
    )
    tokens_per_second: float = throughput(
        "tokens/s", "text tokens trained", lambda m: m.sums.counted / m.busy
    )
    data_wait_fraction: float = throughput(
        "of 1", "time that trainers wait for data", lambda m: min(1.0, m.window.wait / m.busy)
    )
    mfu: float | None = metric(
        "of 1",
        "model FLOPs utilisation: the model's own products, of the GPUs' peak",
        lambda m: m.mfu,
        "omni_mfu",
    )
    limit: str = no_curve("", "stage that limits throughput", lambda m: m.verdict.limit)
    busy: dict[str, float] = throughput(
        "of 1",
        "time that a stage works",
        lambda m: m.verdict.busy,
        "omni_busy",
        labels=("stage",),
    )
    load_seconds: float = throughput(
        "s", "work of all loading tasks", lambda m: m.sums.load_seconds
    )
    encode_seconds: float = throughput(
        "s", "work of all encoder actors", lambda m: m.sums.encode_seconds
    )
    encoded_audio_seconds: float = throughput(
        "s", "audio not found in the cache", lambda m: m.sums.encoded_samples / SAMPLING_RATE
    )
    halvings: int | None = metric(
        "times",
        "an encoder ran out of memory and halved its batches",
        lambda m: int(m.sums.halvings) or None,
        "omni_encoder_halvings",
        "counter",
        optional=True,
    )
    step_seconds: float = throughput("s", "these steps", lambda m: m.busy)
    skipped: int = progress(
        "steps",
        "steps without an update",
        lambda m: m.state.skipped,
        "omni_skipped_steps",
        "total",
    )
    phases: dict[str, float] = metric(
        "s", "time of rank 0 by phase", lambda m: m.phases, group="phases"
    )

    @property
    def audio_seconds(self) -> float:
        """Seconds of audio trained."""
        return self.audio_seconds_per_second * self.step_seconds


@dataclass(frozen=True)
class EvalRow:
    """An evaluation on dev."""

    kind: str
    step: int = no_curve("steps", "optimizer steps done")
    epoch: float = no_curve("epochs", "passes over the training data")
    seconds: float = no_curve("s", "training steps, over all attempts")
    dev_loss: float = metric("nats/token", "loss", prometheus="omni_dev_loss")
    dev_accuracy: float = metric("of 1", "text tokens that are predicted rightly")
    shuffled_audio_gap: float | None = metric(
        "nats/token",
        "loss with another utterance's audio, minus loss; null where no two could be exchanged",
        prometheus="omni_shuffled_audio_gap",
    )
    dev_ctc: float | None = metric("nats/token", "CTC loss", optional=True)
    dev_kl: float | None = metric(
        "nats/token", "divergence from the language model given the transcript", optional=True
    )
    dev_tasks: dict[str, TaskFigures] | None = metric(
        "", "loss, accuracy, shuffled-audio gap and tokens by task, of several", optional=True
    )
    dev_task_metrics: dict[str, float] | None = metric(
        "of 1 (BLEU, chrF: of 100)",
        "figure that sums up each task (`data.tasks`: `metric`)",
        prometheus="omni_dev_task_metric",
        labels=("task",),
        optional=True,
    )
    dev_scores: dict[str, Any] | None = no_curve(
        "",
        "all figures of each task: accuracy, macro F1, confusion, calibration, tags",
        optional=True,
    )
    layers: dict[str, float] | None = metric(
        "of 1", "weights of the layers (`encoder.layers`)", group="layers", optional=True
    )
    dev_wer: float | None = metric(
        "of 1",
        "word error rate of the decoder (`eval.decode`; CTC during `optim.ctc_only_steps`)",
        prometheus="omni_dev_wer",
    )
    dev_cer: float | None = metric("of 1", "character error rate", prometheus="omni_dev_cer")
    dev_lm_wer: float | None = metric(
        "of 1",
        "word error rate of the language model alone, where the answer is what is said",
        prometheus="omni_dev_lm_wer",
        optional=True,
    )
    dev_ctc_wer: float | None = metric(
        "of 1",
        "word error rate of the CTC head alone, of the same utterances",
        prometheus="omni_dev_ctc_wer",
        optional=True,
    )
    dev_decoders: dict[str, int] = no_curve("utterances", "transcripts by decoder (`eval.decode`)")
    dev_cut: int = metric(
        "answers", "transcripts cut at `eval.max_new_tokens`", prometheus="omni_dev_cut"
    )
    dev_languages: dict[str, Any] | None = metric(
        "of 1", "error rates by language, of several", optional=True
    )
    dev_metrics: dict[str, float | None] | None = metric(
        "of 1", "rates of your own metrics (`eval.metrics`)", optional=True
    )
    examples: list[Example] = no_curve("", "references and hypotheses")


TRAIN_METRICS = metrics_of(TrainRow, "train")
EVAL_METRICS = metrics_of(EvalRow, "dev")
# Those in Prometheus alone. The formulas take a `TrainRow`; who measures the others exports them.
EXPORTED = (
    Metric(
        "s",
        "audio: encoded, trained",
        lambda row: {"encoded": row.encoded_audio_seconds, "trained": row.audio_seconds},
        "omni_audio_seconds",
        "counter",
        ("stage",),
    ),
    Metric(
        "s",
        "audio found in the cache (hit) or not (miss)",
        lambda row: {
            "hit": max(0.0, row.audio_seconds - row.encoded_audio_seconds),
            "miss": row.encoded_audio_seconds,
        },
        "omni_cache_audio_seconds",
        "counter",
        ("found",),
    ),
    Metric(
        "tokens",
        "text tokens trained",
        lambda row: row.tokens_per_second * row.step_seconds,
        "omni_tokens",
        "counter",
    ),
    Metric(
        "s",
        "work of all loading tasks (decode) and encoder actors (encoder)",
        lambda row: {"decode": row.load_seconds, "encoder": row.encode_seconds},
        "omni_stage_seconds",
        "counter",
        ("stage",),
    ),
    Metric(
        "",
        "1 for what limits throughput, else 0",
        lambda row: {limit: float(limit == row.limit) for limit in ADVICE},
        "omni_limit",
        "gauge",
        ("limit",),
    ),
    Metric("", "1 when the feature cache is full", None, "omni_cache_full"),
    Metric("", "utterances rejected", None, "omni_rejects", "total", ("reason",)),
    Metric(
        "s", "time of a rank by phase", None, "omni_phase_seconds", "counter", ("phase", "rank")
    ),
    Metric(
        "s",
        "a step's copies and forward passes on a rank, which wait for neither data nor ranks",
        None,
        "omni_rank_step_seconds",
        "gauge",
        ("rank",),
    ),
    Metric("bytes", "peak of a rank", None, "omni_gpu_memory_bytes", "gauge", ("rank",)),
    Metric(
        "bytes",
        "held by torch on the GPU of a rank, used or not",
        None,
        "omni_gpu_reserved_bytes",
        "gauge",
        ("rank",),
    ),
    Metric(
        "bytes",
        "not held by any process on the GPU of a rank",
        None,
        "omni_gpu_free_bytes",
        "gauge",
        ("rank",),
    ),
    Metric("bytes", "size of the GPU of a rank", None, "omni_gpu_size_bytes", "gauge", ("rank",)),
    Metric("steps", "step of the newest checkpoint", None, "omni_checkpoint_step"),
    Metric("steps", "from checkpoint to checkpoint, as set", None, "omni_checkpoint_every"),
    Metric(
        "s",
        "Unix time at which the newest checkpoint was written, or the attempt began",
        None,
        "omni_checkpoint_time",
    ),
    Metric("s", "writing the newest checkpoint", None, "omni_checkpoint_write_seconds"),
    Metric(
        "writes",
        "checkpoints that storage refused, each try",
        None,
        "omni_checkpoint_failures",
        "counter",
    ),
    Metric("attempts", "worker groups started", None, "omni_attempts", "counter"),
    Metric(
        "s",
        "Unix time at which the driver began; present while it lives",
        None,
        "omni_driver_began",
    ),
    Metric(
        "s",
        "that time of a driver that ended with the plan trained, or by a signal",
        None,
        "omni_driver_ended",
        "counter",
    ),
    Metric("s", "one microbatch in an encoder", None, "omni_encoder_batch_seconds", "histogram"),
)
METRICS = (*TRAIN_METRICS, *EVAL_METRICS, *EXPORTED)
PROMETHEUS = {m.prometheus: m for m in METRICS if m.prometheus is not None}


def to_json(row: TrainRow | EvalRow) -> dict[str, Any]:
    """Return a row as metrics.jsonl holds it."""
    table = TRAIN_METRICS if isinstance(row, TrainRow) else EVAL_METRICS
    absent = {m.name for m in table if m.optional and getattr(row, m.name) is None}
    return {f.name: getattr(row, f.name) for f in fields(row) if f.name not in absent}
