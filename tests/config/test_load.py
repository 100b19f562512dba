"""Settings: YAML, dotted overrides, and errors that name the field and what was expected."""

from __future__ import annotations

import re
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


def test_a_renamed_setting_is_named_by_one_line(written: Written) -> None:
    path = written("optim: {listen_steps: 0}\n")
    assert _error(path) == "optim.listen_steps: renamed; expected optim.ctc_only_steps"
    assert load_config(written("optim: {listen_steps: 3, ctc_weight: 1}\n"), of_run=True) == (
        load_config(None, ["--optim.ctc_only_steps", "3", "--optim.ctc_weight", "1"])
    ), "files of runs are read whatever version wrote them"


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
    fields = list(Config().optim.model_dump())
    for message in (
        _error(None, "--optim.warmup", "3"),
        _error(written("optim:\n  warmup: 3\n")),
    ):
        assert message.startswith("optim.warmup: ") and message.endswith(", ".join(fields))
        assert _suggested(message, fields) == {"warmup_steps"}
    assert _suggested(_error(None, "--optim.zzz", "3"), fields) == set()


def test_an_unknown_section_gets_a_suggestion_and_the_list_of_sections() -> None:
    message = _error(None, "--optimizer.lr", "3")
    sections = list(Config.model_fields)
    assert message.startswith("optimizer: ") and message.endswith(", ".join(sections))
    assert _suggested(message, sections) == {"optim"}


def _suggested(message: str, names: list[str]) -> set[str]:
    """The names in a message, without those of the list of all names at its end."""
    return set(re.findall(r"\w+", message.removesuffix(", ".join(names)))) & set(names)


