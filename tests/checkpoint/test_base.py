"""A run starts from the weights of another, or of omni-tiny, and refuses those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from omni.checkpoint.base import checkpoint_folder, read_base, write_base
from omni.checkpoint.checkpoint import read_checkpoint
from omni.checkpoint.train_state import TrainState
from omni.config import Config, parse_config
from omni.errors import ConfigError
from omni.inference.export import export
from omni.inference.transcriber import Transcriber
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.run.prepare import prepare
from omni.train.model_state import ModelState
from tests.helpers.checkpoints import write_checkpoint

CPU = torch.device("cpu")


def _config(storage: Path, **model: Any) -> Config:
    return parse_config(
        {
            "run": {"storage": str(storage)},
            "data": {"train": ["embedded:dev"], "dev": ["embedded:test"]},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, **model},
            "optim": {"ctc_weight": 1.0, "steps": 2, "bin_positions": 512},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights that no seed makes."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = SpeechTokenizer.train(["you are entering conference number seven"], 300)
    gpt = GPTConfig(2048, tokenizer.vocab_size, 1, 2, 2, 32, "L")
    shape = OmniConfig(gpt, 384, stack=4, ctc=True)
    model = OmniModel(shape)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(number))
    return write_checkpoint(folder, _config(folder), shape, model, tokenizer)


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> Path:
    write_base(read_checkpoint(trained), tmp_path / "base")
    return tmp_path / "base"


def test_a_base_is_small_and_says_nothing_of_where_it_was_trained(
    base: Path, trained: Path
) -> None:
    found = read_checkpoint(base, verify=True)
    assert found.state == TrainState(step=7)
    assert {t.dtype for t in found.weights().values()} == {torch.bfloat16}
    size = [(folder / "model.safetensors").stat().st_size for folder in (base, trained)]
    assert size[0] < 0.7 * size[1]
    assert str(trained.parents[1]) not in "".join(p.read_text() for p in base.glob("*[!s]"))
    assert Transcriber.load(base).model.config == found.model


def test_a_run_starts_from_the_weights_and_tokenizer_of_its_base(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path / "runs", base=str(base))
    prepared = prepare(config)
    assert prepared.tokenizer.to_json() == read_checkpoint(base).tokenizer().to_json()
    state = ModelState(prepared.config, prepared.model, CPU, 1)
    for name, weight in read_checkpoint(trained).weights().items():
        wanted = weight.to(torch.bfloat16).float()
        assert torch.equal(state.model.get_parameter(name), wanted), name
    assert state.average is None or torch.equal(
        state.average.weights[name], state.model.get_parameter(name)
    )
    ModelState(_config(tmp_path, base="/nowhere"), prepared.model, CPU, 1, resuming=True)


def test_a_base_keeps_its_name_when_its_run_goes_on(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    """`best` of a run moves; the ranks that start later load what the driver has checked."""
    run = tmp_path / "other"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best").symlink_to(trained)
    prepared = prepare(_config(tmp_path / "runs", base=str(run)))
    assert prepared.config.model.base == str(trained)


@pytest.mark.parametrize(
    ("model", "optim", "tokenizer", "field"),
    [
        ({"n_layer": 2}, {}, {}, "model.n_layer: 2; expected 1"),
        ({"stack": 8}, {}, {}, "model.stack: 8; expected 4"),
        ({"n_embd": 64}, {}, {}, "model.n_embd: 64; expected 32"),
        ({}, {}, {"path": "/nowhere/tokenizer.json"}, "tokenizer.path"),
    ],
)
def test_settings_that_the_base_does_not_fit_are_named(
    base: Path, tmp_path: Path, model: Any, optim: Any, tokenizer: Any, field: str
) -> None:
    config = _config(tmp_path / "runs", base=str(base), **model)
    config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update=tokenizer)})
    with pytest.raises(ConfigError) as raised:
        prepare(config)
    assert field in str(raised.value)


def test_an_encoder_of_other_weights_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_base(str(base))
    found.encoder["fingerprint"] = "0" * 24
    monkeypatch.setattr("omni.run.model_setup.read_base", lambda name: found)
    with pytest.raises(ConfigError, match=r"encoder\.weights"):
        prepare(_config(tmp_path / "runs", base=str(base)))


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.base: /nowhere"):
        prepare(_config(tmp_path / "runs", base="/nowhere"))


def test_other_layers_join_the_one_of_the_base(base: Path, tmp_path: Path) -> None:
    alone = prepare(_config(tmp_path, base=str(base)))
    several = _config(tmp_path, base=str(base))
    several = several.model_copy(
        update={"encoder": several.encoder.model_copy(update={"layers": "all"})}
    )
    mixed = prepare(several)
    model = ModelState(mixed.config, mixed.model, CPU, 1).model
    assert model.mix is not None
    torch.testing.assert_close(
        model.mix.logits.softmax(0), torch.tensor([0.05, 0.05, 0.05, 0.05, 0.8])
    )
    frames = torch.nn.functional.layer_norm(torch.randn(40, 4, 5, 384), (384,))
    frames[:, :, :4] = 0.0
    before = ModelState(alone.config, alone.model, CPU, 1).model
    assert torch.allclose(
        model.projector(model.mix(frames.flatten(1))),
        before.projector(0.8 * frames[:, :, 4].flatten(1)),
        atol=1e-5,
    )


@pytest.mark.parametrize("layers", [[2], [4]])
def test_one_other_layer_is_refused(base: Path, tmp_path: Path, layers: list[int]) -> None:
    config = _config(tmp_path, base=str(base))
    config = config.model_copy(
        update={"encoder": config.encoder.model_copy(update={"layers": layers})}
    )
    with pytest.raises(ConfigError, match=r"encoder\.layers"):
        prepare(config)


def test_a_head_that_the_base_lacks_begins_anew(base: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "runs", base=str(base))
    without = config.optim.model_copy(update={"ctc_weight": 0.0})
    shape = prepare(config.model_copy(update={"optim": without})).model
    tokenizer = read_base(str(base)).tokenizer()
    headless = write_checkpoint(tmp_path / "headless", config, shape, OmniModel(shape), tokenizer)
    prepared = prepare(_config(tmp_path / "runs", base=str(headless)))
    assert not shape.ctc and prepared.model.ctc
    ModelState(prepared.config, prepared.model, CPU, 1)


def test_export_to_omni_writes_a_base(trained: Path, tmp_path: Path) -> None:
    files = export(trained, "omni", tmp_path / "out").files
    assert {path.name for path in files} == {
        "config.yaml", "model.safetensors", "state.json", "tokenizer.json",
    }  # fmt: skip
    assert read_checkpoint(tmp_path / "out", verify=True).model.ctc


def test_a_runs_folder_names_its_best_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    assert checkpoint_folder(str(tmp_path)) == tmp_path / "checkpoints" / "best"


def test_summary_tokens_that_the_base_lacks_begin_anew(base: Path, tmp_path: Path) -> None:
    prepared = prepare(_config(tmp_path, base=str(base), summary_tokens=2))
    state = ModelState(prepared.config, prepared.model, CPU, 1)
    weights = read_base(str(base)).weights()
    assert state.model.summary is not None
    assert not any(name.startswith("summary.") for name in weights)
    given = state.model.projector.state_dict()["fc1.weight"]
    assert torch.equal(given, weights["projector.fc1.weight"].float())
