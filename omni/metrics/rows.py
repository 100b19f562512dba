"""Sums of steps and evaluations as rows of metrics.jsonl, and the figures of summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import Tensor

from omni.audio.windows import SAMPLING_RATE
from omni.checkpoint.train_state import TrainState
from omni.metrics.score import Errors
from omni.metrics.sums import LossTotals, as_tasks
from omni.metrics.table import TRAIN_METRICS, EvalRow, Example, StepSums, TaskFigures, TrainRow
from omni.metrics.throughput import ADVICE, Verdict, judge


@dataclass(frozen=True)
class Pools:
    """Numbers of encoder actors and of loading tasks that feed the trainers, and of nodes."""

    encoders: int
    loaders: int
    nodes: int = 1


@dataclass
class Window:
    """Sums over steps since the last log line, or over all steps of a run, over all ranks."""

    sums: StepSums = field(default_factory=StepSums)
    busy: float = 0.0  # seconds of steps; evaluation and checkpoints are not counted
    wait: float = 0.0  # seconds of them without a block
    steps: int = 0
    lm_steps: int = 0  # updates that ran the language model
    lm_tokens: float = 0.0  # weighted text tokens of these
    started: StepSums = field(default_factory=StepSums)  # of first steps of an attempt
    started_busy: float = 0.0
    started_wait: float = 0.0

    def add(self, sums: StepSums | None, spent: float, waited: float, first: bool) -> None:
        """Add a step; sums: None for one without an update. first: it waited for the stream."""
        self.steps += 1
        self.busy += spent
        self.wait += waited
        if sums is not None:
            self.sums += sums
            if sums.counted:
                self.lm_steps += 1
                self.lm_tokens += sums.tokens
        if first:
            self.started_busy += spent
            self.started_wait += waited
            if sums is not None:
                self.started += sums

    def verdict(self, pools: Pools) -> Verdict:
        """Judge the steps after the first ones of an attempt, if there are any."""
        starting = self.started_busy >= self.busy
        without = StepSums() if starting else self.started
        busy, wait = (0.0, 0.0) if starting else (self.started_busy, self.started_wait)
        return judge(
            self.busy - busy,
            waited=self.wait - wait,
            encode_seconds=self.sums.encode_seconds - without.encode_seconds,
            encoders=pools.encoders,
            load_seconds=self.sums.load_seconds - without.load_seconds,
            loaders=pools.loaders,
            nodes=pools.nodes,
            starting=starting,
        )

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("sums", "started"):
            values[name]["tasks"] = values[name]["tasks"].tolist()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Window:
        sums = {
            name: StepSums(**{**values[name], "tasks": as_tasks(values[name]["tasks"])})
            for name in ("sums", "started")
        }
        return cls(**{**values, **sums})


@dataclass(frozen=True)
class Measured:
    """Inputs of the formulas of `TrainRow`.

    rate: learning rate. norm: gradient norm of the last step. phases: seconds of this rank by
    phase. names: of the tasks. mfu: model FLOPs utilisation, where the devices' peak is known.
    """

    state: TrainState
    window: Window
    steps: int
    rate: float
    norm: float
    pools: Pools
    phases: Mapping[str, float]
    names: Sequence[str] = ()
    mfu: float | None = None

    @property
    def sums(self) -> StepSums:
        return self.window.sums

    @property
    def busy(self) -> float:
        return self.window.busy

    @property
    def tokens(self) -> float:
        return max(self.sums.tokens, 1e-9)

    @property
    def lm_tokens(self) -> float:
        return max(self.window.lm_tokens, 1e-9)

    @property
    def verdict(self) -> Verdict:
        return self.window.verdict(self.pools)

    @property
    def by_task(self) -> dict[str, TaskFigures] | None:
        return by_task(self.names, self.sums.tasks)


def train_row(measured: Measured) -> TrainRow:
    values = {m.name: m.value(measured) for m in TRAIN_METRICS if m.value is not None}
    return TrainRow("train", **values)


def by_task(
    names: Sequence[str],
    sums: Tensor,
    paired: Tensor | None = None,
    shuffled: Tensor | None = None,
) -> dict[str, TaskFigures] | None:
    """Return the means of each task; None for a run with one task.

    sums: (tasks, 3). paired, shuffled: those of the utterances that another recording was found
    for, with their own audio and with that one, for the gap of each task.
    """
    if len(names) < 2:
        return None
    rows = sums.expand(len(names), 3).tolist()  # one row of zeros before the first update
    found: dict[str, TaskFigures] = {
        name: {"loss": loss / tokens, "accuracy": right / tokens, "tokens": int(tokens)}
        for name, (loss, tokens, right) in zip(names, rows, strict=True)
        if tokens
    }
    if paired is not None and shuffled is not None:
        pairs = paired.expand(len(names), 3).tolist(), shuffled.expand(len(names), 3).tolist()
        for name, (loss, tokens, _), (other_loss, other_tokens, _) in zip(
            names, *pairs, strict=True
        ):
            if tokens and other_tokens:
                found[name]["gap"] = other_loss / other_tokens - loss / tokens
    return found


@dataclass(frozen=True)
class DevLosses:
    """Means per token over a held-out split. gap: the loss with another utterance's audio, minus
    the loss of the same utterances; None where no two could be exchanged. tasks: (tasks, 3) sums,
    see `LossSums`; paired_tasks, shuffled_tasks: those of these utterances, with both audios.
    """

    loss: float
    accuracy: float
    gap: float | None
    ctc: float
    kl: float
    tasks: Tensor
    paired_tasks: Tensor
    shuffled_tasks: Tensor

    @classmethod
    def of(cls, true: LossTotals, paired: LossTotals, shuffled: LossTotals) -> DevLosses:
        """Divide sums over all ranks.

        true: of all utterances. paired, shuffled: of those that another recording was found for,
        with their own audio and with that one.
        """
        tokens, gap = max(true.tokens, 1e-9), None
        if paired.tokens and shuffled.tokens:
            gap = shuffled.loss / shuffled.tokens - paired.loss / paired.tokens
        return cls(
            loss=true.loss / tokens,
            accuracy=true.correct / max(true.counted, 1.0),
            gap=gap,
            ctc=true.ctc / tokens,
            kl=true.kl / tokens,
            tasks=true.tasks,
            paired_tasks=paired.tasks,
            shuffled_tasks=shuffled.tasks,
        )

    def by_task(self, names: Sequence[str]) -> dict[str, TaskFigures] | None:
        """Return the means of each task, with its shuffled-audio gap."""
        return by_task(names, self.tasks, self.paired_tasks, self.shuffled_tasks)


def eval_row(
    state: TrainState,
    losses: DevLosses,
    errors: Errors,
    examples: Sequence[dict[str, Any]],
    cut: int = 0,
    names: Sequence[str] = (),
    layers: dict[str, float] | None = None,
    languages: dict[str, Any] | None = None,
    metrics: dict[str, float | None] | None = None,
    alone: Mapping[str, float | None] | None = None,
    decoders: Mapping[str, int] | None = None,
    scores: dict[str, Any] | None = None,
) -> EvalRow:
    """cut: transcripts cut at the limit. names: of the tasks. layers: weights of the encoder's
    layers. languages: error rates of each language, where there are several. metrics: rates of
    `eval.metrics`. alone: WER of each decoder alone. decoders: transcripts by decoder. scores: by
    task, where there is more to say than the WER.
    """
    return EvalRow(
        kind="eval",
        step=state.step,
        epoch=round(state.epoch, 4),
        seconds=round(state.seconds, 2),
        dev_loss=losses.loss,
        dev_accuracy=losses.accuracy,
        shuffled_audio_gap=losses.gap,
        dev_ctc=losses.ctc or None,
        dev_kl=losses.kl or None,
        dev_tasks=losses.by_task(names),
        dev_task_metrics={
            name: figures["value"]
            for name, figures in (scores or {}).items()
            if figures["value"] is not None
        }
        or None,
        dev_scores=scores or None,
        layers=layers or None,
        dev_wer=errors.wer,
        dev_cer=errors.cer,
        dev_lm_wer=(alone or {}).get("lm"),
        dev_ctc_wer=(alone or {}).get("ctc"),
        dev_decoders=dict(decoders or {}),
        dev_cut=cut,
        dev_languages=languages or None,
        dev_metrics=metrics or None,
        examples=[
            cast(Example, {name: row[name] for name in Example.__annotations__ if name in row})
            for row in examples
        ],
    )


def summarize(
    state: TrainState,
    totals: Window,
    pools: Pools,
    results: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Return summary.json: results, and rates over the steps of all attempts."""
    sums, busy = totals.sums, max(totals.busy, 1e-9)
    verdict = totals.verdict(pools)
    encoded = sums.encoded_samples
    return {
        "steps": state.step,
        "epochs": round(state.epoch, 3),
        **results,
        "audio_seconds_per_second": sums.samples / SAMPLING_RATE / busy,
        "tokens_per_second": sums.counted / busy,
        "data_wait_fraction": min(1.0, totals.wait / busy),
        "throughput_limit": verdict.limit,
        "throughput_verdict": str(verdict),
        "throughput_advice": ADVICE[verdict.limit],
        "encoder_audio_seconds_per_second": (
            encoded / SAMPLING_RATE / sums.encode_seconds if encoded else None
        ),
        "cached_fraction": 1 - encoded / sums.samples if sums.samples else None,
        "train_seconds": round(state.seconds, 1),
        "skipped_steps": state.skipped,
        **facts,
    }
