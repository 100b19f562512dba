"""Classes of a user's own, named by settings: the examples of docs/plug-ins.md, and wrong ones."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from jobs import evaluate, index, train, transcribe
from omni.audio.decode import AudioError
from omni.augment.augment import Augmentation, augment
from omni.augment.plug_in import check_effect, load_effect
from omni.checkpoint.checkpoint import read_checkpoint
from omni.config import AugmentConfig, Config, parse_config
from omni.corpus.manifest import ManifestError
from omni.corpus.sources import Options, open_source
from omni.errors import ConfigError
from omni.metrics.text_metric import load_metrics, score
from omni.model.projector import check_projector
from omni.run.preflight import _look, _plug_ins
from omni.run.prepare import Prepared, make_worker_spec, prepare
from omni.run.rates import loaded_blocks
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import stream_settings
from omni.train.loop import TrainLoop
from tests.helpers.stream_order import planned_stream
from tests.helpers.whole_runs import ROOT, TINY, embedded, lines, write_manifest

PAGE = Path(__file__).parents[1] / "docs" / "plug-ins.md"
WRONG = """
import numpy as np
import torch
from torch import nn

VALUE = 3

class Plain:
    pass

class NoWeights(nn.Module):
    def __init__(self, in_dim, out_dim, hidden_dim=None):
        super().__init__()
    def init_weights(self, generator=None):
        pass

class NoInit(nn.Linear):
    def __init__(self, in_dim, out_dim, hidden_dim=None):
        super().__init__(in_dim, out_dim)

class Arguments(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)

class Shape(NoInit):
    def init_weights(self, generator=None):
        pass
    def forward(self, x, starts=None):
        return super().forward(x)[:2]

class NotFinite(Shape):
    def forward(self, x, starts=None):
        return nn.Linear.forward(self, x) * float("nan")

class Averages(Shape):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.BatchNorm1d(16, affine=False)

    def forward(self, x, starts=None):
        return self.norm(nn.Linear.forward(self, x))

class Raises(Shape):
    def forward(self, x, starts=None):
        raise KeyError("rows")

class Shorter:
    def __call__(self, audio, generator):
        return audio[1:]

class Whole:
    def __call__(self, audio, generator):
        return (audio * 100).astype(int)

class Random:
    def __call__(self, audio, generator):
        return audio + np.random.random(len(audio))

class Silence:
    def __call__(self, audio, generator):
        return audio / np.float32(0)

class LongOnes:
    def __call__(self, audio, generator):
        if len(audio) < 16000:
            raise ValueError("too short")
        return audio

class NoName:
    def count(self, reference, hypothesis, language):
        return 0, 1

class NoCount:
    name = "a"

class OneNumber(NoName):
    name = "a"
    def count(self, reference, hypothesis, language):
        return 1

class Hard(NoName):
    name = "hard"
    def count(self, reference, hypothesis, language):
        return int(reference == "press two" or reference), 1

class NoRead:
    def __init__(self, name, options):
        pass
    def parts(self):
        return []

class Dicts(NoRead):
    def parts(self):
        return [{"name": "a"}]
    def read(self, part):
        yield {}

class Broken(Dicts):
    def parts(self):
        return [][0]
"""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the file of the page and one of wrong classes."""
    (tmp_path / "extras.py").write_text("\n\n".join(_blocks("python")))
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "syntax.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield tmp_path
    for name in ("extras", "wrong", "syntax"):
        sys.modules.pop(name, None)
    load_effect.cache_clear()
    importlib.invalidate_caches()


def _config(folder: Path, **changes: dict[str, Any]) -> Config:
    values: dict[str, Any] = yaml.safe_load(TINY)
    values["data"] |= {
        "train": [str(write_manifest(folder / "train", embedded("train", 8)))],
        "dev": [str(write_manifest(folder / "dev", embedded("dev", 3)))],
    }
    values["run"] = {"storage": str(folder / "runs"), "name": "mine"}
    values["optim"] |= {"steps": 3, "bins_per_step": 1, "warmup_steps": 1}
    values["eval"] = {"every": 2}
    for section, fields in changes.items():
        values[section] = values.get(section, {}) | fields
    return parse_config(values)


OWN: dict[str, dict[str, Any]] = {
    "model": {"projector": "extras:BilinearProjector"},
    "augment": {"effects": "extras:Clipping", "effects_probability": 0.5},
    "eval": {"every": 2, "metrics": "extras:NumberErrors"},
}


def _train(prepared: Prepared) -> dict[str, Any]:
    """Train as the only rank, without Ray."""
    prepared.config.run_dir.mkdir(parents=True)
    stage = EncodeStage(stream_settings(prepared.config, prepared.encoder))
    settings = stream_settings(prepared.config, prepared.encoder)
    spec, splits = make_worker_spec(prepared), list(prepared.splits.values())
    steps = (0, spec.held_step, prepared.config.optim.steps)
    blocks = [
        stage(block)
        for planned in planned_stream(splits, steps)
        for block in loaded_blocks(splits[planned.split], [planned.bin], settings)[0]
    ]
    summary = TrainLoop(spec, iter(blocks), 0, 1, torch.device("cpu")).run()
    assert summary is not None
    return summary


