"""Settings: YAML, dotted overrides, and errors that name the field and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import omni
from omni.config import Config, load_config, parse_config
from omni.errors import ConfigError

Written = Callable[[str], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def _error(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# -- values ------------------------------------------------------------------------------------


def test_defaults_need_no_file() -> None:
    config = load_config(None)
    assert config == Config()
    assert config.data.train == ["embedded:train"] and config.encoder.weights == "embedded"


def test_yaml_sets_and_the_command_line_overrides(written: Written) -> None:
    path = written("optim: {lr: 1.0e-2, steps: 7}\nrun: {name: mine}\n")
    assert load_config(path).optim.lr == 1e-2
    config = load_config(path, ["--optim.lr", "0.5", "--train.workers=2"])
    assert (config.optim.lr, config.optim.steps) == (0.5, 7)
    assert (config.run.name, config.train.workers) == ("mine", 2)
    assert config.optim.warmup_steps == Config().optim.warmup_steps


def test_an_empty_file_is_all_defaults(written: Written) -> None:
    assert load_config(written("# nothing yet\n")) == Config()


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-4"])
def test_a_rate_may_be_written_in_any_way(written: Written, text: str) -> None:
    """YAML 1.1 reads 3e-4 as a string."""
    assert load_config(None, ["--optim.lr", text]).optim.lr == 3e-4
    assert load_config(written(f"optim:\n  lr: {text}\n")).optim.lr == 3e-4


def test_values_of_every_kind(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            *("--encoder.gpus", "0.25", "--data.cache", "null", "--eval.patience", "4"),
            *("--optim.betas", "[0.8, 0.99]", "--data.prompt=", "--train.max_failures", "-1"),
            *("--data.test", "embedded:test", "--run.storage", str(tmp_path)),
        ],
    )
    assert config.encoder.gpus == 0.25 and config.eval.patience == 4
    assert config.data.cache is None and config.cache_dir is None
    assert config.optim.betas == (0.8, 0.99) and config.data.prompt == ""
    assert config.train.max_failures == -1 and config.data.test == ["embedded:test"]
    assert config.run_dir == tmp_path / "omni"


def test_a_repeated_override_collects_a_list() -> None:
    config = load_config(None, ["--data.train", "a.jsonl", "--data.train", "b.jsonl"])
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert load_config(None, ["--data.train", "[a.jsonl, b.jsonl]"]) == config


def test_folders_are_absolute_for_workers_that_start_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["--run.storage", "out", "--run.name", "a"])
    assert config.run_dir == tmp_path / "out" / "a"
    assert config.cache_dir == tmp_path / "out" / "cache"
    assert load_config(None, ["--data.cache", "kept"]).cache_dir == tmp_path / "kept"


def test_settings_cannot_be_changed_afterwards() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim = config.optim  # type: ignore[misc]


def test_a_written_config_reads_back_the_same(written: Written) -> None:
    overrides = [
        *(
            "--optim.muon_lr",
            "2e-2",
            "--data.prompt",
            "« Écris tout »",
            "--optim.betas=[0.5,0.6]",
        ),
        *("--data.train", "x.jsonl", "--data.train", "y.jsonl", "--model.train", "[projector]"),
        *("--run.seed", "7", "--eval.patience", "3", "--data.cache", "null"),
    ]
    for config in (Config(), load_config(None, overrides)):
        assert load_config(written(config.to_yaml())) == config
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_every_configuration_of_the_project_is_valid() -> None:
    found = sorted((Path(omni.__file__).parents[1] / "configs").glob("*.yaml"))
    assert found
    for path in found:
        assert load_config(path).optim.steps > 0


# -- errors ------------------------------------------------------------------------------------


def test_an_unknown_field_gets_a_suggestion_and_the_list_of_fields(written: Written) -> None:
    for message in (
        _error(None, "--optim.warmup", "3"),
        _error(written("optim:\n  warmup: 3\n")),
    ):
        assert message.startswith("optim.warmup: unknown field (did you mean warmup_steps?); ")
        assert "expected one of: bin_positions, bins_per_step, " in message and "ema" in message
    assert "did you mean" not in _error(None, "--optim.zzz", "3")


def test_an_unknown_section_gets_a_suggestion_and_the_list_of_sections() -> None:
    message = _error(None, "--optimizer.lr", "3")
    assert message == (
        "optimizer: unknown field (did you mean optim?); "
        "expected one of: run, data, augment, encoder, tokenizer, model, optim, train, eval"
    )


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--optim.steps", "many", "optim.steps: Input should be a valid integer"),
        ("--optim.steps", "2.5", "optim.steps: Input should be a valid integer"),
        ("--optim.steps", "0", "optim.steps: Input should be greater than 0, got 0"),
        ("--optim.lr", "-1", "optim.lr: Input should be greater than 0, got -1"),
        ("--optim.lr", ".nan", "optim.lr: Input should be greater than 0, got nan"),
        ("--optim.betas", "0.9", "optim.betas: Input should be a valid tuple, got 0.9"),
        ("--data.max_rejects", "5", "data.max_rejects: Input should be less than or equal to 1"),
        ("--model.train", "3", "model.train.0: Input should be 'projector', 'lm' or 'lora', got 3"),
        ("--encoder.mode", "trimmed", "encoder.mode: Input should be 'trim' or 'full', got 'tri"),
        ("--run.name", "a/b", "run.name: String should match pattern"),
        ("--run.seed", "-1", "run.seed: Input should be greater than or equal to 0, got -1"),
        (
            "--model.train",
            "[encoder]",
            "model.train.0: Input should be 'projector', 'lm' or 'lora'",
        ),
        ("--model.train", "[]", "model: train: expected at least one of projector, lm"),
        ("--tokenizer.vocab_size", "100", "tokenizer.vocab_size: Input should be greater than or"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_was_expected(
    flag: str, value: str, message: str
) -> None:
    assert _error(None, flag, value).startswith(message)


def test_each_wrong_field_has_its_line() -> None:
    lines = _error(None, "--optim.lr", "x", "--train.workers", "0", "--eval.evry", "2").split("\n")
    assert [line.partition(":")[0] for line in lines] == ["optim.lr", "train.workers", "eval.evry"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.yaml"
    assert _error(missing) == f"--config {missing}: No such file or directory"
    assert _error(tmp_path) == f"--config {tmp_path}: Is a directory"


def test_a_file_that_is_not_yaml(written: Written) -> None:
    assert "config.yaml: not YAML: " in _error(written("optim: [1, 2\nrun: }"))
    path = written("")
    path.write_bytes(b"\xff\xfe\x00 binary")
    assert "config.yaml: not YAML: " in _error(path)


def test_a_file_that_holds_no_sections(written: Written) -> None:
    assert _error(written("- optim\n- data\n")).endswith("expected sections, found list")
    assert _error(written("just text\n")).endswith("expected sections, found str")
    assert _error(written("optim: 3\n")).startswith("optim: Input should be a valid dictionary")
    assert _error(written("1: 2\n")).startswith("1: Keys should be strings")


@pytest.mark.parametrize("arguments", [["--optim.lr"], ["--optim.lr", "--optim.steps", "3"]])
def test_an_override_without_a_value(arguments: list[str]) -> None:
    assert _error(None, *arguments) == "--optim.lr: expected a value"


@pytest.mark.parametrize("argument", ["--lr", "lr", "-x", "optim.lr=3", "--lr=0.5", "--"])
def test_an_argument_that_is_no_setting(argument: str) -> None:
    message = f"{argument}: unknown argument; settings are --section.field VALUE"
    assert _error(None, argument, "3") == message


def test_an_override_inside_a_value(written: Written) -> None:
    assert _error(written("optim: 3\n"), "--optim.lr", "1") == "optim.lr: optim is not a section"
    assert _error(None, "--optim.lr.peak", "1").startswith("optim.lr: Input should be a valid numb")


@pytest.mark.parametrize("value", ["a: b: c", "[half a list", "@name", "%d", "*star", "!bang"])
def test_an_override_that_is_not_yaml(value: str) -> None:
    assert _error(None, "--optim.lr", value).startswith("--optim.lr")


@pytest.mark.parametrize("value", ["2024", "yes", "Write down:", "1.5"])
def test_text_on_the_command_line_stays_text(value: str) -> None:
    assert load_config(None, ["--data.prompt", value]).data.prompt == value


def test_one_override_of_a_list_is_a_list_of_one() -> None:
    assert load_config(None, ["--model.train", "projector"]).model.train == ["projector"]


# -- augmentation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        (["--augment.speed", "3"], "augment.speed.0: Input should be less than or equal to 2"),
        (["--augment.speed", "[]"], "augment: speed: expected different factors"),
        (["--augment.speed", "[1.0, 1.0]"], "augment: speed: expected different factors"),
        (["--augment.gain_db", "[6, -6]"], "augment.gain_db: expected [least, most]"),
        (["--augment.noise_probability", "0.5"], "augment: noise: expected a manifest"),
        (["--augment.noise", "n.jsonl"], "augment: noise_probability: at 0 no noise is added"),
        (["--augment.reverb", "r.jsonl"], "augment: reverb_probability: at 0 no reverb is added"),
        (["--augment.time_mask_share", "1.5"], "augment.time_mask_share: Input should be less"),
        (["--augment.speeds", "[0.9]"], "augment.speeds: unknown field (did you mean speed?)"),
    ],
)
def test_what_augmentation_cannot_do_is_said(settings: list[str], said: str) -> None:
    assert _error(None, *settings).startswith(said)


@pytest.mark.parametrize(
    "settings, share",
    [
        ([], 1.0),
        (["--augment.speed", "[0.9, 1.0, 1.1]"], 1 / 3),
        (["--augment.speed", "0.9"], 0.0),
        (["--augment.gain_probability", "0.5", "--augment.telephone_probability", "0.5"], 0.25),
        (["--augment.time_masks", "1"], 0.0),
        (["--augment.gain_db", "[-9, 9]"], 1.0),
    ],
)
def test_the_share_that_an_epoch_leaves_alone(settings: list[str], share: float) -> None:
    assert load_config(None, settings).augment.clean_share == pytest.approx(share)
