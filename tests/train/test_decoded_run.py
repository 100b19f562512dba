"""A whole training of one rank without Ray: who decodes it changes no weight and no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from omni.config import parse_config
from omni.run.prepare import make_worker_spec, prepare
from omni.train.loop import TrainLoop
from tests.helpers.stream_order import planned_stream
from tests.helpers.whole_runs import lines
from tests.helpers.worker_specs import encoded_block

STEPS = 4


def _train(storage: Path, **evaluation: Any) -> Path:
    prepared = prepare(
        parse_config(
            {
                "run": {"storage": str(storage), "name": "run"},
                "data": {"train": ["embedded:dev"], "dev": ["embedded:test"], "cache": None},
                "tokenizer": {"vocab_size": 300},
                "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "dropout": 0.1},
                "optim": {"bin_positions": 512, "bins_per_step": 1, "steps": STEPS}
                | {"ctc_weight": 1.0, "warmup_steps": 1, "lr": 1e-2},
                "train": {"precision": "fp32", "log_every": 1},
                "eval": {"every": 2, "max_utterances": 3, "wer_utterances": 2, "best": "dev_wer"}
                | {"max_new_tokens": 8, **evaluation},
            }
        )
    )
    spec, splits = make_worker_spec(prepared), list(prepared.splits.values())
    blocks: list[pa.Table] = [
        encoded_block(prepared, splits[planned.split], [planned.bin])
        for planned in planned_stream(splits, (0, spec.held_step, STEPS))
    ]
    run = storage / "run"
    run.mkdir(parents=True)
    loop = TrainLoop(spec, iter(blocks), 0, 1, torch.device("cpu"))
    assert loop.run() is not None
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoded")
    return {name: _train(folder / name, decode=name) for name in ("auto", "lm", "ctc")}


def test_the_decoder_changes_neither_the_curve_nor_the_weights(runs: dict[str, Path]) -> None:
    curves, weights = {}, {}
    for name, run in runs.items():
        rows = lines(run / "metrics.jsonl")
        curves[name] = [
            {"loss": row["loss"], "ctc": row["ctc"], "norm": row["grad_norm"]}
            for row in rows
            if row["kind"] == "train"
        ]
        weights[name] = load_file(run / "checkpoints" / "last" / "model.safetensors")
    assert len(curves["auto"]) == STEPS and curves["auto"] == curves["lm"] == curves["ctc"]
    for name, tensor in weights["lm"].items():
        assert torch.equal(tensor, weights["auto"][name]), name
        assert torch.equal(tensor, weights["ctc"][name]), name


def test_evaluations_name_decoders_and_their_own_error_rates(runs: dict[str, Path]) -> None:
    found = {}
    for name, run in runs.items():
        decoder = "joint" if name == "auto" else name
        summary = json.loads((run / "summary.json").read_text())
        assert summary["dev_decoders"] == {decoder: 3}
        evaluations = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "eval"]
        assert [row["dev_decoders"] for row in evaluations] == [{decoder: 2}] * 2
        assert all("dev_ctc_wer" in row for row in evaluations)
        assert [row["decoder"] for row in lines(run / "transcripts-dev.jsonl")] == [decoder] * 3
        state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())["state"]
        weight = ", ctc_weight 0.5" if decoder == "joint" else ""
        assert state["best_metric"] == f"dev_wer by {decoder}{weight}"
        found[name] = evaluations
    for joint, lm, ctc in zip(*found.values(), strict=True):
        assert joint["dev_lm_wer"] == lm["dev_wer"] == lm["dev_lm_wer"]
        assert joint["dev_ctc_wer"] == ctc["dev_wer"] == ctc["dev_ctc_wer"] == lm["dev_ctc_wer"]
        assert "dev_lm_wer" not in ctc, "the language model was not run"
