"""What is fed with damaged input, and what counts as an answer.

Each target takes a folder and a seed, and returns one word: "refused" (exit 2, with a message),
"rejected" (the run goes on and says what it left out), or "accepted" (the damage does not matter).
Anything else that happens is a crash.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from safetensors.torch import load_file

import omni
from jobs import cli
from omni.audio.decode import AudioError, decode, fit, measure
from omni.audio.windows import SAMPLING_RATE
from omni.checkpoint.checkpoint import read_checkpoint
from omni.checkpoint.resume import newest_checkpoint
from omni.checkpoint.save import save_checkpoint
from omni.checkpoint.train_state import TrainState
from omni.config import load_config
from omni.errors import ConfigError
from omni.model.download import SourceError
from omni.model.lm.nanochat import load_nanochat
from omni.model.lm.pretrained import find_pretrained
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.run.prepare import prepare
from omni.stream.feature_cache import FeatureCache
from tests.fuzz.addresses import addresses
from tests.fuzz.bombs import bombs
from tests.fuzz.mutate import as_json, mutate_bytes, mutate_value
from tests.fuzz.shapes import corpus
from tests.fuzz.terminal import terminal
from tests.fuzz.wrong_headers import disagreement, wrong_header

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROOT = Path(omni.__file__).parents[1]
NANOCHAT = ROOT / "tests" / "model" / "nanochat"
ROWS = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()][:8]

Target = Callable[[Path, random.Random], str]


def manifest(folder: Path, rng: random.Random) -> str:
    """Manifest rows and bytes, through everything that happens before a run starts."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for row in ROWS:
            (corpus / Path(row["audio"]).name).symlink_to(ASSETS / row["audio"])
    rows: list[Any] = [{**row, "audio": Path(row["audio"]).name} for row in ROWS]
    at = rng.randrange(len(rows))
    if rng.random() < 0.3:
        rows[at] = _conversation(rows[at])
    if rng.random() < 0.6:
        rows[at] = mutate_value({**rows[at], "offset": 0.1, "duration": 0.5}, rng)
        data = b"".join(as_json(row) + b"\n" for row in rows)
    else:
        data = mutate_bytes(b"".join(as_json(row) + b"\n" for row in rows), rng)
    path = corpus / "manifest.jsonl"
    path.write_bytes(data)
    config = ["--data.train", str(path), "--data.max_rejects", "1", "--data.cache", "null"]
    return _prepared([*config, "--optim.steps", "4", "--tokenizer.vocab_size", "300"], path)


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    spoken = [{"audio": row["audio"], "offset": 0.1, "duration": 0.5}, {"text": "What is it?"}]
    return {
        "id": row["id"],
        "messages": [
            {"role": "system", "content": "Listen."},
            {"role": "user", "content": spoken},
            {"role": "assistant", "content": row["text"]},
        ],
    }


def _prepared(overrides: list[str], manifest: Path) -> str:
    said = io.StringIO()
    prepared = None

    def job() -> None:
        nonlocal prepared
        prepared = prepare(load_config(None, overrides))

    with contextlib.redirect_stderr(said):
        code = cli.run_job(job)
    if code == 2:
        assert said.getvalue().startswith("error: "), said.getvalue()
        return "refused"
    assert code == 0 and prepared is not None
    lines = sum(bool(line.strip()) for line in manifest.read_bytes().split(b"\n"))
    left_out = [r for r in prepared.rejects if r.reason != "longer than a bin"]
    assert prepared.splits["train"].table.num_rows + len(left_out) >= lines, "a row got lost"
    return "rejected" if prepared.rejects else "accepted"


def config(folder: Path, rng: random.Random) -> str:
    """Configuration files, as values and as bytes."""
    source = rng.choice(sorted((ROOT / "configs").glob("*.yaml")))
    path = folder / "config.yaml"
    if rng.random() < 0.7:
        values = yaml.safe_load(source.read_text())
        for _ in range(rng.randint(1, 3)):
            values = mutate_value(values, rng)
        path.write_text(yaml.safe_dump(values))
    else:
        path.write_bytes(mutate_bytes(source.read_bytes(), rng))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.run_job(lambda: _load(path))
    assert code in (0, 2), f"exit code {code}: {said.getvalue()}"
    assert code == 0 or said.getvalue().startswith("error: ")
    return "refused" if code else "accepted"


def _load(path: Path) -> None:
    assert load_config(path).to_yaml()


def cache(folder: Path, rng: random.Random) -> str:
    """Shards of the feature cache: what comes back is what was put there, or nothing."""
    location = folder / "cache"
    if not location.exists():
        for shard in range(3):
            store = FeatureCache(location)
            store.put({f"{shard}-{n}": _feature(shard, n) for n in range(8)})
            store.flush()
    first = sorted(path for path in location.rglob("*") if path.is_file())
    path = rng.choice(first)
    whole = path.read_bytes()
    path.write_bytes(mutate_bytes(whole, rng))
    try:
        store = FeatureCache(location)
        found = store.get([f"{shard}-{n}" for shard in range(3) for n in range(8)])
        for key, data in found.items():
            shard, n = map(int, key.split("-"))
            assert data == _feature(shard, n), f"{key} came back as something else"
        store.put({"new": b"new"})
        store.flush()
        assert FeatureCache(location).get(["new"]) == {"new": b"new"}
        return "rejected" if len(found) < 24 else "accepted"
    finally:
        for extra in set(location.rglob("*")) - {*first, location / "keys"}:
            extra.unlink()
        path.write_bytes(whole)


