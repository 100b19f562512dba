"""Schedule, parameter groups, averaged weights, and optimizer state that survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni.config import OptimConfig
from omni.model.batch import Batch
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.stream.collate import collate
from omni.train.optim import (
    Optimizers,
    WeightAverage,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    rate_share,
    set_rates,
    trainable,
)
from tests.helpers.utterances import spoken

GPT = GPTConfig(sequence_len=64, vocab_size=60, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
ADAMW = OptimConfig(lr=1e-2, weight_decay=0.1)
MUON = OptimConfig(lr=1e-2, projector_lr=3e-2, muon_lr=2e-2, weight_decay=0.1)


def _model(seed: int = 0) -> OmniModel:
    model = OmniModel(OmniConfig(GPT, feature_dim=8, stack=2, ctc=True))
    model.init_weights(seed)
    return model


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(8, 8, generator=generator)
    text = torch.randint(0, 50, (4,), generator=generator).tolist()
    members = [
        spoken(features, [3], text, bos=50, end=51),
        spoken(features[:5] * 2, [], text[:3], bos=50, end=51),
    ]
    return collate([members], positions=24, stack=2, frame_dim=8)


def _train(model: OmniModel, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        out = model(_batch(step))
        (out.loss + out.ctc).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# -- schedule ----------------------------------------------------------------------------------


def test_warm_up_is_linear_and_the_rest_a_cosine() -> None:
    config = OptimConfig(steps=110, warmup_steps=10, final_lr=0.2)
    assert [rate_share(step, config) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert rate_share(60, config) == pytest.approx(0.6), "half way between peak and end"
    assert rate_share(35, config) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 0.5**0.5))
    assert rate_share(110, config) == pytest.approx(0.2)
    assert rate_share(1_000, config) == pytest.approx(0.2)
    shares = [rate_share(step, config) for step in range(10, 111)]
    assert shares == sorted(shares, reverse=True)


def test_a_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert rate_share(0, OptimConfig(steps=10, warmup_steps=0)) == 1.0


def test_a_run_shorter_than_its_warm_up_never_peaks() -> None:
    config = OptimConfig(steps=5, warmup_steps=10)
    assert [rate_share(step, config) for step in (0, 4)] == [0.1, 0.5]
    assert rate_share(10, config) == 1.0


def test_every_group_follows_its_own_peak() -> None:
    optimizers = make_optimizers(_model(), MUON)
    for share in (0.5, 0.1):  # not one after the other
        set_rates(optimizers, share)
        rates = {g["lr"] for o in optimizers.values() for g in o.param_groups}
        assert rates == {1e-2 * share, 3e-2 * share, 2e-2 * share}


# -- groups ------------------------------------------------------------------------------------


def _groups(model: OmniModel, config: OptimConfig) -> dict[str, tuple[str, float, float]]:
    """(optimizer, rate, weight decay) of each parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (kind, group["lr"], group["weight_decay"])
        for kind, optimizer in make_optimizers(model, config).items()
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_every_parameter_that_trains_is_in_one_group() -> None:
    model = _model()
    for config in (ADAMW, MUON):
        optimizers = make_optimizers(model, config)
        held = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    model.projector.requires_grad_(False)
    assert set(_groups(model, ADAMW)) == set(trainable(model))
    assert not any(name.startswith("projector.") for name in trainable(model))


def test_scalars_gates_and_biases_take_no_weight_decay() -> None:
    found = _groups(_model(), ADAMW)
    undecayed = {name for name, (_, _, decay) in found.items() if decay == 0.0}
    assert undecayed == {
        "lm.resid_lambdas",
        "lm.x0_lambdas",
        "lm.smear_lambda",
        "lm.backout_lambda",
        "lm.smear_gate.weight",
        "lm.transformer.h.1.attn.ve_gate.weight",
        "ctc_head.bias",
    }
    assert {decay for name, (_, _, decay) in found.items() if name not in undecayed} == {0.1}
    assert {(kind, rate) for kind, rate, _ in found.values()} == {("adamw", 1e-2)}


def test_the_projector_may_have_a_rate_of_its_own() -> None:
    found = _groups(_model(), OptimConfig(lr=1e-3, projector_lr=5e-3))
    fast = {name for name, (_, rate, _) in found.items() if rate == 5e-3}
    assert fast == {"projector.fc1.weight", "projector.fc2.weight"}
    assert {rate for name, (_, rate, _) in found.items() if name not in fast} == {1e-3}