def test_a_model_trained_with_the_pages_plug_ins_is_loaded_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(_config(folder, **OWN))
    summary = _train(prepared)
    run = prepared.config.run_dir
    assert summary["dev_metrics"] == {"digits missing": None}, "no digits were spoken"
    rows = lines(run / "transcripts-dev.jsonl")
    assert [row["metrics"] for row in rows] == [{"digits missing": None}] * 3
    logged = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "eval"]
    assert logged and all(row["dev_metrics"] == {"digits missing": None} for row in logged)

    checkpoint = run / "checkpoints" / "last"
    found = read_checkpoint(checkpoint)
    assert found.model.projector == "extras:BilinearProjector"
    projector = found.load_model().projector
    assert type(projector) is sys.modules["extras"].BilinearProjector
    saved = found.weights()
    assert torch.equal(projector.left.weight, saved["projector.left.weight"])

    manifest = folder / "digits.jsonl"
    said = embedded("dev", 1)[0]
    manifest.write_text(json.dumps(said | {"text": "press 1 or 22"}) + "\n")
    arguments = ["--checkpoint", str(checkpoint), "--data", str(manifest), "--allow_absolute"]
    capsys.readouterr()
    assert evaluate.main([*arguments, "--metric", "extras:NumberErrors"]) == 0
    rate = json.loads(capsys.readouterr().out)["metrics"]["digits missing"]
    assert rate in (0.0, 0.5, 1.0)
    assert transcribe.main(["--checkpoint", str(checkpoint), said["audio"]]) == 0

    (folder / "extras.py").unlink()
    sys.modules.pop("extras")
    importlib.invalidate_caches()
    capsys.readouterr()
    for job, given in ((evaluate, arguments), (transcribe, [*arguments[:2], said["audio"]])):
        assert job.main(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --checkpoint: model.projector: extras:BilinearProjector: ")


def test_a_source_of_the_page_is_read_in_another_process(folder: Path) -> None:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "lines.txt").write_text("clips/a.wav|hello there\nclips/b.wav|bye\n")
    spec = "extras:PipeSource:corpus/lines.txt"
    source = open_source(spec, Options(language="en"))
    (part,) = source.parts()
    travelled, part = pickle.loads(pickle.dumps((source, part)))
    rows = list(travelled.read(part))
    assert [(row.id, row.text, row.language) for row in rows] == [
        ("clips/a.wav", "hello there", "en"),
        ("clips/b.wav", "bye", "en"),
    ]
    assert rows[0].uri == str(folder / "corpus" / "clips" / "a.wav")
    assert source.spec == spec


def test_an_effect_is_drawn_anew_and_leaves_the_other_draws_alone(folder: Path) -> None:
    plain = AugmentConfig(gain_probability=0.5)
    own = plain.model_copy(update={"effects": ["extras:Clipping"], "effects_probability": 0.5})
    audio = np.linspace(-1, 1, 1600, dtype=np.float32)
    drawn = []
    for epoch in range(40):
        (without,) = Augmentation(plain, 0).change(0, ["key"], epoch)
        (change,) = Augmentation(own, 0).change(0, ["key"], epoch)
        assert change.gain_db == without.gain_db
        drawn.append(bool(change.effects))
        assert change.clean is (not change.effects and change.gain_db is None)
        once, twice = (
            augment(audio, replace(drawn_again, gain_db=None), Augmentation(own, 0))
            for drawn_again in (change, *Augmentation(own, 0).change(0, ["key"], epoch))
        )
        assert np.array_equal(once, twice)
        assert bool(np.abs(once).max() < 0.81) is bool(change.effects)
    assert 10 < sum(drawn) < 30
    assert own.clean_share == 0.25
    # Hash of version 0.1.0, with which augmented runs are continued.
    assert Augmentation(plain, 0).identity == IDENTITY
    assert Augmentation(own, 0).identity != IDENTITY


IDENTITY = "e98e6a17099c9f17f67929f8"


def test_a_failing_effect_rejects_an_utterance(folder: Path) -> None:
    check_effect("wrong:LongOnes")
    settings = AugmentConfig(effects=["wrong:LongOnes"], effects_probability=1.0)
    augmentation = Augmentation(settings, 0)
    (change,) = augmentation.change(0, ["key"], 0)
    with pytest.raises(AudioError) as failed:
        augment(np.zeros(1600, np.float32), change, augmentation)
    assert failed.value.reason == "failed effect"
    assert "wrong:LongOnes" in failed.value.detail and "too short" in failed.value.detail


def test_a_metric_counts_over_utterances_and_says_where_it_fails(folder: Path) -> None:
    rows = [
        {"reference": f"press {n} {m}", "hypothesis": f"press {n}", "language": "en"}
        for n, m in ((1, 2), (3, "now"))
    ]
    assert score(rows, load_metrics(["extras:NumberErrors"], "eval.metrics")) == {
        "digits missing": pytest.approx(1 / 3)
    }
    assert [row["metrics"] for row in rows] == [{"digits missing": 0.5}, {"digits missing": 0.0}]
    rows = [{"reference": text, "hypothesis": "", "language": "en"} for text in ("x", "7")]
    assert score(rows, load_metrics(["wrong:Hard"], "eval.metrics")) == {
        "hard": 7.0,
        "hard failed": 1.0,
    }


