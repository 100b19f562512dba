"""Tokenizer, template and shape of a run's model, and the settings that do not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni.config import Config, parse_config
from omni.corpus.index import Index
from omni.corpus.splits import build_indexes
from omni.errors import ConfigError
from omni.model.lm.gpt import GPTConfig
from omni.model.lm.pretrained import Pretrained
from omni.model.speech_lm import LMSource
from omni.model.tokenizer import SpeechTokenizer
from omni.run.model_setup import choose_tokenizer, find_language_model, model_config
from tests.helpers.worker_specs import small_run


def _config(**sections: Any) -> Config:
    return parse_config(
        {
            "data": {"train": ["embedded:dev"]},
            "tokenizer": {"vocab_size": 300},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def index() -> Index:
    return build_indexes(small_run().config)["train"]


def test_a_gpt_takes_its_shape_from_the_settings() -> None:
    prepared = small_run()
    shape = model_config(_config(), prepared.tokenizer, prepared.encoder, None)
    assert isinstance(shape.lm, GPTConfig)
    assert (shape.lm.n_layer, shape.lm.n_kv_head, shape.lm.vocab_size) == (1, 2, 300)
    assert (shape.projector, shape.feature_dim, shape.layers) == ("mlp", 384, 1)
    assert (shape.ctc, shape.lora, shape.source) == (False, None, None)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"model": {"sequence_len": 128}, "optim": {"bin_positions": 256}}, "optim.bin_positions"),
        ({"model": {"projector": "conv", "stack": 3}}, "model.stack"),
        ({"optim": {"kl_weight": 0.5}}, "optim.kl_weight"),
        ({"model": {"n_embd": 33, "n_head": 2}}, "model"),
        ({"model": {"train": ["projector"]}, "optim": {"muon_lr": 0.02}}, "optim.muon_lr"),
        ({"model": {"train": ["lm"]}, "optim": {"projector_lr": 0.02}}, "optim.projector_lr"),
        ({"optim": {"lora_lr": 0.02}}, "optim.lora_lr"),
    ],
)
def test_settings_that_do_not_fit_are_named(sections: dict[str, Any], field: str) -> None:
    prepared = small_run()
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        model_config(_config(**sections), prepared.tokenizer, prepared.encoder, None)


def test_a_tokenizer_is_trained_given_or_that_of_the_run(index: Index, tmp_path: Path) -> None:
    trained = choose_tokenizer(_config(), None, index, None)
    assert trained.vocab_size == 300
    other = SpeechTokenizer.train(["another corpus"], 280)
    path = tmp_path / "tokenizer.json"
    path.write_text(other.to_json())
    given = _config(tokenizer={"path": str(path)})
    assert choose_tokenizer(given, None, index, None).to_json() == other.to_json()

    # A run that continues with the same settings keeps its own, whatever its corpus is now.
    (tmp_path / "config.yaml").write_text(_config().to_yaml())
    assert choose_tokenizer(_config(), tmp_path, index, None).to_json() == other.to_json()
    changed = _config(tokenizer={"vocab_size": 290})
    assert choose_tokenizer(changed, tmp_path, index, None).vocab_size == 290

    path.write_text("{")
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: .*tokenizer\.json"):
        choose_tokenizer(given, None, index, None)


def test_a_language_model_brings_its_tokenizer_and_must_hold_all_tokens(index: Index) -> None:
    prepared = small_run()
    assert find_language_model(_config()) is None
    with pytest.raises(ConfigError, match=r"^model\.lm: .*/nowhere"):
        find_language_model(_config(model={"lm": "nanochat:/nowhere"}))
    shape = GPTConfig(
        sequence_len=1024, vocab_size=290, n_layer=1, n_head=2, n_kv_head=2, n_embd=32
    )
    lm = Pretrained(
        shape, LMSource("nanochat:/lm", "hash"), SpeechTokenizer.train(["its own"], 270)
    )
    own = choose_tokenizer(_config(), None, index, lm)
    assert own.vocab_size == 270
    assert model_config(_config(), own, prepared.encoder, lm).source == lm.source
    with pytest.raises(ConfigError, match=r"^tokenizer: .*\b300\b.*\b290\b"):
        model_config(_config(), prepared.tokenizer, prepared.encoder, lm)
    small = replace(lm, shape=replace(shape, sequence_len=512))
    with pytest.raises(ConfigError, match=r"^optim\.bin_positions: .*\b512\b"):
        model_config(_config(), own, prepared.encoder, small)
