"""A folder that transformers loads without omni writes the tokens that omni writes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jobs import export as export_job
from omni.audio.decode import decode as decode_audio
from omni.checkpoint.base import checkpoint_folder
from omni.config import parse_config
from omni.inference.pieces import cut_at_pauses
from omni.inference.standalone.code import code_files
from omni.inference.transcriber import Transcriber
from omni.model.decode import Request, decode
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.lora import LoraShape, merge_lora
from omni.model.lm.pretrained import find_pretrained, load_lm
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.hf_folders import chat_tokenizer, save_folder
from tests.helpers.long_recordings import ASSETS, write_long

ROWS = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()]
# Neither omni nor a network is there. Arguments: a JSON file of folders and files of recordings.
ALONE = """
import json, socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("omni", "jobs", "tests"):
            raise ImportError(f"{name} is blocked")

def refuse(*arguments, **options):
    raise OSError("connections are blocked")

sys.meta_path.insert(0, Blocked())
socket.socket.connect = socket.getaddrinfo = refuse
import soundfile
from transformers import AutoModel, AutoProcessor

found = {}
for folder, files in json.load(open(sys.argv[1])).items():
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert not model.training and model.dtype.itemsize == 4
    inputs = processor([soundfile.read(file, dtype="float32")[0] for file in files], 16_000)
    output = model.generate(**inputs)
    ids = [row[:n] for row, n in zip(output.sequences.tolist(), output.lengths.tolist())]
    said = [(t.text, t.cut) for t in processor.transcripts(output, inputs)]
    last = model(**inputs)
    best = [row[mask][-1].argmax().item() for row, mask in zip(last.logits, last.attention_mask)]
    counts = inputs["window_counts"].tolist()
    found[folder] = {"ids": ids, "said": said, "best": best, "windows": counts}
print(json.dumps(found))
"""


def _alone(folders: dict[Path, list[Path]], place: Path) -> dict[str, Any]:
    """Transcribe recordings in a process of its own."""
    (place / "asked.json").write_text(
        json.dumps({str(folder): [*map(str, files)] for folder, files in folders.items()})
    )
    return json.loads(_python(ALONE, place, str(place / "asked.json")))


def _python(code: str, place: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(place / "modules")},
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _export(checkpoint: str | Path, out: Path, *arguments: str) -> Path:
    given = ["--checkpoint", str(checkpoint), "--to", "transformers", "--out", str(out)]
    assert export_job.main([*given, *arguments]) == 0
    return out


@dataclass(frozen=True)
class Wanted:
    """What omni writes: token ids of each piece, and text of each recording."""

    ids: list[list[int]]
    said: list[list[Any]]


def _by_omni(transcriber: Transcriber, files: list[Path]) -> Wanted:
    """Transcribe by the calls of `Transcriber.answers`, and keep the tokens."""
    messages = transcriber.request("", []).messages
    waves = [soundfile.read(file, dtype="float32")[0] for file in files]
    cut = [list(cut_at_pauses([wave], transcriber.longest_piece)) for wave in waves]
    made = [transcriber.utterance([piece], messages) for pieces in cut for piece in pieces]
    found = decode(
        transcriber.model,
        [Request(utterance.prompt, utterance.features) for utterance in made],
        end=transcriber.template.end,
        settings=transcriber.decoding,
    )
    ids = [choice.answer.ids for choice in found]
    said = [transcriber.text_of([wave]) for wave in waves]
    return Wanted(ids, [[t.text, t.cut] for t in said])


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp32 on every machine, as the folder does."""
    monkeypatch.setattr("omni.model.precision.has_bf16", lambda device: False)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty recordings at 16 kHz, the last one 36 s long."""
    place = tmp_path_factory.mktemp("speech")
    files = [place / f"{number:02d}.wav" for number in range(20)]
    for file, row in zip(files[:19], ROWS, strict=False):
        soundfile.write(file, decode_audio(ASSETS / row["audio"]), 16_000, subtype="FLOAT")
    write_long(files[19], 0.6, pauses=(0.3,))
    return files


def _awaken(module: nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            size = scale * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, size, generator=generator)


def _hf_checkpoint(
    place: Path, kind: str, mode: str, shape: dict[str, Any], lm: dict[str, Any], prompt: str
) -> Path:
    """A checkpoint with adapters in a small language model of transformers, and a CTC head."""
    folder = save_folder(place / "lm", kind, initializer_range=0.3, **lm)
    found = find_pretrained(f"hf:{folder}")
    shaped = OmniConfig(
        found.shape, 384, source=found.source, lora=LoraShape(4, 8), ctc=True, **shape
    )
    model = OmniModel(shaped, load_lm(shaped))
    model.train_parts(["projector", "lora"])
    _awaken(model.projector)
    for name, parameter in model.lm.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    config = parse_config(
        {
            "data": {"prompt": prompt},
            "encoder": {"mode": mode, "dtype": "fp32"},
            "model": {"lm": f"hf:{folder}", "train": ["projector", "lora"]},
            "train": {"precision": "fp32"},
            "eval": {"max_new_tokens": 24},
        }
    )
    return write_checkpoint(place / "checkpoints", config, shaped, model, chat_tokenizer())


def _llama(place: Path) -> Path:
    shape = {"stack": 8, "projector": "swiglu", "projector_hidden": 80}
    tied = {"tie_word_embeddings": True}
    return _hf_checkpoint(place, "llama", "full", shape, tied, "Write <|audio|> down.")


def _gemma(place: Path) -> Path:
    """Sliding windows, a norm of the embeddings, and an encoder's real length."""
    return _hf_checkpoint(place, "gemma3_text", "trim", {"projector": "swiglu"}, {}, "Listen: ")


