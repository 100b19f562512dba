"""Prepare a run on the driver: index, tokenizer, plan and model shape.

Needs no Ray, so that a wrong config, a missing manifest or an unusable corpus is one clear error
before anything has been started.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omni.augment.plug_in import check_effect
from omni.checkpoint.base import resolved_name
from omni.checkpoint.checkpoint import Checkpoint
from omni.checkpoint.resume import ResumePoint, newest_checkpoint
from omni.cluster.versions import differences
from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.rejects import Reject
from omni.corpus.splits import open_corpora
from omni.corpus.tasks import names_of_tasks, task_rules
from omni.errors import ConfigError
from omni.inference.export import missing_for
from omni.metrics.best_figure import has_figure, task_of
from omni.metrics.score import normalize
from omni.metrics.task_scores import SPOKEN, Scoring
from omni.metrics.text_metric import load_metrics
from omni.model.decode import Decoding, DecodingError
from omni.model.lm.gpt_block import GPTConfig
from omni.model.precision import has_bf16
from omni.model.speech_lm import OmniConfig
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.plan import Split, held_out_step, make_plan
from omni.plan.plan_file import write_plan_file
from omni.plan.sequences import (
    answer_lengths,
    ctc_fit,
    task_names,
    token_fingerprint,
    with_tokens,
)
from omni.plan.windows_file import write_windows_file
from omni.run.augmentation import augmentation_notes, augmentation_of, speeds_of
from omni.run.corpus_checks import check_rejects, ctc_notes, overlap_notes
from omni.run.model_setup import (
    check_base,
    choose_template,
    choose_tokenizer,
    find_base,
    find_language_model,
    language_model_shape,
    model_config,
)
from omni.run.prepare_parts import read_sample
from omni.run.prepare_windows import prepare_windows
from omni.storage.digest import digest
from omni.stream.encoder_facts import EncoderFacts, describe_encoder
from omni.train.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from omni.run.estimate import Estimate

# A decoded answer may be this many times as long as the longest one of training.
_ANSWER_MARGIN = 2.0
_LEAST_NEW_TOKENS = 16


@dataclass(frozen=True)
class Prepared:
    config: Config
    """With `eval.max_new_tokens` as a number, and `eval.decode` resolved."""
    splits: dict[str, Split]
    """train, dev and, if configured, test."""
    rejects: list[Reject]
    """Index rows that never reach the stream."""
    tokenizer: SpeechTokenizer
    template: Literal["plain", "chat"]
    tasks: list[str]
    """Names of the tasks; batches refer to them by position."""
    model: OmniConfig
    encoder: EncoderFacts
    lengths: np.ndarray
    """(n,) positions of the training utterances; 0: not in the plan. Empty for a corpus of several
    windows, which is not in memory."""
    weights: np.ndarray | None
    """(n,) occurrences of each training utterance in an epoch; None: one."""
    fingerprints: dict[str, str]
    resume: Checkpoint | None
    """Verified checkpoint that the run continues from; None starts it."""
    damaged: list[str]
    """Reasons why newer checkpoints cannot be used."""
    notes: list[str]
    """Remarks for the user, shown before the start."""
    filled: float
    """Share of the plan's positions that hold an utterance."""
    estimate: Estimate | None = None
    """Of the training time, where a trial has been made."""

    def write_plan_file(self) -> None:
        split, data = self.splits["train"], self.fingerprints["data.train"]
        if split.reader is None:
            write_plan_file(self.config, split, data, self.lengths, self.weights)
        else:
            write_windows_file(self.config, split.plan.fingerprint, data, split.reader)