def _projector(name: str) -> None:
    check_projector(name, 4, 8, 16, None)


def _metric(name: str) -> None:
    load_metrics([name], "eval.metrics")


@pytest.mark.parametrize(
    ("setting", "check", "name", "told"),
    [
        ("model.projector", _projector, "missing:Class", "missing cannot be imported"),
        ("model.projector", _projector, "syntax:Class", "SyntaxError"),
        ("model.projector", _projector, "wrong:Absent", "no class Absent"),
        ("model.projector", _projector, "wrong:VALUE", "not name a class"),
        ("model.projector", _projector, "wrong:Plain", "torch.nn.Module"),
        ("model.projector", _projector, "wrong:NoWeights", "parameters"),
        ("model.projector", _projector, "wrong:NoInit", "init_weights"),
        ("model.projector", _projector, "wrong:Arguments", "TypeError"),
        ("model.projector", _projector, "wrong:Shape", "(3, 16)"),
        ("model.projector", _projector, "wrong:NotFinite", "finite"),
        ("model.projector", _projector, "wrong:Raises", "KeyError"),
        ("model.projector", _projector, "wrong:Averages", "norm.running_mean"),
        ("augment.effects", check_effect, "wrong:Plain", "__call__"),
        ("augment.effects", check_effect, "wrong:Shorter", "(16000,) float32, got (15999,)"),
        ("augment.effects", check_effect, "wrong:Whole", "int64"),
        ("augment.effects", check_effect, "wrong:Random", "generator"),
        ("augment.effects", check_effect, "wrong:Silence", "finite"),
        ("eval.metrics", _metric, "wrong:NoName", "name"),
        ("eval.metrics", _metric, "wrong:NoCount", "count"),
        ("eval.metrics", _metric, "wrong:OneNumber", "TypeError"),
    ],
)
def test_what_is_no_such_plug_in_is_named_with_its_setting(
    setting: str, check: Callable[[str], None], name: str, told: str, folder: Path
) -> None:
    with pytest.raises(ConfigError) as wrong:
        check(name)
    text = str(wrong.value)
    assert text.startswith(f"{setting}: {name}: ") and told in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing:Class:x", "missing cannot be imported"),
        ("wrong:NoRead:x", "read"),
        ("wrong:Dicts:x", "Part"),
        ("wrong:Broken:x", "IndexError"),
    ],
)
def test_a_wrong_source_is_named(
    name: str, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ManifestError, match=told):
        open_source(name).parts()
    assert index.main(["--source", name, "--out", str(folder / "index")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --source: {name.removesuffix(':x')}: ") and told in line


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--model.projector", "missing:Class"),
        ("--model.projector", "swigloo"),
        ("--augment.effects", "missing:Class"),
        ("--eval.metrics", "missing:Class"),
        ("--eval.metrics", "extras.NumberErrors"),
    ],
)
def test_training_does_not_start_with_a_wrong_plug_in(
    flag: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "c.yaml"
    config.write_text(_config(folder).to_yaml())
    given = [flag, name, "--augment.effects_probability", "0.5"]
    assert train.main(["--config", str(config), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flag[2:]}") and name in line
    assert not (folder / "runs" / "mine").exists()


def test_each_node_is_asked_for_the_plug_ins(folder: Path) -> None:
    plug_ins = _plug_ins(_config(folder, **OWN))
    assert plug_ins == [
        ("model.projector", "extras:BilinearProjector"),
        ("augment.effects", "extras:Clipping"),
        ("eval.metrics", "extras:NumberErrors"),
    ]
    assert _look(folder / "mark", "word", None, {}, plug_ins) is None
    (folder / "extras.py").unlink()
    sys.modules.pop("extras")
    importlib.invalidate_caches()
    problem = _look(folder / "mark", "word", None, {}, plug_ins)
    assert problem is not None
    assert problem.format(node="n1").startswith("model.projector: node n1: extras:Bilinear")


@pytest.mark.slow
def test_rays_workers_find_plug_ins_in_the_working_directory(folder: Path) -> None:
    config = folder / "c.yaml"
    config.write_text(_config(folder, **OWN).to_yaml())
    (folder / "lines.txt").write_text(
        "".join(f"{row['audio']}|{row['text']}\n" for row in embedded("train", 8))
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    omni = [sys.executable, "-c", "import sys; from jobs.__main__ import main; sys.exit(main())"]
    for arguments in (
        ["index", "--source", "extras:PipeSource:lines.txt", "--out", "index"],
        ["train", "--config", str(config), "--data.train", "index"],
    ):
        done = subprocess.run(
            [*omni, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
    assert summary["steps"] == 3 and "digits missing" in summary["dev_metrics"]
    assert summary["rejects"] == {}
