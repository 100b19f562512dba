"""The training loop of one rank: blocks of the stream in, a trained model and its metrics out.

Knows nothing of Ray: it takes an iterator of blocks and, with more than one rank, the process group
that is already up. All randomness of a block comes from (seed, step, place of the block in the
step), so the curve does not depend on the world size, and a resumed run repeats it bit for bit.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from omni.checkpoint.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from omni.checkpoint.resume import find_resume_point
from omni.checkpoint.retention import checkpoint_path, set_link
from omni.checkpoint.save import save_checkpoint
from omni.checkpoint.train_state import TrainState
from omni.checkpoint.writer import Saver
from omni.cluster.watchdog import Watchdog
from omni.inference.decode_batch import by_language
from omni.metrics.rows import eval_row
from omni.metrics.run_files import append_json, keep_lines, remove_lines
from omni.model.chat_template import Template
from omni.model.speech_lm import OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.plan import epochs_done
from omni.storage.path import StoragePath
from omni.train.batches import Feed
from omni.train.distributed import all_gather, barrier
from omni.train.evaluation import HeldOut, Layout
from omni.train.model_state import Trained
from omni.train.recorder import Books, Publisher
from omni.train.step import Steps
from omni.train.stop_request import StopRequest
from omni.train.worker_spec import WorkerSpec

_FIRST_BLOCK_PATIENCE = 3.0  # the stream starts, actors load the encoder


class TrainLoop:
    """blocks: this rank's share of the stream. node: where the rank runs, for the books.
    publisher: who else hears what is logged.
    """

    def __init__(
        self,
        job: WorkerSpec,
        blocks: Iterator[pa.Table],
        rank: int,
        world: int,
        device: torch.device,
        node: str = "",
        publisher: Publisher | None = None,
    ) -> None:
        self.job, self.config = job, job.config
        self.rank, self.world = rank, world
        self.run_dir = job.config.run_dir
        self.checkpoints = self.run_dir / "checkpoints"
        self.template = Template(SpeechTokenizer.from_json(job.tokenizer_json), job.template)
        layout = Layout.of(job.config, job.model)
        self.books = Books(job, rank, world, device, publisher)
        self.feed = Feed(job, blocks, layout, rank, world, device, self.books.watch)
        self.trained = Trained(
            job.config, job.model, device, world, tasks=job.tasks, end=self.template.end
        )
        self.state = TrainState(fingerprints=job.fingerprints)
        self.last_norm = 0.0
        self._stop = StopRequest(self.run_dir)
        self._stopping = False
        self.steps = Steps(
            job.config, self.trained, self.feed, self._asked_to_stop, self._event, self.books.watch
        )
        self._resume(node)

    # -- the run, top down ---------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the end of the plan (or until patience runs out); returns the summary.

        None when it was asked to stop: then the newest checkpoint is of this very step.
        """
        config = self.config
        self._watchdog = Watchdog(config.train.timeout_seconds, self._stalled, self._hurry)
        self._saver = Saver(self.checkpoints, config.train.keep_checkpoints, self._unsaved)
        try:
            return self._run()
        except Exception as error:
            self.books.failed(error, self.feed)
            raise
        finally:
            self._watchdog.close()
            self._saver.close()

    def _run(self) -> dict[str, Any] | None:
        config = self.config
        self._watchdog.beat("waiting for the first block", _FIRST_BLOCK_PATIENCE)
        held = {name: self.feed.hold(name, rows) for name, rows in self.job.held_rows.items()}
        dev = held["dev"]
        self.feed.share_rejects()
        evaluated = -1
        self.trained.model.train()
        while self.state.step < config.optim.steps and not self._out_of_patience():
            self._watchdog.beat(f"training step {self.state.step + 1}")
            self.step()
            step, last = self.state.step, self.state.step == config.optim.steps
            if step % config.train.log_every == 0 or last or self._stopping:
                self.books.log(self.state, self.last_norm, self.trained, self.feed)
            best = False
            if step % config.eval.every == 0 or last:
                best = self._evaluate(dev)
                evaluated = step
            due = step % config.train.checkpoint_every == 0 or last or self._out_of_patience()
            if best or due or self._stopping:
                self._save(best)
            if self._stopping and not last and not self._out_of_patience():
                self._finish_saving()
                self._event("stopped", why=self._stop.why() if self.rank == 0 else "")
                return None
        if evaluated < 0 and self.state.best_step is None:
            self._save(self._evaluate(dev))
        with self._watchdog.off():
            return self._finish(held)

    def step(self) -> None:
        """One optimizer step over all blocks of the plan's next step."""
        began, waited = time.perf_counter(), self.feed.waited
        done = self.steps.take(self.state)
        self.last_norm = done.norm
        self._stopping = self._stopping or done.sums.stop > 0
        self.state.step += 1
        self.state.bins_consumed = self.state.step * self.config.optim.bins_per_step
        self.state.epoch = epochs_done(self.job.epoch_ends, self.state.bins_consumed)
        spent = time.perf_counter() - began
        self.state.seconds += spent
        self.books.count(done, spent, self.feed.waited - waited)
        if done.sums.rejected:
            self.feed.share_rejects()

    # -- evaluations and checkpoints -----------------------------------------------------------

    def _evaluate(self, dev: HeldOut) -> bool:
        """Measure on dev and log it; True when it is the best so far."""
        settings, state = self.config.eval, self.state
        with (
            self._watchdog.off(),
            self.books.watch.phase("evaluate", on_device=False),
            self.trained.evaluating() as model,
        ):
            losses = dev.loss(model)
            errors, rows = dev.transcribe(model, self.template, settings.wer_utterances)
            layers = self._layer_weights(model)
        shown = rows[: settings.examples]
        entry = eval_row(
            state, losses, errors["all"], shown, self.job.tasks, layers, by_language(rows)
        )
        self.books.evaluated(entry)
        value: float | None = getattr(entry, settings.best)
        if (
            value is None
            or not math.isfinite(value)
            or (state.best_value is not None and value >= state.best_value)
        ):
            state.evaluations_since_best += 1
            return False
        state.best_value, state.best_step = value, state.step
        state.evaluations_since_best = 0
        return True

    def _layer_weights(self, model: OmniModel) -> dict[str, float]:
        """What the encoder's layers are mixed with; nothing where there is one."""
        if model.mix is None:
            return {}
        weights = model.mix.logits.detach().float().softmax(0).tolist()
        return dict(zip(map(str, self.job.encoder.layers), weights, strict=True))

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _save(self, best: bool) -> None:
        """Copy everything a checkpoint holds, and have it written while training goes on."""
        self.feed.write_ledger()
        self.state.rejects = self.feed.reject_counts
        # Gathers shards, and meets all ranks: their ledgers are on disk before a checkpoint says
        # that these steps are done.
        with self.books.watch.phase("checkpoint", on_device=False):
            weights, optimizer = self.trained.snapshot(keep=self.rank == 0)
            barrier()
        if self.rank:
            return
        write = functools.partial(
            save_checkpoint,
            self.checkpoints,
            state=copy.deepcopy(self.state),
            model=self.job.model,
            encoder=self.job.encoder.to_dict(),
            weights=weights,
            optimizer=optimizer,
            config_yaml=self.config.to_yaml(),
            tokenizer_json=self.job.tokenizer_json,
        )
        self._saver.save(self.state.step, write, best)

    def _finish_saving(self) -> None:
        """Until what was saved lies in storage, for all ranks."""
        with self._watchdog.off():
            if self.rank == 0:
                self._saver.wait()
            barrier()

    def _event(self, event: str, step: int | None = None, **facts: Any) -> None:
        self.books.event(event, self.state.step if step is None else step, **facts)

    def _asked_to_stop(self) -> bool:
        """Rank 0 looks, the sums of the step tell all."""
        return self.rank == 0 and self._stop.asked()

    def _hurry(self) -> float | None:
        """A rank that was asked to stop, and gets no block to finish its step, does not wait; one
        that is at work on a long step is left alone.
        """
        since, grace = self.feed.waiting_since, self.config.run.grace_seconds
        if since is None or time.perf_counter() - since <= grace:
            return None
        return grace if self._stop.exists() else None

    def _stalled(self, doing: str, seconds: float) -> None:
        self.books.stalled(doing, seconds, self.feed)

    def _unsaved(self, step: int, reason: str) -> None:
        self.books.own_event("checkpoint failed", step, reason=reason)

    def _resume(self, node: str) -> None:
        """Start from the checkpoint that the driver chose; drop what was logged after it."""
        resume = self.job.resume
        if resume is not None:
            found = read_checkpoint(resume.path)
            self.state = found.state
            self.state.fingerprints = self.job.fingerprints
            self.trained.load(found)
        step = self.state.step
        if self.rank == 0:
            metrics = self.run_dir / "metrics.jsonl"
            keep_lines(metrics, lambda row: row.get("step", 0) <= step)
            # A kill may have come between writing a checkpoint and linking it.
            best = checkpoint_path(self.checkpoints, self.state.best_step or 0)
            if best.is_dir():
                set_link(self.checkpoints / "best", best)
        redone = self.feed.rewind(step, self.state.rejects)
        nodes = all_gather([node])
        plan = self.job.fingerprints.get("plan")
        self._event("attempt", workers=self.world, nodes=nodes, plan=plan, redone=redone)
        barrier()
        self.feed.recall_rejects()
        self.books.recall()

    def _best(self) -> Checkpoint:
        """Read the best checkpoint, or the newest valid one if the best has been damaged since.

        A collective call: rank 0 verifies and chooses, so the weights are hashed once.
        """
        [path] = all_gather([self._choose_best()] if self.rank == 0 else [])
        if path is None:
            raise CheckpointError(f"{self.checkpoints}: no checkpoint passes verification")
        return read_checkpoint(path)

    def _choose_best(self) -> StoragePath | None:
        try:
            read_checkpoint(self.checkpoints / "best", verify=True)
            return self.checkpoints / "best"
        except CheckpointError as error:
            self._event("damaged checkpoint", reason=str(error))
        newest, _ = find_resume_point(self.run_dir)
        return None if newest is None else newest.path

    def _finish(self, held: dict[str, HeldOut]) -> dict[str, Any]:
        """Score the best weights on all of dev and test, and write the summary."""
        self._finish_saving()
        best = self._best()
        self.trained.load_best(best.weights())
        results: dict[str, Any] = {}
        languages: dict[str, Any] = {}  # by split
        with self.trained.evaluating() as model:
            losses = held["dev"].loss(model)
            for name, split in held.items():
                errors, rows = split.transcribe(model, self.template)
                for part, suffix in (("all", ""), ("short", "_short"), ("long", "_long")):
                    results[f"{name}_wer{suffix}"] = errors[part].wer
                results[f"{name}_cer"] = errors["all"].cer
                if rates := by_language(rows):
                    languages[name] = rates
                if self.rank == 0:
                    lines = [{k: v for k, v in row.items() if k != "errors"} for row in rows]
                    path = self.run_dir / f"transcripts-{name}.jsonl"
                    remove_lines(path)
                    append_json(path, lines)
        summary = self.books.summarize(
            self.state,
            {
                "best_step": best.state.step,
                "dev_loss": losses.loss,
                "dev_accuracy": losses.accuracy,
                "shuffled_audio_gap": losses.gap,
                "test_wer": None,
                **results,
                **({"languages": languages} if languages else {}),
            },
            {
                "rejects": self.feed.reject_counts,
                "workers": self.world,
                "parameters": sum(p.numel() for p in self.trained.model.parameters()),
            },
        )
        self._event("finished")
        return summary
