"""nanochat's checkpoints are read and written, whatever their shape or age."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni.model import load_nanochat
from omni.model.download import SourceError
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.kv_cache import KVCache
from omni.model.lm.nanochat import find_tokenizer, save_nanochat
from omni.model.tokenizer import SpeechTokenizer
from tests.helpers.nanochat_formulas import logits_of
from tests.helpers.small_gpt import awake_gpt

REFEREE = Path(__file__).parents[1] / "nanochat"
SHAPES = {
    "one layer": GPTConfig(64, 70, 1, 2, 2, 32, "L"),
    "grouped heads, short windows": GPTConfig(512, 100, 3, 4, 2, 48, "S"),
    "one key head, odd depth": GPTConfig(256, 64, 5, 3, 1, 24, "SSL"),
    "deep, pattern longer than half": GPTConfig(128, 130, 6, 2, 2, 32, "SLLS"),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(REFEREE / "expected.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The referee as nanochat lays it down: a .pt file beside its meta file."""
    base = tmp_path / "base"
    base.mkdir()
    torch.save(load_file(REFEREE / "model_000010.safetensors"), base / "model_000010.pt")
    shutil.copy(REFEREE / "meta_000010.json", base)
    return base


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).abs().max() / wanted.abs().max())


def rewrite(path: Path, **changes: object) -> None:
    """Change nanochat's state dict on disk; None removes an entry."""
    state = torch.load(path, weights_only=True)
    for name, value in changes.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    torch.save(state, path)


# --- the same function ---------------------------------------------------------------------------


@torch.inference_mode()
def test_a_checkpoint_computes_what_nanochat_computed(
    folder: Path, expected: dict[str, Tensor]
) -> None:
    model = load_nanochat(folder)
    assert not model.training and model.lm_head.weight.dtype == torch.float32
    assert relative(model(expected["idx"]), expected["logits"]) < 1e-5


@torch.inference_mode()
def test_the_formulas_are_nanochats(folder: Path, expected: dict[str, Tensor]) -> None:
    model = load_nanochat(folder)
    ids = expected["idx"][0, :40]
    wanted = logits_of(model.config, dict(model.state_dict()), ids.tolist())
    assert relative(expected["logits"][0, :40].double(), wanted) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_any_shape_makes_the_round_trip_and_computes_the_formulas(
    name: str, tmp_path: Path
) -> None:
    config = SHAPES[name]
    save_nanochat(awake_gpt(config, seed=4), tmp_path, 7)
    model = load_nanochat(tmp_path)
    assert model.config == config
    # Past the short window of 128 positions, where there is one.
    length = 140 if "S" in config.window_pattern[: config.n_layer - 1] else 20
    ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(5))
    wanted = logits_of(config, dict(model.state_dict()), ids.tolist())
    logits = model(ids[None])[0]
    assert relative(logits.double(), wanted) < 1e-5
    loss = model(ids[None, :-1], targets=ids[None, 1:])
    picked = wanted[:-1].log_softmax(-1)[torch.arange(length - 1), ids[1:]]
    assert float(loss) == pytest.approx(-float(picked.mean()), rel=1e-5)
    assert _written(model, ids[:10]) == _written_by_formulas(config, model, ids[:10].tolist())


def _written(model: GPT, prompt: Tensor, count: int = 5) -> list[int]:
    """Greedy continuation with a cache."""
    cache = KVCache(1)
    step, written = prompt[None], []
    for _ in range(count):
        step = model(step, kv_cache=cache)[:, -1:].argmax(-1)
        written.append(int(step))
    return written


def _written_by_formulas(
    config: GPTConfig, model: GPT, ids: list[int], count: int = 5
) -> list[int]:
    weights, written = dict(model.state_dict()), []
    for _ in range(count):
        written.append(int(logits_of(config, weights, [*ids, *written])[-1].argmax()))
    return written


# --- what is found in the wild -------------------------------------------------------------------


