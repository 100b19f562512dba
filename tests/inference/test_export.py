"""What is exported writes the same transcripts elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn

import omni
from jobs import export
from omni.config import parse_config
from omni.inference.transcriber import Transcriber, transcribe_files
from omni.model.chat_template import transcription
from omni.model.decode import Decoding, DecodingOptions
from omni.model.lm.generate import generate
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.lora import LoraShape
from omni.model.lm.pretrained import find_pretrained, load_lm
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.hf_folders import chat_tokenizer, save_folder
from tests.helpers.long_recordings import write_long

CORPUS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROWS = [json.loads(line) for line in (CORPUS / "dev.jsonl").read_text().splitlines()][:3]


def _awaken(module: nn.Module, but: str = "") -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not but or not name.startswith(but):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


@pytest.fixture
def speech(tmp_path: Path) -> list[Path]:
    """Recordings as .wav at 16 kHz."""
    files = []
    for number, row in enumerate(ROWS):
        from omni.audio.decode import decode

        files.append(tmp_path / f"{number}.wav")
        soundfile.write(files[-1], decode(CORPUS / row["audio"]), 16_000, subtype="FLOAT")
    return files


def _transcripts(checkpoint: Path, files: list[Path]) -> list[str]:
    transcriber = Transcriber.load(checkpoint)
    prompts, features = [], []
    for file in files:
        audio, _ = soundfile.read(file, dtype="float32")
        utterance = transcriber.utterance([audio], transcription(transcriber.prompt, ""), 0)
        prompts.append(utterance.prompt)
        features.append(utterance.features or ())
    answers = generate(
        transcriber.model,
        prompts,
        features,
        end=transcriber.template.end,
        max_new_tokens=200,
    )
    return [transcriber.template.tokenizer.decode(answer.ids).strip() for answer in answers]


# --- transformers --------------------------------------------------------------------------------


@pytest.fixture
def voxtral_like(tmp_path: Path) -> Path:
    """A checkpoint with a small llama under adapters, in the shape that Voxtral has."""
    lm = save_folder(tmp_path / "lm", tie_word_embeddings=True, initializer_range=0.3)
    found = find_pretrained(f"hf:{lm}")
    shape = OmniConfig(found.shape, 384, source=found.source, lora=LoraShape(4, 8))
    model = OmniModel(shape, load_lm(shape))
    model.train_parts(["projector", "lora"])
    _awaken(model.projector)
    for name, parameter in model.lm.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    config = parse_config(
        {
            "data": {"prompt": "Write <|audio|> down."},
            "encoder": {"mode": "full", "dtype": "fp32"},
            "model": {"lm": f"hf:{lm}", "train": ["projector", "lora"], "projector": "mlp"},
            "train": {"precision": "fp32"},
        }
    )
    return write_checkpoint(tmp_path / "checkpoints", config, shape, model, chat_tokenizer())


@pytest.mark.slow
def test_transformers_alone_writes_the_same_transcripts(
    voxtral_like: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    arguments = ["--checkpoint", str(voxtral_like), "--to", "hf", "--out", str(out)]
    assert export.main(arguments) == 0
    assert "model.safetensors" in capsys.readouterr().out
    wanted = _transcripts(voxtral_like, speech)
    assert len(set(wanted)) > 1, "they hear their audio"
    # A recording of three windows' length, which omni cuts at the same places.
    long = tmp_path / "long.wav"
    write_long(long, 0.25, pauses=(0.3,))
    transcriber = Transcriber.load(voxtral_like, options=DecodingOptions(max_new_tokens=200))
    [line] = transcribe_files(transcriber, [str(long)])
    speech, wanted = [*speech, long], [*wanted, line["text"]]
    # A process that cannot import omni.
    script = out / "transcribe.py"
    guard = "import sys; sys.modules['omni'] = None; sys.argv = sys.argv[1:]; import runpy; "
    done = subprocess.run(
        [sys.executable, "-c", guard + "runpy.run_path(sys.argv[0], run_name='__main__')"]
        + [str(script), *map(str, speech)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == " ".join(wanted).split()
    assert "LONGEST_SECONDS" in script.read_text()
    assert (f"{long}: " in done.stderr) == line.get("cut", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 8, "projector": "swiglu"}, r"model\.projector mlp\b.*\bmodel\.stack 4\b"),
        ({"layers": 2}, "encoder.layers last"),
    ],
)
def test_what_voxtral_has_no_place_for_is_named(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm = save_folder(tmp_path / "lm")
    found = find_pretrained(f"hf:{lm}")
    shape = OmniConfig(found.shape, 384, source=found.source, **changes)
    model = OmniModel(shape, load_lm(shape))
    model.train_parts(["projector"])
    layers = [1, 2] if "layers" in changes else "last"
    config = parse_config(
        {"model": {"lm": f"hf:{lm}", "train": ["projector"]}, "encoder": {"layers": layers}}
    )
    path = write_checkpoint(tmp_path / "checkpoints", config, shape, model, chat_tokenizer())
    arguments = ["--checkpoint", str(path), "--to", "hf", "--out", str(tmp_path / "out")]
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert "encoder.mode full" in error
    assert not (tmp_path / "out").exists()
    assert re.search(message, error.strip())


# --- nanochat ------------------------------------------------------------------------------------

LOAD = """
import json, sys
from pathlib import Path
import soundfile, torch
from safetensors.torch import load_file
from omni.model import load_nanochat
from omni.model.lm.nanochat import find_tokenizer
from omni.model.projector import make_projector, stack_frames
from omni.model.tokenizer import SpeechTokenizer
from omni.model.encoder.whisper import WhisperEncoder
folder = Path(sys.argv[1])
lm, facts = load_nanochat(folder), json.loads((folder / "audio.json").read_text())
shape, encoder = facts["model"], facts["encoder"]
projector = make_projector(
    shape["projector"], shape["stack"], shape["feature_dim"], lm.config.n_embd, None
)
weights = load_file(folder / "audio.safetensors")
projector.load_state_dict({n.removeprefix("projector."): t for n, t in weights.items()})
tokenizer = SpeechTokenizer.load(find_tokenizer(folder))
whisper = WhisperEncoder(encoder["source"], mode=encoder["mode"])
for file in sys.argv[2:]:
    audio, _ = soundfile.read(file, dtype="float32")
    with torch.no_grad():
        soft = projector(stack_frames(whisper.encode([audio])[0], shape["stack"]))[None]
        written = []
        while len(written) < 200:
            ids = torch.tensor([[tokenizer.bos, *written]])
            token = int(lm(ids, audio_features=soft)[0, -1].argmax())
            if token == tokenizer.end:
                break
            written.append(token)
    print(" ".join(tokenizer.decode(written).split()))