@pytest.mark.parametrize(
    "flag, value, named",
    [
        ("--optim.steps", "many", "optim.steps: .*'many'"),
        ("--optim.steps", "2.5", r"optim.steps: .*\b2\.5\b"),
        ("--optim.steps", "0", r"optim.steps: .*\b0\b.*\b0\b"),
        ("--optim.lr", "-1", r"optim.lr: .*\b0\b.*-1\b"),
        ("--optim.lr", ".nan", r"optim.lr: .*\b0\b.*\bnan\b"),
        ("--optim.betas", "0.9", r"optim.betas: .*\b0\.9\b"),
        ("--data.max_rejects", "5", r"data.max_rejects: .*\b1\b.*\b5\b"),
        ("--model.train", "3", r"model.train.0: .*'projector'.*'lm'.*'lora'.*\b3\b"),
        ("--encoder.mode", "trimmed", "encoder.mode: .*'trim'.*'full'.*'trimmed'"),
        ("--run.name", "a/b", "run.name: .*'a/b'"),
        ("--run.seed", "-1", r"run.seed: .*\b0\b.*-1\b"),
        ("--model.train", "[encoder]", "model.train.0: .*'projector'.*'lm'.*'lora'.*'encoder'"),
        ("--model.train", "[]", r"model: train: .*\bprojector\b.*\blm\b"),
        ("--tokenizer.vocab_size", "100", r"tokenizer.vocab_size: .*\b100\b"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_was_expected(
    flag: str, value: str, named: str
) -> None:
    assert re.match(named, _error(None, flag, value))


def test_each_wrong_field_has_its_line() -> None:
    lines = _error(None, "--optim.lr", "x", "--train.workers", "0", "--eval.evry", "2").split("\n")
    assert [line.partition(":")[0] for line in lines] == ["optim.lr", "train.workers", "eval.evry"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.yaml"
    assert _error(missing).startswith(f"--config {missing}: ")
    assert _error(tmp_path).startswith(f"--config {tmp_path}: ")


def test_a_file_that_is_not_yaml(written: Written) -> None:
    assert re.search(r"config\.yaml: .*YAML", _error(written("optim: [1, 2\nrun: }")))
    path = written("")
    path.write_bytes(b"\xff\xfe\x00 binary")
    assert re.search(r"config\.yaml: .*YAML", _error(path))


def test_a_file_that_holds_no_sections(written: Written) -> None:
    assert re.search(r"config\.yaml: .*\blist\b", _error(written("- optim\n- data\n")))
    assert re.search(r"config\.yaml: .*\bstr\b", _error(written("just text\n")))
    assert re.match(r"optim: .*\b3\b", _error(written("optim: 3\n")))
    assert _error(written("1: 2\n")).startswith("1: ")


@pytest.mark.parametrize("arguments", [["--optim.lr"], ["--optim.lr", "--optim.steps", "3"]])
def test_an_override_without_a_value(arguments: list[str]) -> None:
    assert _error(None, *arguments).startswith("--optim.lr: ")


@pytest.mark.parametrize("argument", ["--lr", "lr", "-x", "optim.lr=3", "--lr=0.5", "--"])
def test_an_argument_that_is_no_setting(argument: str) -> None:
    message = _error(None, argument, "3")
    assert message.startswith(f"{argument}: ") and "--section.field" in message


def test_an_override_inside_a_value(written: Written) -> None:
    assert _error(written("optim: 3\n"), "--optim.lr", "1").startswith("optim.lr: ")
    assert _error(None, "--optim.lr.peak", "1").startswith("optim.lr: ")


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
    "settings, named",
    [
        (["--augment.speed", "3"], r"augment.speed.0: .*\b2\b.*\b3\b"),
        (["--augment.speed", "[]"], "augment: speed: "),
        (["--augment.speed", "[1.0, 1.0]"], "augment: speed: "),
        (["--augment.gain_db", "[6, -6]"], r"augment.gain_db: .*\[6(\.0)?, -6(\.0)?\]"),
        (["--augment.noise_probability", "0.5"], "augment: noise: "),
        (["--augment.noise", "n.jsonl"], "augment: noise_probability: "),
        (["--augment.reverb", "r.jsonl"], "augment: reverb_probability: "),
        (["--augment.time_mask_share", "1.5"], r"augment.time_mask_share: .*\b1\b.*\b1\.5\b"),
        (["--augment.speeds", "[0.9]"], r"augment.speeds: .*\bspeed\b.*\bspeed\b"),
    ],
)
def test_what_augmentation_cannot_do_is_said(settings: list[str], named: str) -> None:
    assert re.match(named, _error(None, *settings))


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


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"encoder": (0.25, 0.3, 1), "train": (0.75, 0.7, 1)}, False),
        ({"encoder": (0.25, 0.3, 1), "train": (0.75, 0.75, 1)}, True),
        ({"encoder": (0.25, 0.2, 3), "train": (0.25, 0.5, 1)}, True),  # three encoders beside it
        ({"encoder": (0.25, 0.2, 2), "train": (0.25, 0.5, 1)}, False),
        ({"encoder": (0.25, 0.3, "auto"), "train": (1, 0.9, 8)}, True),  # four encoders share one
        ({"encoder": (1, 0.9, 2), "train": (1, 0.9, 6)}, False),
    ],
)
def test_processes_that_share_a_gpu_share_its_memory(
    settings: dict[str, tuple[float, float, int | str]], refused: bool
) -> None:
    numbers = {"encoder": "actors", "train": "workers"}
    values = {
        section: {"gpus": gpus, "gpu_memory": share, numbers[section]: count}
        for section, (gpus, share, count) in settings.items()
    }
    if not refused:
        assert parse_config(values).train.gpu_memory == settings["train"][1]
        return
    with pytest.raises(ConfigError, match=r"^encoder\.gpu_memory, train\.gpu_memory: "):
        parse_config(values)


def test_a_share_of_the_memory_needs_a_gpu() -> None:
    for section in ("encoder", "train"):
        message = _error(None, f"--{section}.gpu_memory", "0.5")
        assert message.startswith(f"{section}.gpu_memory: ") and f"{section}.gpus" in message