def prepare(config: Config, say: Callable[[str], None] | None = None) -> Prepared:
    """Index the splits, train or load the tokenizer, plan every step.

    say: reports the progress of a large corpus. Raises ConfigError, naming the field or file, for
    wrong input.
    """
    run = config.run_dir
    damaged: list[str] = []
    resume = newest_checkpoint(run / "checkpoints", damaged)
    notes = differences()
    for effect in config.augment.effects:
        check_effect(effect)
    load_metrics(config.eval.metrics, "eval.metrics")
    for name in ("train", "dev"):
        if not getattr(config.data, name):
            raise ConfigError(f"data.{name}: expected at least one manifest")
    lm = find_language_model(config)
    base = find_base(config) if resume is None else None
    language_model_shape(config, lm, config.tokenizer.vocab_size)  # Before a corpus is read.
    indexes, parts = open_corpora(config)
    sample = indexes["train"] if parts is None else read_sample(parts, config)
    encoder = describe_encoder(config, sample)
    tokenizer = choose_tokenizer(config, None if resume is None else resume.path, sample, lm, base)
    model = model_config(config, tokenizer, encoder, lm)
    if base is not None:
        check_base(base, config, model, encoder)
        named = resolved_name(base, config.model.base or "")
        given = config.model.model_copy(update={"base": named})
        config = config.model_copy(update={"model": given})
    config = _with_decoder(config, model)
    template = choose_template(config, tokenizer)
    splits: dict[str, Split] = {}
    rejects: list[Reject] = []
    answers: dict[str, np.ndarray] = {}
    planned, filled = np.zeros(0, dtype=np.int64), 0.0
    weights: np.ndarray | None = None
    data_fingerprint = tokens = ""
    if parts is None:
        tasks = task_names(config, indexes)
    else:
        train = prepare_windows(config, parts, tokenizer, template.kind, indexes, say)
        tasks, splits["train"], rejects = train.tasks, train.split, train.rejects
        notes += train.notes
        answers["train"] = np.asarray([train.longest_answer])
        filled, data_fingerprint, tokens = train.filled, train.fingerprint, train.tokens
    scoring = Scoring(task_rules(config.data.model_dump()), tasks)
    for name, index in indexes.items():
        table, lengths, too_long = with_tokens(index, template, tasks, config)
        rejects += [*index.rejects, *too_long]
        is_train = name == "train"
        if is_train:
            rows = len(index) + len(index.rejects)
            check_rejects(config, index.rejects + too_long, rows)
        else:
            lengths[config.eval.max_utterances :] = 0
        if name == "dev":
            _check_best(config, index, lengths > 0, scoring)
        answers[name] = answer_lengths(table)[lengths > 0]
        augmentation = None
        if is_train:
            augmentation = augmentation_of(config, partial(speeds_of, config, table, lengths))
        speeds = None if augmentation is None else augmentation.speeds
        try:
            plan = make_plan(
                lengths,
                index_fingerprint=index.fingerprint,
                seed=config.run.seed,
                bin_positions=config.optim.bin_positions,
                bins_per_step=config.optim.bins_per_step if is_train else 1,
                epochs=None if is_train else 1,
                max_steps=config.optim.steps if is_train else None,
                speeds=speeds,
                weights=index.weights,
            )
        except ValueError as error:
            raise ConfigError(f"data.{name}: {error} (optim.bin_positions)") from None
        splits[name] = Split(name, table, plan, augmentation)
        if is_train:
            planned = lengths
            weights = index.weights
            shortest = lengths if speeds is None else speeds.shortest
            if config.optim.ctc_weight:
                usable = int((shortest > 0).sum())
                fit = ctc_fit(table, shortest, config.model.summary_tokens)
                notes += ctc_notes(*fit, usable, len(index), speeds is not None)
            filled = plan.positions(lengths, speeds) / (plan.bins * config.optim.bin_positions)
            data_fingerprint, tokens = index.fingerprint, token_fingerprint(table)
    notes += [note for index in indexes.values() for note in index.notes]
    config = _with_answer_limit(config, answers["train"])
    notes += _long_answers(config, answers)
    notes += (_overlap(indexes, scoring) if parts is None else []) + augmentation_notes(config)
    notes += _precision_notes(config)
    notes += _schedule_notes(config) + _export_notes(model, encoder)
    augmentation = splits["train"].augmentation
    fingerprints = {
        "data.train": data_fingerprint,
        "tokenizer": digest(tokenizer.to_json()),
        "plan": splits["train"].plan.fingerprint,
        "model": digest(json.dumps(model.to_dict(), sort_keys=True)),
        "encoder": " ".join(encoder.identity),
        "augment": "" if augmentation is None else augmentation.identity,
        "tokens": tokens,
    }
    return Prepared(
        config,
        splits,
        rejects,
        tokenizer,
        template.kind,
        tasks,
        model,
        encoder,
        planned,
        weights,
        fingerprints,
        resume,
        damaged,
        notes,
        filled,
    )