@torch.inference_mode()
def test_compiled_names_and_bf16_embeddings_are_read(
    folder: Path, expected: dict[str, Tensor]
) -> None:
    path = folder / "model_000010.pt"
    state = torch.load(path, weights_only=True)
    state = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    for name in state:
        if "wte" in name or "value_embeds" in name:
            state[name] = state[name].bfloat16()
    torch.save(state, path)
    model = load_nanochat(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative(model(expected["idx"]), expected["logits"]) < 0.05  # rounded embeddings


@torch.inference_mode()
def test_what_old_checkpoints_lack_does_nothing(folder: Path) -> None:
    meta = json.loads((folder / "meta_000010.json").read_text())
    del meta["model_config"]["window_pattern"]
    (folder / "meta_000010.json").write_text(json.dumps(meta))
    rewrite(folder / "model_000010.pt", resid_lambdas=None, x0_lambdas=None)
    model = load_nanochat(folder)
    assert model.config.windows() == [256] * 4
    assert model.resid_lambdas.tolist() == [1.0] * 4 and model.x0_lambdas.tolist() == [0.0] * 4


def test_the_largest_step_unless_one_is_named(tmp_path: Path) -> None:
    config = SHAPES["one layer"]
    for step, seed in ((2, 1), (100, 2), (30, 3)):
        save_nanochat(awake_gpt(config, seed), tmp_path, step)
    for step, seed in ((None, 2), (2, 1), (30, 3)):
        found, wanted = load_nanochat(tmp_path, step), awake_gpt(config, seed)
        assert torch.equal(found.lm_head.weight, wanted.lm_head.weight)
    with pytest.raises(SourceError, match=r"\bstep 7\b.*\b2, 30, 100\b"):
        load_nanochat(tmp_path, 7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lm_head.weight": None}, r"\blm_head\.weight\b.*\(1024, 128\)"),
        ({"lm_head.weight": torch.zeros(3, 4)}, r"\blm_head\.weight\b.*\(1024, 128\).*\(3, 4\)"),
        ({"extra": torch.zeros(2)}, r"\bextra\b.*\(2,\)"),
        ({"smear_lambda": "text"}, r"model_000010\.pt: .*\bsmear_lambda\b.*\btensor\b"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: dict[str, object], named: str
) -> None:
    rewrite(folder / "model_000010.pt", **change)
    with pytest.raises(SourceError, match=named):
        load_nanochat(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_head": 3}, r"\bn_embd 128\b.*\bn_head 3\b"),
        ({"n_layer": "four"}, r"\bmodel_config\.n_layer\b.*\bint\b.*'four'"),
        ({"experts": 8}, r"\bmodel_config\.experts\b"),
        ({"n_embd": None}, r"\bmodel_config\.n_embd\b.*\bint\b.*\bNone\b"),
    ],
)
def test_a_meta_file_that_says_nonsense_is_refused(
    folder: Path, change: dict[str, object], named: str
) -> None:
    path = folder / "meta_000010.json"
    meta = json.loads(path.read_text())
    meta["model_config"] |= change
    path.write_text(json.dumps(meta))
    with pytest.raises(SourceError, match=named):
        load_nanochat(folder)


def test_folders_without_a_checkpoint_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{tmp_path}/absent: "):
        load_nanochat(tmp_path / "absent")
    (folder / "meta_000010.json").unlink()
    with pytest.raises(SourceError, match=r"meta_000010\.json: "):
        load_nanochat(folder)
    (folder / "model_000010.pt").write_bytes(b"PK\x03\x04 cut short")
    shutil.copy(REFEREE / "meta_000010.json", folder)
    with pytest.raises(SourceError, match="damaged"):
        load_nanochat(folder)
    with pytest.raises(SourceError, match=rf"{tmp_path}: .*\bmodel_NNNNNN\.pt\b"):
        load_nanochat(tmp_path)


class _Runs:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._trace}",)


def test_a_crafted_checkpoint_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"lm_head.weight": _Runs(trace)}, folder / "model_000010.pt")
    with pytest.raises(SourceError, match=r"model_000010\.pt: .*\btensors\b"):
        load_nanochat(folder)
    assert not trace.exists()
    torch.load(folder / "model_000010.pt", weights_only=False)
    assert trace.exists(), "the same file does run it when it is trusted"


# --- the way back --------------------------------------------------------------------------------


def test_what_is_written_is_what_nanochat_writes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_nanochat(load_nanochat(folder), out, 10)
    written = torch.load(out / "model_000010.pt", weights_only=True)
    original = torch.load(folder / "model_000010.pt", weights_only=True)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    meta = json.loads((out / "meta_000010.json").read_text())
    assert (
        meta["model_config"]
        == json.loads((folder / "meta_000010.json").read_text())["model_config"]
    )


def test_a_trained_tokenizer_is_written_as_nanochat_pickles_it(tmp_path: Path) -> None:
    texts = ["please enter your mailbox number", "the person is not available", "naïve 你好 12345"]
    tokenizer = SpeechTokenizer.train(texts * 5, 320)
    config = GPTConfig(64, tokenizer.vocab_size, 1, 2, 2, 32, "L")
    save_nanochat(awake_gpt(config), tmp_path, 1, tokenizer)
    with (tmp_path / "tokenizer.pkl").open("rb") as file:
        encoding = pickle.load(file)  # as nanochat does
    assert encoding.n_vocab == tokenizer.vocab_size
    again = SpeechTokenizer.load(find_tokenizer(tmp_path))
    for text in [*texts, "something else, 7 times!", ""]:
        assert encoding.encode_ordinary(text) == tokenizer.encode(text) == again.encode(text)
    assert encoding.encode_single_token("<|bos|>") == tokenizer.bos == again.bos


def test_a_tokenizer_is_found_where_nanochat_keeps_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "base_checkpoints" / "d12"
    checkpoint.mkdir(parents=True)
    with pytest.raises(SourceError, match=r"tokenizer\.path\b"):
        find_tokenizer(checkpoint)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.pkl").touch()
    assert find_tokenizer(checkpoint) == tmp_path / "tokenizer" / "tokenizer.pkl"
