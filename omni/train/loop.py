"""The training loop of one rank: blocks of the stream in, a trained model and its metrics out.

Knows nothing of Ray: it takes an iterator of blocks and, with more than one rank, the process group
that is already up. All randomness of a block comes from (seed, step, place of the block in the
step), so the curve does not depend on the world size, and a resumed run repeats it bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from omni.data.features import more_room
from omni.data.plan import epochs_done
from omni.model.omni import LossSums, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.train.checkpoint import (
    TrainState,
    newest_checkpoint,
    point,
    prune,
    read_state,
    save_checkpoint,
)
from omni.train.evaluation import HeldOut, Layout, all_sum
from omni.train.feed import Feed, Microbatch
from omni.train.job import Job
from omni.train.metrics import append_json, keep_lines, read_json_lines, write_json
from omni.train.optim import (
    WeightAverage,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    schedule,
    set_rates,
    trainable,
)


@dataclass
class Window:
    """Sums over the steps since the last log line, over all ranks."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(9, dtype=torch.float64))
    busy: float = 0.0  # seconds of steps; evaluation and checkpoints are not counted
    wait: float = 0.0  # seconds of them without a block


# Fields of the sums that ranks add up at each step.
LOSS, TOKENS, CORRECT, CTC, UTTERANCES, SAMPLES, ENCODE_SECONDS, ENCODED, REJECTED = range(9)