def make_worker_spec(
    prepared: Prepared,
    workers: int = 1,
    resume: ResumePoint | None = None,
    nodes: int = 1,
    lease: int | None = None,
    encode: bool = True,
) -> WorkerSpec:
    """Collect what every rank of a group of `workers` needs.

    resume: checkpoint that they start from. nodes: of the cluster. lease: its number. encode: the
    stream has encoders.
    """
    train = prepared.splits["train"]
    return WorkerSpec(
        config=prepared.config,
        model=prepared.model,
        encoder=prepared.encoder,
        tokenizer_json=prepared.tokenizer.to_json(),
        template=prepared.template,
        tasks=prepared.tasks,
        fingerprints=prepared.fingerprints,
        held_bins={
            name: split.plan.bins for name, split in prepared.splits.items() if name != "train"
        },
        held_step=_held_step(prepared.config, resume),
        train_rows=train.rows,
        epoch_ends=train.plan.epoch_ends.tolist(),
        nodes=nodes,
        encoders=prepared.config.encoder.actor_count if encode else 0,
        resume=resume,
        lease=lease,
    )


def _held_step(config: Config, resume: ResumePoint | None) -> int:
    first = 0 if resume is None else resume.step
    patience = config.eval.patience
    if resume is not None and patience is not None and resume.evaluations_since_best >= patience:
        return first  # It trains no further, and scores only.
    steps, log_every = config.optim.steps, config.train.log_every
    return held_out_step(first, steps, log_every, config.eval.every)


def _with_decoder(config: Config, model: OmniConfig) -> Config:
    """Resolve `eval.decode`. Raises ConfigError for a decoder that the model does not have."""
    wanted = config.eval
    try:
        decoding = Decoding.of(
            wanted.decode, wanted.ctc_weight, None, head=model.ctc, beam=wanted.beam
        )
    except DecodingError as error:
        reason = "; it is 0" if error.setting == "decode" else ""
        raise ConfigError(f"eval.{error.setting}: {error}{reason}") from None
    evaluation = wanted.model_copy(update={"decode": decoding.decoder})
    return config.model_copy(update={"eval": evaluation})


def _with_answer_limit(config: Config, answers: np.ndarray) -> Config:
    """Set `eval.max_new_tokens`, where it is null, by the answers of training.

    answers: (n,) tokens of each, end tokens included.
    """
    if config.eval.max_new_tokens is not None:
        return config
    longest = int(answers.max(initial=0))
    limit = max(_LEAST_NEW_TOKENS, math.ceil(longest * _ANSWER_MARGIN))
    evaluation = config.eval.model_copy(update={"max_new_tokens": limit})
    return config.model_copy(update={"eval": evaluation})


def _long_answers(config: Config, answers: dict[str, np.ndarray]) -> list[str]:
    """Count the references that cannot be decoded whole."""
    limit = config.eval.max_new_tokens
    long = {name: int((lengths > limit).sum()) for name, lengths in answers.items()}
    return [
        f"eval.max_new_tokens: {count} of {len(answers[name])} answers of {name} have more than "
        f"{limit} tokens, so their transcripts will be cut"
        for name, count in long.items()
        if count and name != "train"
    ]


def _precision_notes(config: Config) -> list[str]:
    on_cpu = {
        "train.precision": config.train.precision if not config.train.gpus else None,
        "encoder.dtype": config.encoder.dtype if not config.encoder.gpus else None,
    }
    settings = [name for name, wanted in on_cpu.items() if wanted == "bf16"]
    if not settings or has_bf16("cpu"):
        return []
    return [f"{', '.join(settings)}: computing in fp32, since this CPU has no bf16 instructions"]


