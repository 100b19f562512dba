"""A transformers model learns to listen: layers, tasks, conversations, adapters, distillation.

The stream's stages and the training loop are real and run without Ray; a run through jobs.train is
at the end.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from jobs import evaluate
from omni.cluster.watchdog import Watchdog
from omni.config import Config, parse_config
from omni.inference.decode_batch import HeldUtterance
from omni.metrics.rows import DevLosses
from omni.metrics.run_files import read_events
from omni.model.lm.lora import is_adapter
from omni.run.prepare import Prepared, make_worker_spec, prepare
from omni.run.rates import Trainer, encoder_rate, loaded_blocks, without_cache
from omni.stream.schema import utterances
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import stream_settings
from omni.train.evaluation import HeldOut, Layout
from omni.train.model_state import ModelState
from tests.helpers.hf_folders import save_folder
from tests.helpers.whole_runs import ROOT, command, embedded, lines, run_job, write_manifest

STEPS = 40


def _rows() -> list[dict[str, Any]]:
    """Two tasks, and a conversation with two recordings."""
    rows = embedded("train", 24)
    shouts = [
        {
            "id": row["id"],
            "task": "shout",
            "messages": [
                {
                    "role": "user",
                    "content": [{"audio": row["audio"], "text": row["text"]}, {"text": "loud"}],
                },
                {"role": "assistant", "content": row["text"].upper()},
            ],
        }
        for row in rows[::3]
    ]
    talk = [
        {"role": "user", "content": [{"audio": rows[0]["audio"], "text": rows[0]["text"]}]},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": [{"audio": rows[1]["audio"], "text": rows[1]["text"]}]},
        {"role": "assistant", "content": "Two."},
    ]
    plain = [row for number, row in enumerate(rows) if number % 3]
    return [*shouts, *plain, {"id": "talk", "messages": talk}]


def _config(folder: Path, **sections: dict[str, Any]) -> Config:
    lm = folder / "lm"
    if not lm.exists():
        save_folder(lm, num_hidden_layers=2, initializer_range=0.1)
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "storage": str(folder / "runs")},
        "data": {
            "train": str(write_manifest(folder / "train", _rows())),
            "dev": str(write_manifest(folder / "dev", embedded("dev", 6))),
            "allow_absolute": True,
            "tasks": {"shout": {"weight": 2.0}, "transcribe": {}},
            "loaders": 1,
        },
        "encoder": {"layers": [1, 3, 4]},
        "model": {"lm": f"hf:{lm}", "train": ["projector", "lora"], "lora_rank": 4, "stack": 8},
        "optim": {
            **{"bin_positions": 256, "bins_per_step": 2, "steps": STEPS, "warmup_steps": 2},
            **{"lr": 3e-3, "projector_lr": 2e-2, "ctc_weight": 0.5, "kl_weight": 0.5},
        },
        "train": {"log_every": 1, "checkpoint_every": 6, "precision": "fp32", "max_failures": 0},
        "eval": {"every": 6, "wer_utterances": 2},
    }
    for name, fields in sections.items():
        values[name] = {**values[name], **fields}
    return parse_config(values)


def _trainer(prepared: Prepared) -> Trainer:
    settings = without_cache(stream_settings(prepared.config, prepared.encoder))
    count = prepared.config.optim.bins_per_step * 4
    loaded, _ = loaded_blocks(prepared.splits["train"], range(count), settings)
    return Trainer(
        make_worker_spec(prepared),
        encoder_rate(EncodeStage(settings), loaded, 0)[1],
        torch.device("cpu"),
    )


def _held(trainer: Trainer) -> HeldOut:
    """The training utterances, held out for a look at what was learnt."""
    job = trainer._loop.spec
    rows = [row for block in trainer._blocks for row in block.to_pylist()]
    codec = stream_settings(job.config, job.encoder).codec
    seen: dict[int, HeldUtterance] = {}
    for row in rows:
        for u in utterances(row, codec):
            seen[u.number] = HeldUtterance(u, str(u.number), f"{u.number}.wav", "")
    places = [(number, 0) for number in seen]
    layout = Layout.of(job.config, job.model)
    return HeldOut(list(seen.values()), places, layout, torch.device("cpu"))


def _learn(trainer: Trainer) -> tuple[DevLosses, DevLosses]:
    """What the utterances cost before and after some steps."""
    held, trained = _held(trainer), trainer._loop.model_state
    with trained.evaluating() as model:
        before = held.loss(model)
    for _ in range(STEPS):
        trainer.step()
    with trained.evaluating() as model:
        return before, held.loss(model)


def test_distillation_brings_the_listener_nearer_to_the_reader(tmp_path: Path) -> None:
    only_kl = {"ce_weight": 0.0, "ctc_weight": 0.0, "kl_weight": 1.0}
    before, after = _learn(_trainer(prepare(_config(tmp_path, optim=only_kl))))
    assert after.kl < 0.5 * before.kl


def test_adapters_layers_and_tasks_learn(tmp_path: Path) -> None:
    prepared = prepare(_config(tmp_path, optim={"kl_weight": 0.0}))
    trainer = _trainer(prepared)
    loop, model = trainer._loop, trainer._loop.model_state.model
    assert model.mix is not None and prepared.encoder.layers == [1, 3, 4]
    assert loop._layer_weights(model) == pytest.approx({"1": 1 / 3, "3": 1 / 3, "4": 1 / 3})
    frozen = {
        name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad
    }
    before, after = _learn(trainer)
    assert after.loss < before.loss - 0.5
    # Tasks are counted apart, without their weights, and each has learnt.
    shout, transcribe = after.tasks[:, 0] / after.tasks[:, 1]
    assert loop.spec.tasks == ["shout", "transcribe"]
    assert all(after.tasks[:, 0] < before.tasks[:, 0])
    tokens = after.tasks[:, 1]
    weighted = (2 * shout * tokens[0] + transcribe * tokens[1]) / (2 * tokens[0] + tokens[1])
    assert after.loss == pytest.approx(float(weighted), rel=1e-5)
    sums = loop.recorder.window.sums.tasks
    assert (sums[:, 1] > 0).all()
    weights = loop._layer_weights(model)
    assert sum(weights.values()) == pytest.approx(1) and max(weights.values()) > 0.34
    names = dict(model.named_parameters())
    assert all(torch.equal(names[name], value) for name, value in frozen.items())


def test_gradients_of_the_language_model_are_usual_when_it_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni.train.step._SPIKE_AFTER", 2)
    config = _config(tmp_path, optim={"ctc_only_steps": 2, "spike": 1.0001})
    loop = _trainer(prepare(config))._loop
    loop.steps._config = config
    norms = []
    for _ in range(3):
        loop.step()
        norms.append(loop.last_norm)
    assert norms[2] > 2 * max(norms[:2]), "they are larger"
    assert loop.state.skipped == 0 and loop.state.updates == 1


def test_the_language_model_decodes_once_it_has_joined(tmp_path: Path) -> None:
    optim = {"steps": 4, "ctc_only_steps": 2}
    config = _config(tmp_path, optim=optim, eval={"wer_utterances": 30, "max_new_tokens": 4})
    trainer = _trainer(prepare(config))
    loop = trainer._loop
    loop.config = loop.steps._config = config  # A `Trainer` takes the time of usual steps.
    loop._held = {"dev": _held(trainer)}
    loop._watchdog = Watchdog(600, lambda doing, seconds: None)
    best = []
    for _ in range(3):
        loop.step()
        best.append(loop._evaluate())
    rows = [row for row in lines(loop.run_dir / "metrics.jsonl") if row["kind"] == "eval"]
    # The language model answers all but transcriptions.
    decoders = [list(row["dev_decoders"]) for row in rows]
    assert decoders == [["ctc", "lm"], ["ctc", "lm"], ["joint", "lm"]]
    assert best == [True, True, True] and loop.state.best_step == 3
    assert loop.state.best_value is not None
    # A run that had only such steps is continued: what it measured is not compared.
    loop.state.best_step, loop.state.best_value = 2, 0.0
    assert loop._evaluate() and loop.state.best_step == 3 and loop.state.best_value > 0


@pytest.mark.slow
def test_a_run_listens_first_and_keeps_the_language_model_by_reference(
    tmp_path: Path,
) -> None:
    stacked = _config(tmp_path, optim={"steps": 12, "ctc_only_steps": 4})
    assert any(note.startswith("CTC ") for note in prepare(stacked).notes)
    config = _config(tmp_path, model={"stack": 4}, optim={"steps": 12, "ctc_only_steps": 4})
    values = yaml.safe_load(config.to_yaml())
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    run_job(file, tmp_path / "runs")
    run = tmp_path / "runs" / "run"
    rows = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["loss"] is None for row in rows] == [True] * 4 + [False] * 8
    assert all(row["ctc"] > 0 for row in rows)
    assert all(row["kl"] > 0 and row["tasks"].keys() <= {"shout", "transcribe"} for row in rows[4:])
    evals = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "eval"]
    assert evals[-1]["dev_kl"] > 0 and evals[-1]["layers"].keys() == {"1", "3", "4"}
    with safe_open(run / "checkpoints" / "last" / "model.safetensors", framework="pt") as held:
        names = set(held.keys())
    assert not [name for name in names if name.startswith("lm.") and not is_adapter(name)]
    assert any(is_adapter(name) for name in names) and "mix.logits" in names
    page = (run / "report.html").read_text()
    assert "by task" in page and "Encoder layers" in page
    checkpoint = run / "checkpoints" / "best"
    arguments = ["--checkpoint", str(checkpoint), "--data", "embedded:dev"]
    assert evaluate.main(arguments) == 0

    # Another start goes on from the checkpoint, with the language model from its folder.
    prepared = prepare(config)
    assert prepared.resume is not None
    trained = ModelState(config, prepared.model, torch.device("cpu"), 1)
    trained.load(prepared.resume)
    names = dict(trained.model.named_parameters())
    for name, value in prepared.resume.weights().items():
        assert torch.equal(names[name], value), name
    (tmp_path / "lm" / "model.safetensors").unlink()
    assert evaluate.main(arguments) == 2


@pytest.mark.slow
def test_a_language_model_that_is_refused_is_refused_once(tmp_path: Path) -> None:
    save_folder(tmp_path / "lm", kind="falcon")
    config = _config(tmp_path, encoder={"layers": "last"}, train={"max_failures": 3})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    done = subprocess.run(
        command(file, tmp_path / "runs"), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: FalconForCausalLM") and done.stderr.count("\n") == 1
    events = [event["event"] for event in read_events(tmp_path / "runs" / "run")]
    assert events == ["started"], "no attempt, and no second"