def _gpt(place: Path) -> Path:
    """Convolutions over mixed layers, features in int8, and pieces of more than a window."""
    tokenizer = SpeechTokenizer.train([row["text"] for row in ROWS], 300)
    gpt = GPTConfig(1024, tokenizer.vocab_size, 2, 2, 1, 32, "SL")
    shape = OmniConfig(gpt, 384, layers=2, stack=8, projector="conv", projector_hidden=48, ctc=True)
    shape = replace(shape, summary_tokens=2)
    model = OmniModel(shape)
    _awaken(model)
    config = parse_config(
        {
            "data": {"language_tag": True, "language": "en"},
            "encoder": {"mode": "trim", "layers": [2, 4], "format": "int8"},
            "eval": {"max_new_tokens": 24, "ctc_weight": 0.3},
        }
    )
    return write_checkpoint(
        place / "checkpoints", config, shape, model, tokenizer, longest_seconds=34.0
    )


def _compared(
    folders: dict[Path, Transcriber], files: list[Path], place: Path
) -> dict[Path, dict[str, Any]]:
    """Compare what is written elsewhere with what omni writes; returns the former."""
    found = _alone(dict.fromkeys(folders, files), place)
    for folder, transcriber in folders.items():
        wanted, got = _by_omni(transcriber, files), found[str(folder)]
        assert got["ids"] == wanted.ids, folder
        assert got["said"] == wanted.said, folder
        assert len({text for text, _ in got["said"]}) > 2, "it hears its audio"
    return {folder: found[str(folder)] for folder in folders}


MAKE = {"llama": _llama, "gemma": _gemma, "gpt": _gpt}


def _merged(checkpoint: Path) -> Transcriber:
    transcriber = Transcriber.load(checkpoint)
    if transcriber.model.config.lora is not None:
        merge_lora(transcriber.model.lm)
    return transcriber