"""


def test_a_nanochat_folder_writes_the_same_transcripts(
    speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = SpeechTokenizer.train([row["text"] for row in ROWS], 300)
    shape = OmniConfig(GPTConfig(512, tokenizer.vocab_size, 2, 2, 2, 32, "L"), 384, ctc=True)
    model = OmniModel(shape)
    _awaken(model)
    config = parse_config({"encoder": {"dtype": "fp32"}, "train": {"precision": "fp32"}})
    path = write_checkpoint(tmp_path / "checkpoints", config, shape, model, tokenizer)
    out = tmp_path / "exported"
    arguments = ["--checkpoint", str(path), "--to", "nanochat", "--out", str(out)]
    assert export.main(arguments) == 0
    written = capsys.readouterr()
    assert written.err.count("eval.decode joint") == 1, "nanochat decodes without the head"
    facts = json.loads((out / "audio.json").read_text())
    assert (facts["decode"], facts["ctc_weight"]) == ("joint", Decoding.ctc_weight)
    head = load_file(out / "ctc_head.safetensors")
    assert torch.equal(head["weight"], model.ctc_head.weight)
    assert {Path(line).name for line in written.out.splitlines()} == {
        "model_000007.pt",
        "meta_000007.json",
        "tokenizer.pkl",
        "audio.safetensors",
        "ctc_head.safetensors",
        "audio.json",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out), *map(str, speech)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    wanted = [" ".join(text.split()) for text in _transcripts(path, speech)]
    assert done.stdout.splitlines() == wanted and len(set(wanted)) > 1
    # Once more is refused: nothing is written over.
    assert export.main(arguments) == 2
    assert f"--out: {arguments[-1]}: " in capsys.readouterr().err
    assert export.main([*arguments[:2], "--to", "hf", "--out", str(tmp_path / "other")]) == 2
    assert re.search("--to hf: .*model.lm hf:", capsys.readouterr().err)
