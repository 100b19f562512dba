"""Whisper's weights come from ModelScope, Hugging Face or a folder; failures name every source.

The real clients run against a hub on loopback, each time in a process of its own: they read their
environment when they are imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.model.download import SourceError
from omni.model.encoder.weights import EMBEDDED_WHISPER, read_whisper_files, whisper_folder
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.lm.pretrained import find_pretrained
from tests.helpers.hf_folders import save_folder
from tests.helpers.loopback_hub import closed_port, serve

LOAD = """
from omni.model.download import SourceError
from omni.model.encoder.whisper import WhisperEncoder
try:
    print("loaded", WhisperEncoder().fingerprint)
except SourceError as error:
    print("SourceError", error)
"""


LOAD_LM = """
import sys
from omni.model.download import SourceError
from omni.model.speech_lm import OmniConfig
from omni.model.lm.pretrained import find_pretrained, load_lm
try:
    found = find_pretrained(sys.argv[1])
    lm = load_lm(OmniConfig(found.shape, 8, source=found.source))
    print("loaded", found.source.fingerprint, lm.width, found.tokenizer.vocab_size)
except SourceError as error:
    print("SourceError", error)
"""


def run_elsewhere(
    home: Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process with empty caches and no other settings."""
    ours = ("WHISPER_", "HF_", "MODELSCOPE_")
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and not name.lower().endswith("_proxy")
    }
    caches = {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "MODELSCOPE_HOME": str(home / "modelscope-home"),
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # a hub that is down is asked once
    }
    return subprocess.run(
        [sys.executable, *command],
        env={**clean, **caches, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def load_elsewhere(home: Path, *arguments: str, script: str = LOAD, **environment: str) -> str:
    """What a script says in a fresh process; LOAD: `WhisperEncoder()`."""
    done = run_elsewhere(home, "-c", script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fetched(paths: list[str]) -> set[str]:
    """Names of the files among requested paths."""
    found = {re.split("[/=]", path)[-1] for path in paths}
    return {name for name in found if "." in name or name == "LICENSE"}


@pytest.fixture(scope="module")
def embedded() -> str:
    return WhisperEncoder("embedded").fingerprint


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded encoder as a hub would have it, next to weights in an older format."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(EMBEDDED_WHISPER, folder, dirs_exist_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted where there are safetensors")
    return folder


# --- hubs ----------------------------------------------------------------------------------------


def test_hugging_face_serves_whisper_base_by_default(
    repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("openai/whisper-base", repository) as hub:
        said = load_elsewhere(tmp_path, HF_ENDPOINT=hub.url, MODELSCOPE_ENDPOINT=hub.url)
    assert said == f"loaded {embedded}"
    assert hub.modelscope == []
    # Nothing is fetched but what is read.
    wanted = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert fetched(hub.hugging_face) == wanted


def test_modelscope_comes_first_where_its_id_is_set(
    repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("someone/whisper", repository) as hub:
        said = load_elsewhere(
            tmp_path,
            WHISPER_MS_ID="someone/whisper",
            WHISPER_HF_ID="someone/whisper",
            HF_ENDPOINT=hub.url,
            MODELSCOPE_ENDPOINT=hub.url,
        )
    assert said == f"loaded {embedded}"
    assert hub.hugging_face == []
    wanted = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert fetched(hub.modelscope) == wanted


def test_hugging_face_serves_what_modelscope_does_not_have(
    repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("someone/whisper", repository) as hub:
        said = load_elsewhere(
            tmp_path,
            WHISPER_MS_ID="someone/absent",
            WHISPER_HF_ID="someone/whisper",
            HF_ENDPOINT=hub.url,
            MODELSCOPE_ENDPOINT=hub.url,
        )
    assert said == f"loaded {embedded}"
    assert hub.modelscope and hub.hugging_face
    assert hub.asked[: len(hub.modelscope)] == hub.modelscope, "ModelScope was asked first"


def test_a_hub_without_weights_counts_as_one_that_failed(
    repository: Path, embedded: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(repository / "config.json", bare)
    with serve("someone/whisper", bare) as first, serve("someone/whisper", repository) as second:
        said = load_elsewhere(
            tmp_path,
            WHISPER_MS_ID="someone/whisper",
            WHISPER_HF_ID="someone/whisper",
            HF_ENDPOINT=second.url,
            MODELSCOPE_ENDPOINT=first.url,
        )
    assert said == f"loaded {embedded}"


def test_hugging_face_serves_while_modelscope_is_down(
    repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("someone/whisper", repository) as hub:
        said = load_elsewhere(
            tmp_path,
            WHISPER_MS_ID="someone/whisper",
            WHISPER_HF_ID="someone/whisper",
            HF_ENDPOINT=hub.url,
            MODELSCOPE_ENDPOINT=closed_port(),
        )
    assert said == f"loaded {embedded}"


def test_when_every_hub_is_down_one_error_names_each_with_its_reason(tmp_path: Path) -> None:
    said = load_elsewhere(
        tmp_path,
        WHISPER_MS_ID="someone/on-modelscope",
        WHISPER_HF_ID="someone/on-hugging-face",
        HF_ENDPOINT=closed_port(),
        MODELSCOPE_ENDPOINT=closed_port(),
    )
    first, modelscope, hugging_face = said.splitlines()
    assert first.startswith("SourceError ")
    assert modelscope.startswith("  ModelScope someone/on-modelscope: ")
    assert hugging_face.startswith("  Hugging Face someone/on-hugging-face: ")
    for line in (modelscope, hugging_face):
        assert "refused" in line


@pytest.mark.parametrize(
    "setting",
    ["encoder.weights hub", pytest.param("model.lm hf:someone/lm", marks=pytest.mark.slow)],
)
def test_a_run_without_its_weights_fails_in_one_error_and_leaves_nothing(
    setting: str, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    done = run_elsewhere(
        tmp_path,
        *(
            "-m",
            "jobs.train",
            "--config",
            "scratch",
            "--run.storage",
            str(storage),
            *f"--{setting}".split(),
        ),
        WHISPER_MS_ID="someone/on-modelscope",
        HF_ENDPOINT=closed_port(),
        MODELSCOPE_ENDPOINT=closed_port(),
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    named = [line for line in lines if line.startswith(("  ModelScope ", "  Hugging Face "))]
    assert len(named) == (2 if setting.startswith("encoder") else 1)
    assert not (storage / "omni").exists()


def test_a_hub_may_hold_pytorch_model_bin_only(embedded: str, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    as_pytorch_bin(folder)
    with serve("openai/whisper-base", folder) as hub:
        said = load_elsewhere(tmp_path, HF_ENDPOINT=hub.url)
    assert "pytorch_model.bin" in fetched(hub.hugging_face)
    assert said == f"loaded {embedded}"


# --- what goes wrong on the way ------------------------------------------------------------------


def by_hugging_face(url: str) -> dict[str, str]:
    return {"WHISPER_HF_ID": "someone/whisper", "HF_ENDPOINT": url}


def by_modelscope(url: str) -> dict[str, str]:
    """The second source is down: what is loaded came from ModelScope."""
    return {
        "WHISPER_MS_ID": "someone/whisper",
        "MODELSCOPE_ENDPOINT": url,
        "HF_ENDPOINT": closed_port(),
    }


HUBS = [by_hugging_face, by_modelscope]
HUBS_IN_TURN = [by_hugging_face, pytest.param(by_modelscope, marks=pytest.mark.slow)]
Environment = Callable[[str], dict[str, str]]


@pytest.mark.parametrize("environment", HUBS)
def test_without_a_network_the_cache_serves(
    environment: Environment, repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("someone/whisper", repository) as hub:
        assert load_elsewhere(tmp_path, **environment(hub.url)) == f"loaded {embedded}"
    assert load_elsewhere(tmp_path, **environment(closed_port())) == f"loaded {embedded}"


@pytest.mark.parametrize("environment", HUBS_IN_TURN)
def test_an_interrupted_download_goes_on_where_it_was(
    environment: Environment, repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("someone/whisper", repository) as hub:
        hub.break_after = 12_000_000  # more than one chunk of the clients
        assert load_elsewhere(tmp_path, **environment(hub.url)) == f"loaded {embedded}"
    assert any(not given.startswith("bytes=0-") for given in hub.ranges), hub.ranges


@pytest.mark.parametrize("environment", HUBS_IN_TURN)
def test_weights_with_another_hash_than_the_hub_names_are_refused(
    environment: Environment, repository: Path, embedded: str, tmp_path: Path
) -> None:
    with serve("someone/whisper", repository) as hub:
        hub.spoil = True
        said = load_elsewhere(tmp_path, **environment(hub.url))
        assert said.startswith("SourceError ")
        assert "hash" in said or "FileDownloadError" in said
        hub.spoil = False
        assert load_elsewhere(tmp_path, **environment(hub.url)) == f"loaded {embedded}"


@pytest.mark.parametrize("environment", HUBS)
def test_a_revision_is_pinned(
    environment: Environment, repository: Path, embedded: str, tmp_path: Path
) -> None:
    name = "WHISPER_MS_ID" if environment is by_modelscope else "WHISPER_HF_ID"
    with serve("someone/whisper", repository, revision="v1.2") as hub:
        pinned = environment(hub.url) | {name: "someone/whisper@v1.2"}
        assert load_elsewhere(tmp_path, **pinned) == f"loaded {embedded}"
    asked = hub.modelscope if environment is by_modelscope else hub.hugging_face
    assert any("v1.2" in path for path in asked)
    assert not any("main" in path or "master" in path for path in asked)


def test_processes_of_a_node_download_once(repository: Path, embedded: str, tmp_path: Path) -> None:
    with (
        serve("someone/whisper", repository) as hub,
        ThreadPoolExecutor(3) as pool,
    ):
        settings = by_hugging_face(hub.url)
        said = list(pool.map(lambda _: load_elsewhere(tmp_path, **settings), range(3)))
    assert said == [f"loaded {embedded}"] * 3
    bodies = [path for path in hub.gets if path.endswith("model.safetensors")]
    assert len(bodies) == 1


# --- language models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("lm"))


@pytest.mark.parametrize("hub_kind", ["hf", pytest.param("ms", marks=pytest.mark.slow)])
def test_a_language_model_comes_from_either_hub(
    hub_kind: str, language_model: Path, tmp_path: Path
) -> None:
    (language_model / "training_args.bin").write_bytes(b"not wanted")
    with serve("someone/lm", language_model) as hub:
        uri = f"{hub_kind}:someone/lm"
        settings = {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url}
        said = load_elsewhere(tmp_path, uri, script=LOAD_LM, **settings)
    local = find_pretrained(f"hf:{language_model}")
    assert local.tokenizer is not None
    assert said.split() == [
        "loaded",
        local.source.fingerprint,
        "64",
        str(local.tokenizer.vocab_size),
    ]
    assert "training_args.bin" not in fetched(hub.hugging_face + hub.modelscope)
    assert bool(hub.modelscope) == (hub_kind == "ms")


def test_a_language_model_that_no_hub_has_is_named(tmp_path: Path) -> None:
    said = load_elsewhere(tmp_path, "hf:someone/lm@v2", script=LOAD_LM, HF_ENDPOINT=closed_port())
    first, second = said.splitlines()
    assert first.startswith("SourceError ")
    assert second.startswith("  Hugging Face someone/lm@v2: ")


# --- folders -------------------------------------------------------------------------------------


def encoder_tensors() -> dict[str, Tensor]:
    return load_file(EMBEDDED_WHISPER / "model.safetensors")


def copy_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(EMBEDDED_WHISPER / "config.json", folder)
    return folder


def as_pytorch_bin(folder: Path) -> None:
    decoder = {"model.decoder.embed_tokens.weight": torch.ones(3, 4)}
    torch.save({**encoder_tensors(), **decoder}, copy_config(folder) / "pytorch_model.bin")


def same_weights(one: WhisperEncoder, other: WhisperEncoder) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_local_folder_is_taken_as_it_is(trim: WhisperEncoder, tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_WHISPER, tmp_path / "whisper")
    assert whisper_folder(str(tmp_path / "whisper")) == tmp_path / "whisper"
    assert same_weights(WhisperEncoder(str(tmp_path / "whisper")), trim)


def test_a_folder_without_config_is_refused_by_name(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SourceError, match=r"\bconfig\.json\b") as caught:
            WhisperEncoder(str(folder))
        assert str(folder) in str(caught.value)


def test_a_folder_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"model\*\.safetensors") as caught:
        WhisperEncoder(str(copy_config(tmp_path)))
    assert str(tmp_path) in str(caught.value)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    config = json.loads((EMBEDDED_WHISPER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(SourceError, match=r"\bmodel_type\b.*'bert'.*\bwhisper\b"):
        WhisperEncoder(str(tmp_path))


def test_a_folder_may_hold_pytorch_model_bin(trim: WhisperEncoder, tmp_path: Path) -> None:
    as_pytorch_bin(tmp_path)
    encoder = WhisperEncoder(str(tmp_path))
    assert same_weights(encoder, trim)
    assert encoder.fingerprint == trim.fingerprint


def test_the_decoder_is_not_loaded(trim: WhisperEncoder, tmp_path: Path) -> None:
    decoder = {name: torch.ones(3) for name in ("model.decoder.layer_norm.weight", "proj_out.bias")}
    save_file({**encoder_tensors(), **decoder}, copy_config(tmp_path) / "model.safetensors")
    _, state = read_whisper_files(tmp_path)
    assert not [name for name in state if "decoder" in name or "proj_out" in name]
    assert "layers.0.self_attn.q_proj.weight" in state
    encoder = WhisperEncoder(str(tmp_path))
    assert same_weights(encoder, trim)
    assert encoder.fingerprint == trim.fingerprint, "the decoder does not count"


def test_shards_and_a_shorter_prefix_are_the_same_encoder(
    trim: WhisperEncoder, tmp_path: Path
) -> None:
    tensors = {name.removeprefix("model."): t for name, t in encoder_tensors().items()}
    names = sorted(tensors)
    copy_config(tmp_path)
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: tensors[name] for name in half}
        save_file(shard, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert WhisperEncoder(str(tmp_path)).fingerprint == trim.fingerprint


def test_other_weights_have_another_fingerprint(trim: WhisperEncoder, tmp_path: Path) -> None:
    tensors = encoder_tensors()
    tensors["model.encoder.conv1.bias"][0] += 0.5
    save_file(tensors, copy_config(tmp_path) / "model.safetensors")
    assert WhisperEncoder(str(tmp_path)).fingerprint != trim.fingerprint