def test_transformers_alone_writes_the_same_tokens(speech: list[Path], tmp_path: Path) -> None:
    """One process loads two folders, whose modules have the same names."""
    tiny, llama = checkpoint_folder("omni-tiny"), _llama(tmp_path / "llama")
    out = tmp_path / "out"
    folders = {
        _export(tiny, out / "tiny"): Transcriber.load(tiny),
        _export(llama, out / "apart", "--adapters", "apart"): Transcriber.load(llama),
    }
    got = _compared(folders, speech[:3], tmp_path)
    assert got[out / "tiny"]["said"][0] == ["Agent logged off.", False]
    assert {t.decoding.decoder for t in folders.values()} == {"joint"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", *MAKE])
def test_twenty_recordings_one_of_them_long(name: str, speech: list[Path], tmp_path: Path) -> None:
    tiny = name == "tiny"
    checkpoint = checkpoint_folder("omni-tiny") if tiny else MAKE[name](tmp_path / name)
    out = _export(checkpoint, tmp_path / "out")
    [got] = _compared({out: _merged(checkpoint)}, speech, tmp_path).values()
    assert len(got["said"]) == 20
    # 36 s are a piece of two windows, or several pieces.
    assert got["windows"][-1] == 2 if name == "gpt" else len(got["windows"]) > 20


@pytest.mark.slow
def test_the_adapter_apart_is_pefts(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = _llama(tmp_path / "llama")
    out = _export(checkpoint, tmp_path / "out", "--adapters", "apart")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / "lm")
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        merged = _merged(checkpoint).model.lm.model(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, merged, atol=1e-2)


@pytest.mark.slow
def test_the_card_says_how_to_use_the_folder(speech: list[Path], tmp_path: Path) -> None:
    out = _export("omni-tiny", tmp_path / "tiny")
    card = (out / "README.md").read_text()
    copies = re.findall(r"`(LICENSE\S*)`", card)
    assert len(copies) == 3 and all((out / name).is_file() for name in copies)
    assert (out / copies[0]).read_text().startswith("MIT License")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "recording.wav").write_bytes(speech[0].read_bytes())
    blocked = ALONE.partition("import soundfile")[0]
    said, twice = _python(blocked + "\n".join(blocks), tmp_path).splitlines()
    assert said == "Agent logged off." and len(ast.literal_eval(twice)) == 2


LOAD = """
import sys
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except (ValueError, RuntimeError) as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_an_error(change: str, tmp_path: Path) -> None:
    out = _export("omni-tiny", tmp_path / "tiny")
    weights = load_file(out / "model.safetensors")
    name = "projector.fc1.weight"
    if change == "missing":
        del weights[name]
    elif change == "shape":
        weights[name] = weights[name][:-1].clone()
    else:
        name = "projector.fc3.weight"
        weights[name] = torch.zeros(2)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    assert "fit" in (said := _python(LOAD, tmp_path, str(out))) or "mismatch" in said
    assert name in said or change == "shape"


BUILT_IN = {"open", "exec", "eval", "compile", "__import__"}
METHODS = {"open", "load", "read_text", "read_bytes", "write_text", "write_bytes", "import_module"}
PACKAGES = {
    *("array", "collections", "contextlib", "dataclasses", "datetime", "functools", "itertools"),
    *("json", "math", "numpy", "re", "regex", "silero_vad", "string", "sys", "tokenizers", "torch"),
    *("transformers", "typing", "unicodedata", "jinja2", "__future__"),
}


def test_the_code_reads_no_files_opens_no_connections_and_unpickles_nothing() -> None:
    files = code_files(adapters=False)
    assert {"modeling_omni.py", "configuration_omni.py", "processing_omni.py"} <= files.keys()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                used = {alias.name.partition(".")[0] for alias in node.names}
                assert used <= PACKAGES, (name, used)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).partition(".")[0] in PACKAGES, (name, node.module)
            elif isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in BUILT_IN, (name, node.lineno)
                assert getattr(node.func, "attr", "") not in METHODS, (name, node.lineno)
    assert code_files(adapters=True).keys() - files.keys() == {"model_lm_lora.py"}


def test_what_cannot_be_kept_apart_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--checkpoint", "omni-tiny", "--out", str(tmp_path / "out"), "--adapters", "apart"]
    for to in ("transformers", "hf"):
        assert export_job.main([*given, "--to", to]) == 2
        assert "--adapters apart: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