def recording(folder: Path, rng: random.Random) -> str:
    """Recordings with wrong headers or flipped bits: the audio of an accepted one is all there."""
    row = ROWS[rng.randrange(len(ROWS))]
    audio, rate = soundfile.read(ASSETS / row["audio"], dtype="float32")
    data = wrong_header(audio, rate, rng)
    if rng.random() < 0.2:
        data = mutate_bytes(data, rng)
    path = folder / "recording"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        samples = measure(path)
        audio = fit(decode(path, samples=samples), samples)
    except AudioError as error:
        assert str(path) in error.detail or error.reason == "length mismatch"
        return "rejected"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10, f"{len(data)} bytes took {grown >> 10} MiB"
    differs = disagreement(data, samples / SAMPLING_RATE)
    assert differs is None, differs
    return "accepted"


def _feature(shard: int, n: int) -> bytes:
    return random.Random(shard * 100 + n).randbytes(300 + 50 * n)


def checkpoint(folder: Path, rng: random.Random) -> str:
    """Checkpoints: damage is found, the one before is used, and nothing is unpickled."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.exists():
        for step in (1, 2):
            _checkpoint(checkpoints, step)
    newest = checkpoints / "step-000002"
    path = rng.choice(sorted(newest.iterdir()))
    whole = path.read_bytes()
    damaged = mutate_bytes(whole, rng)
    path.write_bytes(damaged)
    try:
        reasons: list[str] = []
        found = newest_checkpoint(checkpoints, reasons)
        assert found is not None
        if damaged == whole or path.suffix == ".json" and _says_the_same(damaged, whole):
            assert found.path == newest.resolve()
            return "accepted"
        assert found.path == (checkpoints / "step-000001").resolve(), (
            f"{path.name} was taken for whole"
        )
        assert len(reasons) == 1 and "step-000002" in reasons[0]
        found.load_model()
        with contextlib.suppress(ConfigError, RuntimeError):  # jobs say either in one line
            read_checkpoint(newest).load_model()
        return "rejected"
    finally:
        path.write_bytes(whole)


def _says_the_same(one: bytes, other: bytes) -> bool:
    """Whether only blanks between the words of a JSON text differ."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def nanochat(folder: Path, rng: random.Random) -> str:
    """A language model's folder: weights, their description, and a pickled tokenizer."""
    home = folder / "base"
    if not home.exists():
        home.mkdir()
        for name in ("meta_000010.json", "tokenizer.pkl"):
            shutil.copy(NANOCHAT / name, home)
        torch.save(load_file(NANOCHAT / "model_000010.safetensors"), home / "model_000010.pt")
    path = rng.choice(sorted(home.iterdir()))
    whole = path.read_bytes()
    path.write_bytes(mutate_bytes(whole, rng))
    try:
        find_pretrained(f"nanochat:{home}")
        load_nanochat(home)
    except SourceError as error:
        assert str(home) in str(error)
        return "refused"
    finally:
        path.write_bytes(whole)
    return "accepted"  # a number of the weights, or a token's bytes


def _checkpoint(folder: Path, step: int) -> None:
    values = {"sequence_len": 32, "vocab_size": 300, "n_layer": 1, "n_head": 1, "n_kv_head": 1}
    shape = OmniConfig.from_dict({"gpt": {**values, "n_embd": 24}, "feature_dim": 4})
    model = OmniModel(shape)
    model.init_weights(0)
    save_checkpoint(
        folder,
        state=TrainState(step=step),
        model=shape,
        encoder={"source": "embedded"},
        weights={name: p.detach() for name, p in model.named_parameters()},
        optimizer={"adamw/x/step": torch.tensor(1.0)},
        config_yaml="data: {prompt: ''}\n",
        tokenizer_json="{}",
    )


TARGETS: dict[str, Target] = {
    "manifest": manifest,
    "config": config,
    "cache shard": cache,
    "checkpoint": checkpoint,
    "nanochat": nanochat,
    "corpus": corpus,
    "recording": recording,
    "addresses": addresses,
    "bombs": bombs,
    "terminal": terminal,
}


def answer(pipe: Connection, folder: Path) -> None:
    """A process that answers one input after another: (target, seed) in, (word, detail) out.

    The first word, "ready", answers none: a start takes long on a busy machine.
    """
    pipe.send(("ready", ""))
    while True:
        kind, seed = pipe.recv()
        home = folder / kind.replace(" ", "-")
        home.mkdir(exist_ok=True)
        try:
            pipe.send((TARGETS[kind](home, random.Random(seed)), ""))
        except BaseException:
            pipe.send(("CRASH", traceback.format_exc()))
