"""Compare omni with the usual training loop for such a model, on the same corpus and models.

`Peer` is that loop in one process: a torch DataLoader decodes and pads every clip to 30 s, the
frozen encoder runs inline in every epoch, and batches are padded to their longest utterance. The
objective (cross-entropy), optimizer, precision and batch size are omni's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from omni.audio.decode import AudioSpan, decode
from omni.audio.windows import SAMPLING_RATE
from omni.bench.prepared_run import in_temporary_storage, progress
from omni.bench.timing import Result, describe_machine, median
from omni.bench.whole_run import JobRun, for_timing, run_job, steps_of_epochs
from omni.config import Config
from omni.model.batch import Batch
from omni.model.encoder.weights import read_whisper_files, whisper_folder
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniModel
from omni.run.prepare import Prepared, prepare
from omni.stream.codec import DTYPES
from omni.stream.collate import Utterance
from omni.train.evaluation import Layout
from omni.train.optim import make_optimizers, set_rates, trainable

_SLICE_SECONDS = 50.0
_ROUNDS = 2


def bench_peer(config: Config) -> Result:
    """Run the `peer` suite: alternate two epochs of omni with a time slice of the peer.

    A slice is enough, since the peer does the same work in each epoch.
    """
    optim = config.optim.model_copy(update={"ctc_weight": 0.0})
    config = config.model_copy(update={"optim": optim})
    result = Result("peer", describe_machine(torch.device("cpu"), config.train.threads))
    with in_temporary_storage(config) as inside:
        steps = steps_of_epochs(inside, 2)[1]
        timed = for_timing(inside, steps)
        prepared = prepare(timed)
        peer = Peer(prepared)
        rates: dict[str, list[float]] = {"omni": [], "with start": [], "peer": []}
        for turn in range(_ROUNDS):
            progress(f"round {turn + 1} of {_ROUNDS}: the peer for {_SLICE_SECONDS:.0f} s")
            rates["peer"].append(peer.rate(_SLICE_SECONDS))
            progress(f"round {turn + 1} of {_ROUNDS}: omni for {steps} steps, two epochs")
            job: JobRun = run_job(timed)
            total = job.over(0, steps)
            rates["omni"].append(total["utterances"] / total["seconds"])
            rates["with start"].append(total["utterances"] / job.wall_seconds)
        # Losses are compared last, when the audio affects them.
        result.ratio["peer.loss_difference"] = peer.difference_to_omni()
    result.notes.append(
        f"{prepared.splits['train'].table.num_rows} utterances, {steps} steps of "
        f"{peer.batch_size} of them on average; the peer has {peer.threads} threads and a "
        "DataLoader worker, omni one thread per process"
    )
    result.add("peer", median(rates["peer"]), "samples/s", "30 s padding, encoder inline")
    result.add("omni", median(rates["omni"]), "samples/s", "two epochs, from first to last step")
    result.add("omni", median(rates["with start"]), "samples/s", "with Ray's start and the scoring")
    for name, key in (("omni", ""), ("with start", "_with_start")):
        pairs = zip(rates[name], rates["peer"], strict=True)
        ratio = median([ours / theirs for ours, theirs in pairs])
        result.ratio[f"peer.samples_per_second_ratio{key}"] = ratio
    return result


class Peer:
    """Train with the usual loop, which the module docstring describes."""

    def __init__(self, prepared: Prepared) -> None:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Reference

        self._config, self._prepared = prepared.config, prepared
        train = prepared.splits["train"]
        self.threads = os.cpu_count() or 1
        self.batch_size = round(len(train.plan.members) / train.plan.steps)
        encoder = self._config.encoder
        folder = whisper_folder(encoder.weights)
        _, state = read_whisper_files(folder)
        self._encoder = Reference(
            WhisperConfig.from_pretrained(folder, trust_remote_code=False)
        ).eval()
        self._encoder.load_state_dict(state)
        self._encoder.to(DTYPES[encoder.dtype])
        self._model = OmniModel(prepared.model)
        self._model.init_weights(self._config.run.seed)
        self._optimizers = make_optimizers(self._model, self._config.optim)
        self._rows = _Clips(train.table.to_pylist())
        self._steps = 0
        self._batches = self._endless_batches()

    def rate(self, seconds: float) -> float:
        """Measure samples per second over `seconds` of training, after one step to warm up."""
        torch.set_num_threads(self.threads)
        self._step()
        began, samples = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            samples += self._step()
        return samples / (time.perf_counter() - began)

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
            ours = WhisperEncoder(e.weights, mode="full", dtype=DTYPES[e.dtype])
            features = ours.encode([row["audio"] for row in rows])
            packed = self._model(self._collate(rows, features, packed=True))
        self._model.train()
        return abs(float(theirs.loss / theirs.tokens) / float(packed.loss / packed.tokens) - 1)

    def _autocast(self) -> torch.autocast:
        enabled = compute_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

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
        generator = torch.Generator().manual_seed(self._config.run.seed)
        while True:
            yield from DataLoader(
                self._rows,
                batch_size=self.batch_size,
                shuffle=True,
                generator=generator,
                num_workers=1,
                collate_fn=list,
            )

    def _batch(self, rows: list[dict[str, Any]]) -> Batch:
        with torch.inference_mode():
            mels = torch.stack([row["mel"] for row in rows]).to(self._encoder.dtype)
            features = self._encoder(mels).last_hidden_state
        return self._collate(rows, list(features.clone()), packed=False)

    def _collate(self, rows: list[dict[str, Any]], features: list[Tensor], packed: bool) -> Batch:
        members = [
            Utterance([f], row["tokens"], row["supervised"])
            for f, row in zip(features, rows, strict=True)
        ]
        layout = Layout.of(self._config, self._prepared.model)
        lengths = [layout.length(member) for member in members]
        positions = sum(lengths) if packed else max(lengths)
        rows_of = [members] if packed else [[member] for member in members]
        return replace(layout, positions=positions).batch(rows_of)


class _Clips(Dataset[dict[str, Any]]):
    """Load rows of the index with their audio and its log-mel, padded to 30 s by transformers."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        from transformers import WhisperFeatureExtractor

        self._rows = rows
        self._extractor = WhisperFeatureExtractor()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number]
        audio: np.ndarray = decode(Path(row["uri"]), AudioSpan(row["start"], row["duration"]))
        mel = self._extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        return {**row, "audio": audio, "mel": mel.input_features[0]}