def test_muon_takes_the_matrices_of_the_gpt_and_nothing_else() -> None:
    found = _groups(_model(), MUON)
    muon = {name: rest for name, (kind, *rest) in found.items() if kind == "muon"}
    assert set(muon) == {
        f"lm.transformer.h.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in (
            "attn.c_q",
            "attn.c_k",
            "attn.c_v",
            "attn.c_proj",
            "mlp.c_fc",
            "mlp.c_proj",
        )
    }
    assert list(muon.values()) == [[2e-2, 0.1]] * 12
    assert found["lm.transformer.wte.weight"] == ("adamw", 1e-2, 0.1)
    assert found["projector.fc1.weight"] == ("adamw", 3e-2, 0.1)


def test_a_frozen_language_model_leaves_nothing_to_muon() -> None:
    model = _model()
    model.lm.requires_grad_(False)
    assert set(make_optimizers(model, MUON)) == {"adamw"}


# -- averaged weights --------------------------------------------------------------------------


def _moved(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def test_the_average_is_an_exponential_one_with_a_short_memory_at_first() -> None:
    model = _model()
    expected = _weights(model)
    average = WeightAverage(model, decay=0.25)
    for step, decay in enumerate([0.1, 2 / 11, 0.25, 0.25]):
        _moved(model, 1.0 + step)
        average.update(model, step)
        current = _weights(model)
        expected = {n: decay * expected[n] + (1 - decay) * current[n] for n in expected}
        for name, value in average.weights.items():
            torch.testing.assert_close(value, expected[name])


def test_a_long_memory_is_reached_late() -> None:
    model = nn.Linear(1, 1)
    average = WeightAverage(model, decay=0.999)
    nn.init.zeros_(model.weight)
    average.weights["weight"].fill_(1.0)
    average.update(model, step=89)  # 90 / 99
    assert average.weights["weight"].item() == pytest.approx(90 / 99)
    average.weights["weight"].fill_(1.0)
    average.update(model, step=10**6)
    assert average.weights["weight"].item() == pytest.approx(0.999)


def test_swapping_twice_changes_nothing() -> None:
    model = _model()
    average = WeightAverage(model, decay=0.9)
    averaged = {name: value.clone() for name, value in average.weights.items()}
    _moved(model, 0.5)
    current = _weights(model)
    average.swap(model)
    assert _same(_weights(model), averaged) and _same(average.weights, current)
    average.swap(model)
    assert _same(_weights(model), current) and _same(average.weights, averaged)


def test_only_what_trains_is_averaged() -> None:
    model = _model()
    model.lm.requires_grad_(False)
    assert set(WeightAverage(model, 0.9).weights) == set(trainable(model))
    assert not any(name.startswith("lm.") for name in trainable(model))


# -- state across a restart --------------------------------------------------------------------


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "adamw and muon"])
def test_a_restart_repeats_the_next_steps_bit_for_bit(config: OptimConfig, tmp_path: Path) -> None:
    model = _model()
    optimizers = make_optimizers(model, config)
    _train(model, optimizers, range(3))
    state = {name: t.contiguous() for name, t in optimizer_tensors(optimizers, model)}
    save_file(state, tmp_path / "optimizer.safetensors")
    saved = _weights(model)
    _train(model, optimizers, range(3, 6))

    fresh = _model(seed=1)
    fresh.load_state_dict(saved)
    without = make_optimizers(fresh, config)
    _train(fresh, without, range(3, 6))
    assert not _same(_weights(fresh), _weights(model)), "the state matters"

    fresh.load_state_dict(saved)
    restored = make_optimizers(fresh, config)
    load_optimizer_tensors(restored, fresh, load_file(tmp_path / "optimizer.safetensors"))
    _train(fresh, restored, range(3, 6))
    assert _same(_weights(fresh), _weights(model))


def test_state_is_named_by_optimizer_parameter_and_field() -> None:
    model = _model()
    optimizers = make_optimizers(model, MUON)
    assert dict(optimizer_tensors(optimizers, model)) == {}, "nothing before the first step"
    _train(model, optimizers, range(1))
    tensors = dict(optimizer_tensors(optimizers, model))
    assert tensors["adamw/projector.fc1.weight/step"].item() == 1.0
    assert tensors["adamw/projector.fc2.weight/exp_avg"].shape == (32, 32)
    assert "muon/lm.transformer.h.0.mlp.c_fc.weight/momentum_buffer" in tensors


def test_state_of_an_unknown_parameter_is_an_error() -> None:
    model = _model()
    with pytest.raises(KeyError, match="lm.nothing"):
        load_optimizer_tensors(
            make_optimizers(model, ADAMW), model, {"adamw/lm.nothing/step": torch.ones(())}
        )
