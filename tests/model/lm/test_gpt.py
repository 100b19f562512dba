"""The GPT computes what nanochat computes, starts as nanochat starts, and takes soft tokens."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omni.model.lm.gpt import GPT, SOFTCAP
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.kv_cache import KVCache
from tests.helpers.small_gpt import SMALL, awake_gpt, random_ids

REFEREE = Path(__file__).parents[1] / "nanochat"


# --- nanochat is the referee ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(REFEREE / "expected.safetensors")


@pytest.fixture(scope="module")
def nanochat() -> GPT:
    meta = json.loads((REFEREE / "meta_000010.json").read_text())
    model = GPT(GPTConfig(**meta["model_config"])).eval()
    model.load_state_dict(load_file(REFEREE / "model_000010.safetensors"), strict=True)
    return model


@torch.inference_mode()
def cached_logits(model: GPT, idx: Tensor, prefill: int) -> Tensor:
    """Logits of `prefill` positions at once and of each later one alone, through a KV cache."""
    cache = KVCache(len(idx))
    parts = [idx[:, :prefill], *idx[:, prefill:].split(1, dim=1)]
    return torch.cat([model(part, kv_cache=cache) for part in parts], dim=1)


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).abs().max() / wanted.abs().max())


@torch.inference_mode()
def test_logits_are_those_of_nanochat(nanochat: GPT, expected: dict[str, Tensor]) -> None:
    logits = nanochat(expected["idx"])
    assert logits.dtype == torch.float32
    assert relative(logits, expected["logits"]) < 1e-5


@torch.inference_mode()
def test_loss_is_that_of_nanochat(nanochat: GPT, expected: dict[str, Tensor]) -> None:
    idx = expected["idx"]
    loss = nanochat(idx[:, :-1], targets=idx[:, 1:])
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=0)


@torch.inference_mode()
def test_greedy_generation_with_a_cache_writes_what_nanochat_wrote(
    nanochat: GPT, expected: dict[str, Tensor]
) -> None:
    cache = KVCache(1)
    step, written = expected["idx"][:1, :10], []
    for _ in range(20):
        step = nanochat(step, kv_cache=cache)[:, -1:].argmax(-1)
        written.append(int(step))
    assert written == expected["gen"].tolist()


@pytest.mark.parametrize("prefill", [1, 10, 150])
def test_cached_decoding_gives_the_logits_of_one_forward(
    nanochat: GPT, expected: dict[str, Tensor], prefill: int
) -> None:
    # 160 positions: more than the short window of 128.
    assert relative(cached_logits(nanochat, expected["idx"], prefill), expected["logits"]) < 1e-5


# --- structure and initialisation ----------------------------------------------------------------


def test_parameters_have_the_names_and_shapes_of_nanochat() -> None:
    model = GPT(SMALL)
    head, kv, width, vocabulary = 12, 24, 48, 128  # 100 tokens, rounded up to a multiple of 64
    wanted = {
        "transformer.wte.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "resid_lambdas": (3,),
        "x0_lambdas": (3,),
        "smear_gate.weight": (1, 24),
        "smear_lambda": (1,),
        "backout_lambda": (1,),
    }
    for i in range(3):
        block = f"transformer.h.{i}"
        wanted |= {
            f"{block}.attn.c_q.weight": (4 * head, width),
            f"{block}.attn.c_k.weight": (kv, width),
            f"{block}.attn.c_v.weight": (kv, width),
            f"{block}.attn.c_proj.weight": (width, width),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
        }
    for i in (0, 2):  # every second layer, and always the last
        wanted[f"value_embeds.{i}.weight"] = (vocabulary, kv)
        wanted[f"transformer.h.{i}.attn.ve_gate.weight"] = (2, 12)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == wanted


def is_uniform(weight: Tensor, low: float, high: float) -> bool:
    """Inside the bounds, near both, with the mean and deviation of the uniform distribution."""
    weight, span = weight.detach(), high - low
    return (
        low <= float(weight.min()) < low + 0.01 * span
        and high - 0.01 * span < float(weight.max()) <= high
        and abs(float(weight.mean()) - (low + high) / 2) < 0.01 * span
        and abs(float(weight.std()) / (span / math.sqrt(12)) - 1) < 0.02
    )


def is_normal(weight: Tensor, std: float) -> bool:
    weight = weight.detach()
    return (
        abs(float(weight.std()) / std - 1) < 0.02
        and abs(float(weight.mean())) < 0.02 * std
        and float(weight.abs().max()) > 3 * std
    )


def test_initial_weights_follow_the_distributions_of_nanochat() -> None:
    model = GPT(replace(SMALL, vocab_size=1024, n_embd=192))
    model.init_weights(torch.Generator().manual_seed(0))
    bound = math.sqrt(3 / 192)
    assert is_normal(model.transformer.wte.weight, 0.8)
    assert is_normal(model.lm_head.weight, 0.001)
    for table in model.value_embeds.parameters():
        assert is_uniform(table, -bound, bound)
    for block in model.transformer.h:
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
            assert is_uniform(linear.weight, -bound, bound)
        assert is_uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
        assert not block.attn.c_proj.weight.any()
        assert not block.mlp.c_proj.weight.any()
    gates = [block.attn.ve_gate for block in model.transformer.h if block.attn.ve_gate is not None]
    for gate in (*gates, model.smear_gate):
        assert gate.weight.min().item() >= 0
        assert 0.015 < gate.weight.max().item() <= 0.02


def test_initial_scalars_are_those_of_nanochat() -> None:
    model = GPT(SMALL)
    torch.testing.assert_close(model.resid_lambdas.data, torch.tensor([1.15, 1.10, 1.05]))
    torch.testing.assert_close(model.x0_lambdas.data, torch.tensor([0.20, 0.125, 0.05]))
    assert model.smear_lambda.item() == 0.0
    assert model.backout_lambda.item() == pytest.approx(0.2)


def test_a_single_layer_starts_like_the_first_of_many() -> None:
    model = GPT(replace(SMALL, n_layer=1))
    assert model.resid_lambdas.item() == pytest.approx(1.15)
    assert model.x0_lambdas.item() == pytest.approx(0.20)


def test_a_seed_decides_every_initial_weight() -> None:
    first, second, other = (GPT(SMALL) for _ in range(3))
    first.init_weights(torch.Generator().manual_seed(3))
    second.init_weights(torch.Generator().manual_seed(3))
    other.init_weights(torch.Generator().manual_seed(4))
    random_ones = ("wte", "lm_head", "c_q", "c_k", "c_v", "c_fc", "gate", "value_embeds")
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
        if any(part in name for part in random_ones):
            assert not torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_embd": 50}, r"n_embd 50\b.*\bn_head 4\b"),
        ({"n_embd": 60}, r"n_embd 60\b.*\bodd\b"),
        ({"n_kv_head": 3}, r"n_head 4\b.*\bn_kv_head 3\b"),
        ({"n_embd": 16}, r"n_embd 16\b.*\b24\b"),
        ({"window_pattern": ""}, "window_pattern ''"),
        ({"window_pattern": "SXL"}, "window_pattern 'SXL'"),
    ],
)
def test_an_impossible_config_is_refused(change: dict[str, int | str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **change)


def test_windows_tile_the_pattern_and_the_last_layer_sees_everything() -> None:
    assert GPTConfig(n_layer=6, window_pattern="SL").windows() == [512, 2048] * 3
    assert GPTConfig(n_layer=5, window_pattern="SSSL").windows() == [512] * 3 + [2048] * 2
    assert GPTConfig(n_layer=2, window_pattern="S").windows() == [512, 2048]
    assert GPTConfig(window_pattern="sssl") == GPTConfig(window_pattern="SSSL")
    # A quarter of the sequence, rounded up to a multiple of 128.
    assert GPTConfig(n_layer=2, sequence_len=520, window_pattern="S").windows() == [256, 520]


# --- the forward pass ----------------------------------------------------------------------------


@torch.inference_mode()
def test_a_position_sees_only_the_past() -> None:
    model, idx = awake_gpt(), random_ids(1, 40)
    changed = idx.clone()
    changed[0, 25] = (changed[0, 25] + 1) % SMALL.vocab_size
    before, after = model(idx), model(changed)
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-5)
    assert (after[:, 25:] - before[:, 25:]).abs().amax(-1).min() > 1e-3


@torch.inference_mode()
def test_logits_cover_the_vocabulary_without_its_padding_and_are_capped() -> None:
    model = awake_gpt()
    model.lm_head.weight.mul_(1000.0)
    logits = model(random_ids(2, 5))
    assert logits.shape == (2, 5, 100)
    assert 0.99 * SOFTCAP < float(logits.abs().max()) <= SOFTCAP


@torch.inference_mode()
def test_ignored_targets_do_not_count() -> None:
    model, idx = awake_gpt(), random_ids(2, 12)
    targets = idx.roll(-1, 1)
    targets[:, :7] = -1
    each = torch.nn.functional.cross_entropy(
        model(idx)[:, 7:].flatten(0, 1), targets[:, 7:].flatten(), reduction="none"
    )
    torch.testing.assert_close(model(idx, targets), each.mean())
    torch.testing.assert_close(model(idx, targets, reduction="sum"), each.sum())


def test_dropout_acts_in_training_only() -> None:
    wet = GPT(SMALL, dropout=0.5)
    wet.load_state_dict(awake_gpt().state_dict())
    idx = random_ids(1, 20)
    with torch.inference_mode():
        assert torch.equal(wet.eval()(idx), awake_gpt()(idx))
        wet.train()
        assert not torch.equal(wet(idx), wet(idx))


@torch.inference_mode()
def test_bf16_autocast_stays_close_to_fp32_and_returns_fp32() -> None:
    model, idx = awake_gpt(), random_ids(2, 150)
    exact = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx)
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().mean() / exact.abs().mean()) < 0.05


# --- soft tokens ---------------------------------------------------------------------------------


def soft(count: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, count, SMALL.n_embd, generator=generator)


def scattered(text: Tensor, audio: Tensor) -> dict[str, Tensor]:
    """The arguments that put `audio` in front of `text` through a mask; audio ids are arbitrary."""
    count = audio.shape[1]
    idx = torch.cat((random_ids(len(text), count, seed=9), text), dim=1)
    mask = torch.zeros_like(idx, dtype=torch.bool)
    mask[:, :count] = True
    return {"idx": idx, "audio_features": audio.flatten(0, 1), "audio_mask": mask}


@torch.inference_mode()
def test_prepended_audio_equals_audio_scattered_to_the_same_positions() -> None:
    model, text, audio = awake_gpt(), random_ids(2, 8), soft(15)
    prepended = model(text, audio_features=audio)
    assert prepended.shape == (2, 23, 100)
    torch.testing.assert_close(prepended, model(**scattered(text, audio)), rtol=0, atol=1e-5)
    silent = model(text, audio_features=torch.zeros_like(audio))
    assert (prepended - silent)[:, 15:].abs().max() > 0.01, "the text hears the audio"


@torch.inference_mode()
def test_targets_of_prepended_audio_are_ignored() -> None:
    model, text, audio = awake_gpt(), random_ids(2, 8), soft(15)
    targets = text.roll(-1, 1)
    wanted = torch.nn.functional.cross_entropy(
        model(text, audio_features=audio)[:, 15:].flatten(0, 1), targets.flatten()
    )
    torch.testing.assert_close(model(text, targets, audio_features=audio), wanted)


@torch.inference_mode()
def test_soft_tokens_carry_no_value_embedding_and_no_token() -> None:
    model, arguments = awake_gpt(), scattered(random_ids(2, 8) % 50, soft(15))
    arguments["idx"][:, :15] = 77  # an id that the text does not use
    before = model(**arguments)
    model.transformer.wte.weight[77].add_(5.0)
    for table in model.value_embeds.values():
        table.weight[77].add_(5.0)
    assert torch.equal(model(**arguments), before)
    # The same change does show where the id stands for a token.
    arguments["idx"][:, -1] = 77
    assert (model(**arguments) - before)[:, -1].abs().max() > 0.01


@torch.inference_mode()
def test_scattered_audio_fills_the_mask_in_row_major_order() -> None:
    model, idx, audio = awake_gpt(), random_ids(2, 6), soft(3, rows=1)[0]
    mask = torch.zeros_like(idx, dtype=torch.bool)
    mask[0, 4] = mask[1, 1] = mask[1, 3] = True
    both = model(idx, audio_features=audio, audio_mask=mask)
    first = model(idx[:1], audio_features=audio[:1], audio_mask=mask[:1])
    second = model(idx[1:], audio_features=audio[1:], audio_mask=mask[1:])
    torch.testing.assert_close(both, torch.cat((first, second)), rtol=0, atol=1e-5)


def test_prepended_audio_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"audio_features\b.*\bsegments\b"):
        awake_gpt()(random_ids(2, 4), audio_features=soft(3), segments=torch.ones(2, 4))


def test_a_filled_cache_takes_one_position_at_a_time() -> None:
    model, ids = awake_gpt(), random_ids(1, 12)
    cache = KVCache(1)
    with torch.no_grad():
        model(ids[:, :6], kv_cache=cache)
        with pytest.raises(ValueError, match=r"\bcache\b.*\bposition\b"):
            model(ids[:, 6:], kv_cache=cache)


def test_decoding_asks_the_device_nothing() -> None:
    """Fake tensors have no values: reading one back is an error."""
    idx, step = random_ids(2, 600), random_ids(2, 1)  # Longer than what plain products attend to.
    with FakeTensorMode() as mode, torch.no_grad():
        model = GPT(SMALL)
        cache = KVCache(2)
        model(mode.from_tensor(idx), kv_cache=cache)
        for _ in range(2):
            logits = model(mode.from_tensor(step), kv_cache=cache)
    assert logits.shape == (2, 1, SMALL.vocab_size) and cache.longest == 602


# --- the loss in chunks ---------------------------------------------------------------------------


def test_chunks_of_the_loss_add_up_and_never_hold_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = awake_gpt()
    idx, targets = random_ids(2, 60), random_ids(2, 60)
    targets[:, ::3] = -1
    largest: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, out: largest.append(out.numel()))
    losses, gradients = [], []
    for limit in (1 << 24, 7 * model.config.padded_vocab_size):
        monkeypatch.setattr("omni.model.losses.LOGITS_PER_CHUNK", limit)
        model.zero_grad()
        loss = model(idx, targets)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert max(largest) <= max(limit, 1)
        assert max(largest) == min(limit, 80 * model.config.padded_vocab_size)
        largest.clear()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for chunked, whole in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)
    per_position = model(idx, targets, reduction="none").detach()
    torch.testing.assert_close(per_position.sum() / 80, losses[0], rtol=1e-5, atol=0)
