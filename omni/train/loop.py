"""Train on one rank: blocks of the stream in, checkpoints, metrics and a summary out.

Independent of Ray: takes an iterator of blocks and, with more than one rank, an initialized process
group. All randomness of a block comes from (seed, step, number of the block in the step), so the
loss curve does not depend on the number of workers, and a resumed run repeats it bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from omni.checkpoint.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from omni.checkpoint.resume import find_resume_point
from omni.checkpoint.retention import checkpoint_path, set_link
from omni.checkpoint.train_state import TrainState
from omni.cluster.stacks import place_of_thread, waits_for_ranks, write_stacks
from omni.cluster.timeouts import rank_timeout
from omni.cluster.watchdog import Watchdog
from omni.corpus.tasks import task_rules
from omni.inference.decode_batch import (
    by_language,
    count_cut,
    count_decoders,
    wer_alone,
    without_counts,
)
from omni.metrics.best_figure import BestFigure
from omni.metrics.rows import eval_row
from omni.metrics.run_files import append_json, keep_lines, remove_lines
from omni.metrics.task_scores import Scoring, spoken
from omni.metrics.text_metric import load_metrics, score
from omni.model.chat_template import Template
from omni.model.decode import Decoding
from omni.model.speech_lm import OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.plan import epochs_done
from omni.storage.path import StoragePath
from omni.train.batches import BlockReader
from omni.train.distributed import all_gather, barrier
from omni.train.evaluation import HeldOut
from omni.train.ledger import rewind_ledgers
from omni.train.model_state import ModelState
from omni.train.optim import describe_groups
from omni.train.recorder import Publisher, Recorder
from omni.train.saving import Saver
from omni.train.step import StepRunner
from omni.train.stop_request import StopRequest
from omni.train.worker_spec import WorkerSpec

_FIRST_BLOCK_TIMEOUT_FACTOR = 3.0
"""The first block waits for the stream to start and for the actors to load the encoder."""
_LAST_CHECKPOINT_TIMEOUT_FACTOR = 3.0
"""A checkpoint takes as long as its upload."""


class TrainLoop:
    """blocks: this rank's share of the stream. node: id of the node that the rank runs on."""

    def __init__(
        self,
        spec: WorkerSpec,
        blocks: Iterator[pa.Table],
        rank: int,
        world: int,
        device: torch.device,
        node: str = "",
        publisher: Publisher | None = None,
    ) -> None:
        self.spec, self.config = spec, spec.config
        self.rank, self.world = rank, world
        self.run_dir = spec.config.run_dir
        self.checkpoints = self.run_dir / "checkpoints"
        self.template = Template(SpeechTokenizer.from_json(spec.tokenizer_json), spec.template)
        self.recorder = Recorder(spec, rank, world, device, publisher)
        self.reader = BlockReader(spec, blocks, rank, world, device, self.recorder.watch)
        self.model_state = ModelState(
            spec.config,
            spec.model,
            device,
            world,
            tasks=spec.tasks,
            end=self.template.end,
            resuming=spec.resume is not None,
        )
        self.state = TrainState(fingerprints=spec.fingerprints)
        self.last_norm = 0.0
        self._metrics = load_metrics(spec.config.eval.metrics, "eval.metrics")
        self._scoring = Scoring(task_rules(spec.config.data.model_dump()), spec.tasks)
        settings = spec.config.eval
        self._best_figure = BestFigure.of(settings.best, self._scoring)
        self._decoding = Decoding.of(
            settings.decode,
            settings.ctc_weight,
            settings.max_new_tokens,
            head=spec.model.ctc,
            beam=settings.beam,
        )
        self._stop = StopRequest(self.run_dir)
        self._stopping = False
        self._held: dict[str, HeldOut] = {}
        self.steps = StepRunner(
            spec.config,
            self.model_state,
            self.reader,
            self._stop_requested,
            self._log_event,
            self.recorder.watch,
        )
        self._resume(node)

    # -- the run, top down ---------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the end of the plan, or until `eval.patience` is exhausted.

        Returns the summary; None after a stop request, with a checkpoint of the last step.
        """
        train = self.config.train
        self._watchdog = Watchdog(
            rank_timeout(train.timeout_seconds), self._log_stall, self._stop_timeout, self._log_slow
        )
        self._saver = Saver(self.spec, self.rank, self.model_state.sharded, self.recorder)
        try:
            return self._run()
        except Exception as error:
            self.recorder.log_failure(error, self.reader.ledger.current_work())
            raise
        finally:
            # The watchdog comes last: the storage of the last checkpoint may be what hangs.
            self._watchdog.beat("writing the last checkpoint", _LAST_CHECKPOINT_TIMEOUT_FACTOR)
            self._saver.close()
            self._watchdog.close()

    def _run(self) -> dict[str, Any] | None:
        config = self.config
        evaluated = -1
        patience = _FIRST_BLOCK_TIMEOUT_FACTOR
        if self.state.step == self.spec.held_step:
            self._hold(patience)
            patience = 1.0
        self.model_state.model.train()
        while self.state.step < config.optim.steps and not self._out_of_patience():
            self._watchdog.beat(f"training step {self.state.step + 1}", patience)
            patience = 1.0
            self.step()
            self._saver.poll()
            step, last = self.state.step, self.state.step == config.optim.steps
            if step % config.train.log_every == 0 or last or self._stopping:
                self.recorder.log_steps(self.state, self.last_norm, self.model_state, self.reader)
                self.reader.ledger.write()
            if step == self.spec.held_step:
                self._hold()
            best = False
            if step % config.eval.every == 0 or last:
                best = self._evaluate()
                evaluated = step
            due = step % config.train.checkpoint_every == 0 or last or self._out_of_patience()
            if best or due or self._stopping:
                self._save(best)
            if self._stopping and not last and not self._out_of_patience():
                self._finish_saving()
                self._log_event("stopped", why=self._stop.reason() if self.rank == 0 else "")
                return None
        if evaluated < 0 and self.state.best_step is None:
            self._save(self._evaluate())
        with self._watchdog.off():
            return self._finish()

    def _hold(self, patience: float = 1.0) -> None:
        """Read this rank's share of the held-out splits."""
        self._watchdog.beat("reading the held-out recordings", patience)
        self._held = {name: self.reader.hold(name) for name in self.spec.held_bins}
        self.reader.rejects.share()

    def step(self) -> None:
        """Run one optimizer step over all blocks of the plan's next step."""
        began, waited = time.perf_counter(), self.reader.waited
        result = self.steps.run(self.state)
        self.last_norm = result.norm
        self._stopping = self._stopping or result.sums.stop > 0
        self.state.step += 1
        self.state.bins_consumed = self.state.step * self.config.optim.bins_per_step
        self.state.epoch = epochs_done(self.spec.epoch_ends, self.state.bins_consumed)
        spent = time.perf_counter() - began
        self.state.seconds += spent
        self.recorder.add_step(result, spent, self.reader.waited - waited)
        if result.sums.rejected:
            self.reader.rejects.share()

    # -- evaluations and checkpoints -----------------------------------------------------------

    def _evaluate(self) -> bool:
        """Evaluate on dev and log it; return whether it is the best so far.

        While CTC trains alone the newest is the best: the figures of a language model that does not
        train yet say nothing, and are not compared with those after it has joined.
        """
        settings, state, dev = self.config.eval, self.state, self._held["dev"]
        with (
            self._watchdog.off(),
            self.recorder.watch.phase("evaluate", on_device=False),
            self.model_state.evaluating() as model,
        ):
            losses = dev.loss(model)
            errors, rows = dev.transcribe(
                model,
                self.template,
                self._decoding_at(state.step),
                settings.wer_utterances,
                self._scoring,
            )
            layers = self._layer_weights(model)
        shown = rows[: settings.examples]
        row = eval_row(
            state,
            losses,
            errors["all"],
            shown,
            count_cut(rows),
            self.spec.tasks,
            layers,
            by_language(spoken(rows)),
            score(spoken(rows), self._metrics),
            wer_alone(rows),
            count_decoders(rows),
            self._scoring.score(rows),
        )
        self.recorder.log_evaluation(row)
        if self._ctc_only(state.step):
            state.best_value, state.best_step = None, state.step
            return True
        if self._ctc_only(state.best_step or 0):
            state.best_value = None
        value = self._best_figure.value(row)
        if not self._best_figure.improves(value, state.best_value):
            state.evaluations_since_best += 1
            return False
        state.best_value, state.best_step = value, state.step
        state.evaluations_since_best = 0
        return True

    def _ctc_only(self, step: int) -> bool:
        """Tell whether CTC alone has trained in the steps up to this one."""
        return 0 < step <= self.config.optim.ctc_only_steps

    def _decoding_at(self, step: int) -> Decoding:
        """Choose who decodes after a step: CTC while it trains alone.

        The language model has not learnt to read soft tokens then, and would invent long texts.
        """
        if self._ctc_only(step):
            return Decoding("ctc", max_new_tokens=self.config.eval.max_new_tokens)
        return self._decoding

    def _layer_weights(self, model: OmniModel) -> dict[str, float]:
        """Return the mixing weight of each encoder layer; nothing if only one is used."""
        if model.mix is None:
            return {}
        weights = model.mix.logits.detach().float().softmax(0).tolist()
        return dict(zip(map(str, self.spec.encoder.layers), weights, strict=True))

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _save(self, best: bool) -> None:
        """Copy the state of training, and write it as a checkpoint in the background."""
        self.reader.rejects.share()
        self.reader.ledger.write()
        self.state.rejects = self.reader.rejects.counts
        self.state.totals = self.recorder.totals.to_dict()
        self.state.window = self.recorder.window.to_dict()
        with self.recorder.watch.phase("checkpoint", on_device=False):
            self._saver.save(self.model_state, self.state, best)

    def _finish_saving(self) -> None:
        """Wait until all checkpoints are written. A collective call."""
        with self._watchdog.off():
            self._saver.finish()

    # -- events, stop requests -----------------------------------------------------------------

    def _log_event(self, event: str, step: int | None = None, **facts: Any) -> None:
        self.recorder.log_event(event, self.state.step if step is None else step, **facts)

    def _log_stall(self, doing: str, seconds: float) -> None:
        self.recorder.log_stall(doing, seconds, self.reader.ledger.current_work())

    def _log_slow(self, doing: str, seconds: float) -> None:
        """Log where this rank stands, before other ranks give up waiting for it."""
        thread = self._watchdog.thread
        place, waits = place_of_thread(thread), waits_for_ranks(thread)
        with contextlib.suppress(OSError):
            write_stacks(self.run_dir, f"rank-{self.rank:04d}", doing)
        self.recorder.log_own_event(
            "slow",
            self.state.step + 1,
            reason=f"rank {self.rank}, {doing}: at {place} for {seconds:.0f} s",
            waits_for_ranks=waits,
        )

    def _stop_requested(self) -> bool:
        """Poll on rank 0 only: the sums of the step tell the other ranks."""
        return self.rank == 0 and self._stop.received()

    def _stop_timeout(self) -> float | None:
        """Return a shorter timeout for a rank that was asked to stop and waits for a block.

        None while it is training: a long step may finish.
        """
        since, grace = self.reader.waiting_since, self.config.run.grace_seconds
        if since is None or time.perf_counter() - since <= grace:
            return None
        return grace if self._stop.exists() else None

    # -- start and end -------------------------------------------------------------------------

    def _resume(self, node: str) -> None:
        """Start from the checkpoint that the driver chose; drop what was logged after it."""
        resume = self.spec.resume
        if resume is not None:
            found = read_checkpoint(resume.path)
            self.state = found.state
            self.state.fingerprints = self.spec.fingerprints
            self.model_state.load(found)
        self._name_best_metric()
        step, redone = self.state.step, 0
        if self.rank == 0:
            keep_lines(self.run_dir / "metrics.jsonl", lambda row: row.get("step", 0) <= step)
            # A kill may have come between writing a checkpoint and linking it.
            best = checkpoint_path(self.checkpoints, self.state.best_step or 0)
            if best.is_dir():
                set_link(self.checkpoints / "best", best)
            self.reader.rejects.rewind(step)
            redone = rewind_ledgers(self.run_dir, step)
        nodes = all_gather([node])
        plan = self.spec.fingerprints.get("plan")
        groups = describe_groups(self.model_state.optimizers)
        self._log_event(
            "attempt",
            workers=self.world,
            encoders=self.spec.encoders,
            steps_per_block=self.spec.steps_per_block,
            nodes=nodes,
            plan=plan,
            redone=redone,
            groups=groups,
        )
        barrier()
        self.reader.rejects.restore()
        self.recorder.restore(self.state)

    def _name_best_metric(self) -> None:
        """Say what chooses the best checkpoint: an error rate depends on the decoder."""
        figure = self._best_figure
        metric, before = figure.measured(str(self._decoding)), figure.measured("lm")
        if (measured := self.state.measure_best(metric, before)) is not None:
            reason = f"the one so far has the best {measured}; chosen from now on by {metric}"
            self._log_event("best", reason=reason)

    def _finish(self) -> dict[str, Any]:
        """Score the best weights on all of dev and test, and write the summary."""
        self._finish_saving()
        best = self._best()
        self.model_state.load_best(best)
        results: dict[str, Any] = {}
        languages: dict[str, Any] = {}
        with self.model_state.evaluating() as model:
            losses = self._held["dev"].loss(model)
            for name, split in self._held.items():
                errors, rows = split.transcribe(
                    model,
                    self.template,
                    self._decoding_at(best.state.step),
                    scoring=self._scoring,
                )
                for part, suffix in (("all", ""), ("short", "_short"), ("long", "_long")):
                    results[f"{name}_wer{suffix}"] = errors[part].wer
                results[f"{name}_cer"] = errors["all"].cer
                for decoder, wer in wer_alone(rows).items():
                    results[f"{name}_{decoder}_wer"] = wer
                results[f"{name}_decoders"] = count_decoders(rows)
                results[f"{name}_cut"] = count_cut(rows)
                if rates := by_language(spoken(rows)):
                    languages[name] = rates
                if self._metrics:
                    results[f"{name}_metrics"] = score(spoken(rows), self._metrics)
                if scores := self._scoring.score(rows):
                    results[f"{name}_scores"] = scores
                if self.rank == 0:
                    path = self.run_dir / f"transcripts-{name}.jsonl"
                    remove_lines(path)
                    append_json(path, [without_counts(row) for row in rows])
        summary = self.recorder.summarize(
            self.state,
            {
                "best_step": best.state.step,
                "dev_loss": losses.loss,
                "dev_accuracy": losses.accuracy,
                "shuffled_audio_gap": losses.gap,
                **({"dev_tasks": by_task} if (by_task := losses.by_task(self.spec.tasks)) else {}),
                "test_wer": None,
                **results,
                **({"languages": languages} if languages else {}),
            },
            {
                "rejects": self.reader.rejects.counts,
                **({"notes": notes} if (notes := self.reader.rejects.notes) else {}),
                "workers": self.world,
                "parameters": sum(p.numel() for p in self.model_state.model.parameters()),
            },
        )
        self._log_event("finished")
        return summary

    def _best(self) -> Checkpoint:
        """Read the best checkpoint, or the newest valid one if the best has been damaged since.

        A collective call: rank 0 verifies and chooses, so the weights are hashed once.
        """
        [path] = all_gather([self._choose_best()] if self.rank == 0 else [])
        if path is None:
            raise CheckpointError(f"{self.checkpoints}: no checkpoint passes verification")
        return read_checkpoint(path)

    def _choose_best(self) -> StoragePath | None:
        best = self.checkpoints / "best"
        try:
            read_checkpoint(best, verify=True)
            return best
        except CheckpointError as error:
            self._log_event("damaged checkpoint", reason=str(error))
        newest, _ = find_resume_point(self.run_dir)
        return None if newest is None else newest.path