class TrainLoop:
    def __init__(
        self, job: Job, blocks: Iterator[pa.Table], rank: int, world: int, device: torch.device
    ) -> None:
        self.job, self.config = job, job.config
        self.rank, self.world, self.device = rank, world, device
        self.run_dir = job.config.run_dir
        self.checkpoints = self.run_dir / "checkpoints"
        self.tokenizer = SpeechTokenizer.from_json(job.tokenizer_json)
        layout = Layout(
            job.config.optim.bin_positions,
            job.model.stack,
            job.model.feature_dim,
            self.tokenizer.bos,
            self.tokenizer.end,
        )
        self.feed = Feed(job, blocks, layout, rank, world, device)
        self.model = OmniModel(job.model)
        self.model.init_weights(job.config.run.seed)
        for part in ("projector", "lm"):
            getattr(self.model, part).requires_grad_(part in job.config.model.train)
        self.model.to(device)
        self.optimizers = make_optimizers(self.model, job.config.optim)
        self.average = (
            WeightAverage(self.model, job.config.optim.ema) if job.config.optim.ema else None
        )
        self.state = TrainState(fingerprints=job.fingerprints)
        self.last_norm = 0.0
        self._said_full = False
        self.last_train: dict[str, Any] = {}
        self._resume()
        self.wrapped: nn.Module = self.model
        if world > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.window = Window()
        self.totals = Window()

    # -- the run, top down ---------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end of the plan (or until patience runs out); returns the summary."""
        held = {name: self.feed.hold(name, rows) for name, rows in self.job.held_rows.items()}
        dev = held["dev"]
        self.feed.share_rejects()
        config = self.config
        evaluated = -1
        self.model.train()
        while self.state.step < config.optim.steps and not self._out_of_patience():
            self.step()
            step, last = self.state.step, self.state.step == config.optim.steps
            if step % config.train.log_every == 0 or last:
                self._log()
            best = False
            if step % config.eval.every == 0 or last:
                best = self._evaluate(dev)
                evaluated = step
            if best or step % config.train.checkpoint_every == 0 or last or self._out_of_patience():
                self._save(best)
        if evaluated < 0 and self.state.best_step is None:
            self._save(self._evaluate(dev))
        return self._finish(held)

    def step(self) -> None:
        """One optimizer step over all blocks of the plan's next step."""
        began, waited = time.perf_counter(), self.feed.waited
        step = self.state.step
        micro = list(self.feed.microbatches(step))
        sums = torch.zeros(9, dtype=torch.float64)
        measured = []  # stays on the device: reading it there would wait for every microbatch
        for number, part in enumerate(micro):
            torch.manual_seed(_mix(self.config.run.seed, step, part.place))
            last = number == len(micro) - 1
            sync = contextlib.nullcontext() if last or self.world == 1 else self.wrapped.no_sync()  # type: ignore[operator]
            with sync:
                measured.append(self._backward(part))
            sums[UTTERANCES:] += torch.tensor(part.counts, dtype=torch.float64)
        sums[:UTTERANCES] = torch.stack(measured).sum(dim=0).cpu()
        sums = all_sum(sums)
        self._apply(float(sums[TOKENS]))
        self.state.step += 1
        self.state.bins_consumed = self.state.step * self.config.optim.bins_per_step
        self.state.epoch = epochs_done(self.job.epoch_ends, self.state.bins_consumed)
        spent = time.perf_counter() - began
        self.state.seconds += spent
        for window in (self.window, self.totals):
            window.sums += sums
            window.busy += spent
            window.wait += self.feed.waited - waited
        if sums[REJECTED]:
            self.feed.share_rejects()

    def _backward(self, part: Microbatch) -> Tensor:
        """Forward and backward of one microbatch; gradients of sums, divided later."""
        with self._autocast():
            out: LossSums = self.wrapped(part.batch)
            (out.loss + self.config.optim.ctc_weight * out.ctc).backward()
        sums = (out.loss, out.tokens, out.correct, out.ctc)
        return torch.stack([x.detach().double() for x in sums])

    def _apply(self, tokens: float) -> None:
        """Divide the summed gradients by the global token count, clip, and update."""
        set_rates(self.optimizers, schedule(self.state.step, self.config.optim))
        parameters = list(trainable(self.model).values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        # DDP averages over ranks; the loss is a sum over all of them.
        torch._foreach_mul_(gradients, self.world / max(tokens, 1.0))
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)
        self.last_norm = float(norm)
        if not math.isfinite(self.last_norm):
            raise FloatingPointError(
                f"step {self.state.step}: the gradient norm is {self.last_norm}; "
                "try a lower optim.lr or a longer optim.warmup_steps"
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, self.state.step)

    # -- what is written -----------------------------------------------------------------------

    def _log(self) -> None:
        window, state = self.window, self.state
        sums = window.sums.tolist()
        rate = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        self.last_train = {
            "kind": "train",
            "step": state.step,
            "steps": self.config.optim.steps,
            "epoch": round(state.epoch, 4),
            "seconds": round(state.seconds, 2),
            "loss": sums[LOSS] / max(sums[TOKENS], 1),
            "accuracy": sums[CORRECT] / max(sums[TOKENS], 1),
            "ctc": sums[CTC] / max(sums[TOKENS], 1),
            "lr": rate,
            "grad_norm": self.last_norm,
            "bins": state.bins_consumed,
            "utterances": int(sums[UTTERANCES]),
            "audio_seconds_per_second": sums[SAMPLES] / 16_000 / window.busy,
            "tokens_per_second": sums[TOKENS] / window.busy,
            "data_wait_fraction": min(1.0, window.wait / window.busy),
            "encode_seconds": sums[ENCODE_SECONDS],  # of all actors, for the audio of these steps
            "encoded_audio_seconds": sums[ENCODED] / 16_000,
            "step_seconds": window.busy,
        }
        if self.rank == 0:
            append_json(self.run_dir / "metrics.jsonl", [self.last_train])
        self._note_full_cache()
        self.feed.write_ledger()
        self.window = Window()

    def _note_full_cache(self) -> None:
        """Say once that later epochs will encode again."""
        why = self.feed.cache_full
        if why is None or self._said_full or self.rank:
            return
        self._said_full = True
        note = (
            f"the feature cache is full ({why}): what it lacks is encoded again in every epoch; "
            f"{more_room(self.config.encoder.format)}"
        )
        row = {"kind": "note", "step": self.state.step, "text": note}
        append_json(self.run_dir / "metrics.jsonl", [row])

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Averaged weights, eval mode, autocast."""
        self.model.eval()
        if self.average is not None:
            self.average.swap(self.model)
        try:
            with self._autocast():
                yield
        finally:
            if self.average is not None:
                self.average.swap(self.model)
            self.model.train()

    def _evaluate(self, dev: HeldOut) -> bool:
        """Measure on dev and log it; True when it is the best so far."""
        settings, state = self.config.eval, self.state
        with self._evaluating():
            losses = dev.loss(self.model)
            errors, rows = dev.transcribe(self.model, self.tokenizer, settings.wer_utterances)
        entry: dict[str, Any] = {
            "kind": "eval",
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "seconds": round(state.seconds, 2),
            "dev_loss": losses["loss"],
            "dev_accuracy": losses["accuracy"],
            "shuffled_audio_gap": losses["gap"],
            "dev_wer": errors["all"].wer,
            "dev_cer": errors["all"].cer,
            "examples": [
                {name: row[name] for name in ("id", "reference", "hypothesis")}
                for row in rows[: settings.examples]
            ],
        }
        if self.rank == 0:
            append_json(self.run_dir / "metrics.jsonl", [entry])
        value = entry[settings.best]
        if value is None or (state.best_value is not None and value >= state.best_value):
            state.evaluations_since_best += 1
            return False
        state.best_value, state.best_step = value, state.step
        state.evaluations_since_best = 0
        return True

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _save(self, best: bool) -> None:
        self.feed.write_ledger()
        self.state.rejects = self.feed.reject_counts
        if self.rank:
            return
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        optimizer = dict(optimizer_tensors(self.optimizers, self.model))
        if self.average is not None:
            optimizer |= {f"raw/{name}": weights[name] for name in self.average.weights}
            weights |= self.average.weights
        path = save_checkpoint(
            self.checkpoints,
            state=self.state,
            model=self.job.model,
            encoder=self.job.encoder,
            weights=weights,
            optimizer=optimizer,
            config_yaml=self.config.to_yaml(),
            tokenizer_json=self.job.tokenizer_json,
        )
        if best:
            point(self.checkpoints / "best", path)
        prune(self.checkpoints, self.config.train.keep_checkpoints)

    def _resume(self) -> None:
        """Continue from the newest whole checkpoint, and forget what was logged after it."""
        path = newest_checkpoint(self.checkpoints)
        if path is not None:
            found = read_state(path)
            self.state = found.state
            tensors = found.optimizer()
            weights = found.weights()
            if self.average is not None:
                for name in self.average.weights:
                    self.average.weights[name].copy_(weights[name])
                    weights[name] = tensors.pop(f"raw/{name}")
            self._load(weights)
            load_optimizer_tensors(self.optimizers, self.model, tensors)
        step = self.state.step
        if self.rank == 0:
            keep_lines(self.run_dir / "metrics.jsonl", lambda row: row["step"] <= step)
            # A kill may have come between a checkpoint and its name.
            best = self.checkpoints / f"step-{self.state.best_step or 0:06d}"
            if best.is_dir():
                point(self.checkpoints / "best", best)
        self.feed.rewind(step, self.state.rejects)
        if dist.is_initialized():
            dist.barrier()
        self.feed.recall_rejects()
        for row in read_json_lines(self.run_dir / "metrics.jsonl"):
            if row["kind"] == "train":
                self.last_train = row

    def _finish(self, held: dict[str, HeldOut]) -> dict[str, Any]:
        """Score the best weights on all of dev and test, and write the summary."""
        if dist.is_initialized():
            dist.barrier()  # rank 0 has written the best checkpoint
        best = read_state(self.checkpoints / "best")
        self.average = None
        self._load(best.weights())
        results: dict[str, Any] = {}
        with self._evaluating():
            losses = held["dev"].loss(self.model)
            for name, split in held.items():
                errors, rows = split.transcribe(self.model, self.tokenizer)
                for part, suffix in (("all", ""), ("short", "_short"), ("long", "_long")):
                    results[f"{name}_wer{suffix}"] = errors[part].wer
                results[f"{name}_cer"] = errors["all"].cer
                if self.rank == 0:
                    lines = [{k: v for k, v in row.items() if k != "errors"} for row in rows]
                    path = self.run_dir / f"transcripts-{name}.jsonl"
                    path.unlink(missing_ok=True)
                    append_json(path, lines)
        totals = self.totals.sums.tolist()
        busy, encode = max(self.totals.busy, 1e-9), totals[ENCODE_SECONDS]
        summary = {
            "steps": self.state.step,
            "best_step": best.state.step,
            "epochs": round(self.state.epoch, 3),
            "train_loss": self.last_train.get("loss"),
            "dev_loss": losses["loss"],
            "dev_accuracy": losses["accuracy"],
            "shuffled_audio_gap": losses["gap"],
            "test_wer": None,
            **results,
            "audio_seconds_per_second": totals[SAMPLES] / 16_000 / busy,
            "tokens_per_second": totals[TOKENS] / busy,
            "data_wait_fraction": min(1.0, self.totals.wait / busy),
            "encoder_audio_seconds_per_second": (
                totals[ENCODED] / 16_000 / encode if totals[ENCODED] else None
            ),
            "cached_fraction": 1 - totals[ENCODED] / totals[SAMPLES] if totals[SAMPLES] else None,
            "train_seconds": round(self.state.seconds, 1),
            "rejects": self.feed.reject_counts,
            "workers": self.world,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        if self.rank == 0:
            write_json(self.run_dir / "summary.json", summary)
        return summary

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    # -- small things --------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        enabled = self.config.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
