"""Compare omni with a careful training loop for such a model, on the same corpus and models.

`Peer` is that loop in one process, on the GPU where the config trains on one: a torch DataLoader
decodes clips and computes log-mels of their length, batches hold utterances of similar lengths, and
the frozen encoder runs inline in every epoch. With `trim=False` every clip is padded to 30 s and
batches are in random order, as half of the field does it. Objective (cross-entropy), optimizer,
precision and mean batch size are omni's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from omni.audio.decode import AudioSpan, decode
from omni.audio.windows import SAMPLING_RATE
from omni.bench.baselines import (
    PaddedBatch,
    budget_for,
    encode_trimmed,
    length_batches,
    reference_encoder,
)
from omni.bench.prepared_run import in_temporary_storage, progress
from omni.bench.process_tree import ProcessTree
from omni.bench.timing import Result, describe_machine, median
from omni.bench.whole_run import JobRun, for_timing, run_job, steps_of_epochs
from omni.config import Config
from omni.model.batch import Batch
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniModel
from omni.run.prepare import Prepared, prepare
from omni.stream.codec import DTYPES
from omni.stream.collate import Utterance
from omni.train.evaluation import Layout
from omni.train.optim import make_optimizers, set_rates, trainable

_SLICE_SECONDS = {"cpu": 50.0, "cuda": 10.0}
_TRIAL_SECONDS = {"cpu": 10.0, "cuda": 4.0}
_ROUNDS = 2


def bench_peer(config: Config) -> Result:
    """Run the `peer` suite: alternate two epochs of omni with a time slice of each peer.

    A slice is enough, since a peer does the same work in each epoch.
    """
    optim = config.optim.model_copy(update={"ctc_weight": 0.0})
    config = config.model_copy(update={"optim": optim})
    device = torch.device("cuda" if config.train.gpus else "cpu")
    result = Result("peer", describe_machine(device, config.train.threads))
    with in_temporary_storage(config) as inside:
        steps = steps_of_epochs(inside, 2)[1]
        timed = for_timing(inside, steps)
        prepared = prepare(timed)
        peers = {"best": Peer(prepared), "30s_padding": Peer(prepared, trim=False)}
        for name, peer in peers.items():
            progress(f"the peer ({name}) chooses its threads and DataLoader workers")
            peer.choose_processes()
        rates: dict[str, list[Rate]] = {name: [] for name in ("omni", "with start", *peers)}
        for turn in range(_ROUNDS):
            for name, peer in peers.items():
                progress(f"round {turn + 1} of {_ROUNDS}: the peer ({name})")
                rates[name].append(peer.rate(_SLICE_SECONDS[device.type]))
            progress(f"round {turn + 1} of {_ROUNDS}: omni for {steps} steps, two epochs")
            job: JobRun = run_job(timed)
            total = job.over(0, steps)
            count = total["utterances"]
            rates["omni"].append(Rate(count / total["seconds"], job.samples_per_cpu_second))
            rates["with start"].append(Rate(count / job.wall_seconds, count / job.cpu_seconds))
        # Losses are compared last, when the audio affects them.
        result.ratio["peer.loss_difference"] = peers["30s_padding"].difference_to_omni()
    best, habit = peers["best"], peers["30s_padding"]
    result.notes.append(
        f"{prepared.splits['train'].rows} utterances, {steps} steps of "
        f"{best.batch_size} of them on average; the peers have {best.threads} and {habit.threads} "
        f"threads and {best.workers} and {habit.workers} DataLoader workers, the fastest of those "
        "tried; omni one thread per process"
    )
    for name, title, note in (
        ("best", "peer", "real length, batches of similar lengths, encoder inline"),
        ("30s_padding", "peer, 30 s padding", "random order, encoder inline"),
        ("omni", "omni", "two epochs, from first to last step"),
        ("with start", "omni", "with Ray's start and the scoring"),
    ):
        result.add(title, median([rate.wall for rate in rates[name]]), "samples/s", note)
        result.add(title, median([rate.cpu for rate in rates[name]]), "samples/CPU-s", note)
    for name, end in (("omni", ""), ("with start", "_with_start")):
        for peer_name in peers:
            pairs = list(zip(rates[name], rates[peer_name], strict=True))
            key = f"peer.vs_{peer_name}"
            result.ratio[key + end] = median([ours.wall / theirs.wall for ours, theirs in pairs])
            ratio = median([ours.cpu / theirs.cpu for ours, theirs in pairs])
            result.ratio[f"{key}_cpu{end}"] = ratio
    return result


@dataclass(frozen=True)
class Rate:
    """Samples per second of wall time, and per second of CPU time of all processes."""

    wall: float
    cpu: float


class Peer:
    """Train with the loop that the module docstring describes."""

    def __init__(self, prepared: Prepared, *, trim: bool = True) -> None:
        self._config, self._prepared, self._trim = prepared.config, prepared, trim
        train = prepared.splits["train"]
        self._device = torch.device("cuda" if self._config.train.gpus else "cpu")
        self.threads, self.workers = os.cpu_count() or 1, 1
        self.batch_size = round(len(train.beginning.members) / train.beginning.steps)
        encoder = self._config.encoder
        # A CPU without bf16 instructions computes faster in fp32, as omni does there.
        dtype = compute_dtype(DTYPES[encoder.dtype], self._device)
        self._encoder = reference_encoder(encoder.weights, dtype, self._device)
        self._model = OmniModel(prepared.model)
        self._model.init_weights(self._config.run.seed)
        self._model.to(self._device)
        self._optimizers = make_optimizers(self._model, self._config.optim)
        self._rows = _Clips(train.table.to_pylist(), self._encoder.config.num_mel_bins, trim)
        self._steps = 0
        self._batches = self._endless_batches()

    def choose_processes(self) -> None:
        """Keep the fastest of a few numbers of threads and DataLoader workers.

        On a CPU the threads train, and one worker feeds them; on a GPU the workers need the cores.
        """
        cores = os.cpu_count() or 1
        if self._device.type == "cuda":
            choices = [(1, workers) for workers in sorted({max(1, cores // 2), cores})]
        else:
            choices = [(threads, 1) for threads in sorted({max(1, cores - 1), cores})]
        tried: dict[tuple[int, int], float] = {}
        for self.threads, self.workers in choices:
            self._batches = self._endless_batches()
            tried[self.threads, self.workers] = self.rate(_TRIAL_SECONDS[self._device.type]).wall
        self.threads, self.workers = max(tried, key=lambda choice: tried[choice])
        self._batches = self._endless_batches()

    def rate(self, seconds: float) -> Rate:
        """Measure at least `seconds` of training, after one step to warm up."""
        torch.set_num_threads(self.threads)
        self._step()
        tree = ProcessTree(os.getpid())
        used, began, samples = tree.cpu_seconds(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            samples += self._step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        return Rate(samples / taken, samples / (tree.cpu_seconds() - used))

    def difference_to_omni(self) -> float:
        """Compute the relative difference between the peer's loss and omni's on six utterances.

        omni packs them and encodes in `full` mode with the same weights, so a large difference
        means that the two do not do the same work.
        """
        torch.set_num_threads(self.threads)
        rows = [self._rows[n] for n in range(6)]
        self._model.eval()
        with torch.inference_mode(), self._autocast():
            theirs = self._model(self._batch(rows))
            e = self._config.encoder
            ours = WhisperEncoder(
                e.weights, mode="full", dtype=DTYPES[e.dtype], device=self._device
            )
            features = ours.encode([row["audio"] for row in rows])
            packed = self._model(self._collate(rows, features, packed=True))
        self._model.train()
        return abs(float(theirs.loss / theirs.tokens) / float(packed.loss / packed.tokens) - 1)

    def _autocast(self) -> torch.autocast:
        enabled = compute_dtype(torch.bfloat16, self._device) == torch.bfloat16
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _step(self) -> int:
        rows = next(self._batches)
        with self._autocast():
            out = self._model(self._batch(rows))
            loss = out.loss / out.tokens
        loss.backward()
        set_rates(self._optimizers, self._steps, self._config.optim)
        nn.utils.clip_grad_norm_(list(trainable(self._model).values()), self._config.optim.clip)
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return len(rows)

    def _endless_batches(self) -> Iterator[list[dict[str, Any]]]:
        loader = DataLoader(
            self._rows,
            batch_sampler=_Epochs(self._epoch, self._config.run.seed),
            num_workers=self.workers,
            persistent_workers=True,
            collate_fn=list,
        )
        while True:
            yield from loader

    def _epoch(self, generator: torch.Generator) -> list[list[int]]:
        """Draw the batches of an epoch: of similar lengths, or in random order."""
        count = len(self._rows)
        if not self._trim:
            order = torch.randperm(count, generator=generator).tolist()
            return [order[n : n + self.batch_size] for n in range(0, count, self.batch_size)]
        lengths = self._rows.lengths
        batches = length_batches(lengths, budget_for(lengths, -(-count // self.batch_size)))
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]

    def _batch(self, rows: list[dict[str, Any]]) -> Batch:
        with torch.inference_mode():
            if self._trim:
                features = encode_trimmed(self._encoder, [row["mel"] for row in rows])
            else:
                mels = torch.stack([row["mel"] for row in rows])
                mels = mels.to(self._device, self._encoder.dtype)
                features = list(self._encoder(mels).last_hidden_state)
            features = [feature.clone() for feature in features]
        return self._collate(rows, features, packed=False)

    def _collate(self, rows: list[dict[str, Any]], features: list[Tensor], packed: bool) -> Batch:
        members = [
            Utterance([f], row["tokens"], row["supervised"])
            for f, row in zip(features, rows, strict=True)
        ]
        layout = Layout.of(self._config, self._prepared.model)
        lengths = [layout.length(member) for member in members]
        positions = sum(lengths) if packed else max(lengths)
        rows_of = [members] if packed else [[member] for member in members]
        batch = replace(layout, positions=positions).batch(rows_of).to(self._device)
        return batch if packed else PaddedBatch.of(batch)


class _Epochs(Sampler[list[int]]):
    """Draw the batches of a new epoch each time that they are asked for."""

    def __init__(self, draw: Callable[[torch.Generator], list[list[int]]], seed: int) -> None:
        self._draw, self._generator = draw, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._draw(self._generator))


class _Clips(Dataset[dict[str, Any]]):
    """Load rows of the index with their audio and its log-mel by transformers."""

    def __init__(self, rows: list[dict[str, Any]], n_mels: int, trim: bool) -> None:
        from transformers import WhisperFeatureExtractor

        self._rows, self._padding = rows, "do_not_pad" if trim else "max_length"
        self._extractor = WhisperFeatureExtractor(feature_size=n_mels)
        self.lengths: list[int] = [row["samples"] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number]
        audio: np.ndarray = decode(Path(row["uri"]), AudioSpan(row["start"], row["duration"]))
        mel = self._extractor(
            audio, sampling_rate=SAMPLING_RATE, padding=self._padding, return_tensors="pt"
        )
        return {**row, "audio": audio, "mel": mel.input_features[0]}