def _schedule_notes(config: Config) -> list[str]:
    optim, steps, notes = config.optim, config.optim.steps, []
    if optim.warmup_steps >= steps:
        notes.append(
            f"optim.warmup_steps {optim.warmup_steps}: the run ends after {steps} steps, before "
            "the learning rate has reached its peak"
        )
    if optim.ctc_only_steps >= steps:
        notes.append(
            f"optim.ctc_only_steps {optim.ctc_only_steps}: CTC alone trains in all {steps} steps, "
            "and decodes the scores of the run (elsewhere: --decode ctc)"
        )
    return notes


def _export_notes(model: OmniConfig, encoder: EncoderFacts) -> list[str]:
    """Say before the training where its model could not be exported.

    transformers takes any but those with a projector of their own. Voxtral's format, which other
    programs read too, is for transformers' language models.
    """
    facts = encoder.to_dict()
    if needed := missing_for("transformers", model, facts):
        return [
            "omni export --to transformers will not take this model: that needs "
            f"{', '.join(needed)}"
        ]
    needed = [] if isinstance(model.lm, GPTConfig) else missing_for("hf", model, facts)
    if not needed:
        return []
    return [
        f"omni export --to transformers takes this model; --to hf would need {', '.join(needed)}"
    ]


def _check_best(config: Config, dev: Index, held: np.ndarray, scoring: Scoring) -> None:
    """Raise ConfigError where the best checkpoint would be chosen by a figure that nothing has.

    held: True for the rows of dev that are evaluated.
    """
    best, names = config.eval.best, names_of_tasks(dev.table)
    if (task := task_of(best)) is not None:
        if task not in names:
            raise ConfigError(
                f"eval.best: {best}: data.dev has no such task; expected one of {', '.join(names)}"
            )
        limit = config.eval.wer_utterances
        if task not in names_of_tasks(dev.table.slice(0, limit).filter(pa.array(held[:limit]))):
            raise ConfigError(
                f"eval.best: {best}: none of the first {limit} utterances of data.dev is of this "
                "task; expected a larger eval.wer_utterances"
            )
        if not scoring.named:
            raise ConfigError(
                f"eval.best: {best}: the only task has no figure of its own; expected dev_wer"
            )
        metric = scoring.metric(task)
        if not has_figure(scoring.rule(task), metric):
            raise ConfigError(
                f"eval.best: {best}: answers with tags have no {metric}; expected another "
                f"data.tasks.{task}.metric"
            )
        return
    if best != "dev_loss" and not any(scoring.metric(name) in SPOKEN for name in names):
        raise ConfigError(
            f"eval.best: {best}: no task of data.dev is scored by WER ({', '.join(names)}); "
            "expected dev_loss, or data.tasks.NAME.metric: wer"
        )


def _overlap(indexes: dict[str, Index], scoring: Scoring) -> list[str]:
    """Count held-out sentences that also occur in training, where a WER says little.

    Answers of tasks that are not scored by WER, such as classes, are no sentences.
    """
    said = [n for n in scoring.names if scoring.metric(n) in SPOKEN and not scoring.rule(n).answer]

    def sentences(name: str) -> Iterator[str]:
        table = indexes[name].table
        own = table["task"].fill_null(DEFAULT_TASK)
        for text in table["text"].filter(pc.is_in(own, pa.array(said, pa.large_string()))):
            # The English normalizer takes "zero" and the letter "o" for one word.
            yield normalize(text.as_py(), language="")

    held = {name: list(sentences(name)) for name in indexes if name != "train"}
    asked = {sentence for of_split in held.values() for sentence in of_split}
    trained = {sentence for sentence in sentences("train") if sentence in asked}
    notes = []
    for name, of_split in held.items():
        notes += overlap_notes(name, sum(s in trained for s in of_split), len(of_split))
    return notes
