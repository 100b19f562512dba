"""Schedule, parameter groups, averaged weights, and optimizer state that survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omni.checkpoint.tensor_files import TensorFiles, save_tensors
from omni.config import OptimConfig
from omni.model.batch import Batch
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.lora import LoraShape, is_adapter
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.stream.collate import collate
from omni.train.optim import (
    RATES,
    Optimizers,
    WeightAverage,
    describe_groups,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    rate_share,
    set_rates,
    trainable,
)
from tests.helpers.hf_folders import wrapped
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
    return collate([members], positions=24, stack=2, frame_dim=8, ctc=True)


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
    config = MUON.model_copy(update={"warmup_steps": 10, "steps": 100})
    optimizers = make_optimizers(_model(), config)
    for step, share in ((4, 0.5), (0, 0.1)):  # not one after the other
        set_rates(optimizers, step, config)
        rates = {g["lr"] for o in optimizers.values() for g in o.param_groups}
        assert rates == {1e-2 * share, 3e-2 * share, 2e-2 * share}


def test_a_language_model_that_joins_later_warms_up_then() -> None:
    config = OptimConfig(steps=110, warmup_steps=10, ctc_only_steps=60, ctc_weight=1.0, lr=1.0)
    shares = [rate_share(step, config, first_step=60) for step in (59, 60, 64, 69, 80)]
    usual = [rate_share(step, config) for step in (59, 60, 64, 69, 80)]
    assert shares == [0.0, 0.1 * usual[1], 0.5 * usual[2], *usual[3:]]
    optimizers = make_optimizers(_model(), config)
    set_rates(optimizers, 60, config)
    rates = {g["role"]: g["lr"] for o in optimizers.values() for g in o.param_groups}
    early = {"projector", "ctc_head"}
    assert {rates[role] for role in early} == {usual[1]}
    assert {rates[role] for role in rates.keys() - early} == {shares[1]}


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


def test_each_role_has_its_rate() -> None:
    own = {"projector_lr": 2e-3, "embedding_lr": 3e-3, "unembedding_lr": 4e-3, "scalar_lr": 5e-3}
    model = _model()
    found = _groups(model, OptimConfig(lr=1e-3, **own))
    by_rate: dict[float, set[str]] = {}
    for name, (_, rate, _) in found.items():
        by_rate.setdefault(rate, set()).add(name)
    assert by_rate[2e-3] == {"projector.fc1.weight", "projector.fc2.weight"}
    assert by_rate[3e-3] == {"lm.transformer.wte.weight", "lm.value_embeds.1.weight"}
    assert by_rate[4e-3] == {"lm.lm_head.weight"}
    gates = {"lm.smear_gate.weight", "lm.transformer.h.1.attn.ve_gate.weight"}
    lambdas = {f"lm.{name}" for name in ("resid_lambdas", "x0_lambdas", "smear_lambda")}
    assert by_rate[5e-3] == {*gates, *lambdas, "lm.backout_lambda"}
    rest = {name for name in found if name.startswith(("ctc_head.", "lm.transformer.h."))}
    assert by_rate[1e-3] == rest - gates


def test_roles_of_a_transformers_model_are_those_of_its_modules() -> None:
    lm = wrapped("llama", tie_word_embeddings=False)
    model = OmniModel(OmniConfig(lm.config, feature_dim=8, projector="swiglu", ctc=True), lm)
    model.train_parts(["projector", "lm"])
    config = OptimConfig(lr=1e-3, embedding_lr=3e-3, unembedding_lr=4e-3, scalar_lr=5e-3)
    found = _groups(model, config)
    rates = {name.removeprefix("lm.model."): rate for name, (_, rate, _) in found.items()}
    assert rates["model.embed_tokens.weight"] == 3e-3 and rates["lm_head.weight"] == 4e-3
    assert rates["model.norm.weight"] == rates["model.layers.0.input_layernorm.weight"] == 5e-3
    assert rates["model.layers.0.mlp.gate_proj.weight"] == 1e-3
    tied = wrapped("llama", tie_word_embeddings=True)
    roles = {
        g["role"]
        for g in describe_groups(
            make_optimizers(OmniModel(OmniConfig(tied.config, feature_dim=8), tied), config)
        )
    }
    assert roles == {"projector", "embeddings", "matrices", "scalars"}


def test_vectors_take_no_weight_decay_and_no_name_escapes_it() -> None:
    lm = wrapped("llama")
    listening = OmniModel(OmniConfig(lm.config, feature_dim=8, projector="swiglu", ctc=True), lm)
    for model in (_model(), listening):
        found = _groups(model, ADAMW)
        dimensions = {name: p.ndim for name, p in model.named_parameters()}
        decays = {name: decay for name, (_, _, decay) in found.items()}
        assert decays == {name: 0.1 if dimensions[name] > 1 else 0.0 for name in decays}
        assert any("gate" in name for name in decays)


def test_a_step_at_the_peak_decays_all_matrices_by_the_same_share() -> None:
    """Whatever their group's rate: Muon's is many times that of AdamW."""
    model = _model()
    config = OptimConfig(lr=1e-3, projector_lr=5e-3, muon_lr=2e-2, weight_decay=0.5)
    before = _weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in make_optimizers(model, config).values():
        optimizer.step()
    for name, value in _weights(model).items():
        kept = 1 - 1e-3 * 0.5 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value, before[name] * kept, rtol=1e-6, atol=0.0)


def test_groups_are_listed_for_the_record() -> None:
    groups = {group["role"]: group for group in describe_groups(make_optimizers(_model(), MUON))}
    assert groups.keys() == RATES.keys() - {"adapters", "mix", "summary"}
    assert groups["matrices"] == {
        **{"role": "matrices", "optimizer": "muon", "lr": 2e-2, "first_step": 0},
        **{"weight_decay": 0.05, "tensors": 12, "parameters": 2 * (3 * 32 * 32 + 8 * 32 * 32)},
    }
    assert groups["projector"]["lr"] == 3e-2


@pytest.mark.parametrize(("given", "rate"), [(None, 0.03), (0.2, 0.2)])
def test_weights_of_layers_move_faster_than_matrices(given: float | None, rate: float) -> None:
    model = OmniModel(OmniConfig(GPT, feature_dim=8, layers=3, summary_tokens=2))
    found = _groups(model, ADAMW.model_copy(update={"mix_lr": given}))
    assert found["mix.logits"] == ("adamw", rate, 0.0)
    assert found["summary.out"][1] == ADAMW.lr
    assert "summary.centre" not in found and "summary.gain" not in found


def test_adapters_have_their_own_rate_also_beside_muon() -> None:
    model = OmniModel(OmniConfig(GPT, feature_dim=8, lora=LoraShape(2, 4)))
    model.train_parts(["projector", "lora"])
    found = _groups(model, MUON.model_copy(update={"lora_lr": 7e-3}))
    adapters = {name: rest for name, rest in found.items() if is_adapter(name)}
    assert adapters and {rest[:2] for rest in adapters.values()} == {("adamw", 7e-3)}


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
    assert list(muon.values()) == [[2e-2, 0.05]] * 12
    assert found["lm.transformer.wte.weight"] == ("adamw", 1e-2, 0.1)
    assert found["projector.fc1.weight"] == ("adamw", 3e-2, pytest.approx(0.1 / 3))


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
    stored = _stored(dict(optimizer_tensors(optimizers, model)), tmp_path)
    saved = _weights(model)
    _train(model, optimizers, range(3, 6))

    fresh = _model(seed=1)
    fresh.load_state_dict(saved)
    without = make_optimizers(fresh, config)
    _train(fresh, without, range(3, 6))
    assert not _same(_weights(fresh), _weights(model)), "the state matters"

    fresh.load_state_dict(saved)
    restored = make_optimizers(fresh, config)
    with stored:
        load_optimizer_tensors(restored, fresh, stored)
    _train(fresh, restored, range(3, 6))
    assert _same(_weights(fresh), _weights(model))


def _stored(tensors: dict[str, Tensor], folder: Path) -> TensorFiles:
    save_tensors(tensors, folder / "optimizer.safetensors")
    return TensorFiles([folder / "optimizer.safetensors"], {})


def test_state_is_named_by_optimizer_parameter_and_field() -> None:
    model = _model()
    optimizers = make_optimizers(model, MUON)
    assert dict(optimizer_tensors(optimizers, model)) == {}, "nothing before the first step"
    _train(model, optimizers, range(1))
    tensors = dict(optimizer_tensors(optimizers, model))
    assert tensors["adamw/projector.fc1.weight/step"].item() == 1.0
    assert tensors["adamw/projector.fc2.weight/exp_avg"].shape == (32, 32)
    assert "muon/lm.transformer.h.0.mlp.c_fc.weight/momentum_buffer" in tensors


def test_state_of_an_unknown_parameter_is_an_error(tmp_path: Path) -> None:
    model = _model()
    with (
        _stored({"adamw/lm.nothing/step": torch.ones(())}, tmp_path) as stored,
        pytest.raises(KeyError, match="lm.nothing"),
    ):
        load_optimizer_tensors(make_optimizers(model, ADAMW), model, stored)


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = _model()
    optimizers = make_optimizers(model, ADAMW)
    _train(model, optimizers, range(1))
    tensors = dict(optimizer_tensors(optimizers, model))
    with _stored(tensors, tmp_path) as stored, pytest.raises(KeyError, match=r"\.attn\.c_"):
        load_optimizer_tensors(make_optimizers(model, MUON), model, stored)
