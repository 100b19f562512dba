"""The model card of an exported folder: what it is, how to use it, what its licences are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from omni import __version__
from omni.checkpoint.checkpoint import Checkpoint
from omni.inference.transcriber import longest_piece
from omni.model.decode import Decoding
from omni.stream.encoder_facts import EncoderFacts

_DECODERS = {
    "lm": "by the language model alone",
    "ctc": "by the CTC head alone",
    "joint": "jointly by the language model and the CTC head",
}


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model for its card."""

    encoder: EncoderFacts
    language_model: str
    """Name of a pretrained one, or its shape."""
    adapters: str
    """"apart", "merged" or "none"."""
    projector: str
    step: int
    decoding: Decoding

    @classmethod
    def of(cls, found: Checkpoint, decoding: Decoding, apart: bool) -> CardFacts:
        shape = found.model
        if shape.source is not None:
            language_model = public_name(shape.source.uri)
        else:
            language_model = f"GPT of nanochat's architecture, {shape.lm.width} wide, from scratch"
        return cls(
            EncoderFacts.from_dict(found.encoder),
            language_model,
            "none" if shape.lora is None else "apart" if apart else "merged",
            f"{shape.projector}, {shape.stack} frames per soft token",
            found.state.step,
            decoding,
        )


def public_name(source: str) -> str:
    """Return the name of weights without the folders of this machine."""
    kind, colon, name = source.rpartition(":")
    folder = Path(name).expanduser()
    return f"{kind}{colon}{folder.name}" if folder.is_dir() else source


def model_card(facts: CardFacts, licences: Mapping[str, Sequence[str]], folder: str) -> str:
    """Return README.md. licences: files by what they are of. folder: name of the folder."""
    encoder, longest = facts.encoder, longest_piece(facts.encoder.longest_seconds)
    kept = "whole 30 s windows" if encoder.mode == "full" else "the real length of the audio"
    layers = f", layers {encoder.layers}" if encoder.layers else ""
    needed = ["torch", "transformers", "regex", "silero-vad"]
    needed += ["peft"] if facts.adapters == "apart" else []
    limit = facts.decoding.max_new_tokens
    rows = {
        "encoder": f"Whisper ({public_name(encoder.source)}), frozen, on {kept}{layers}",
        "projector": facts.projector,
        "language model": facts.language_model,
        "adapters": facts.adapters,
        "decoding": f"{_DECODERS[facts.decoding.decoder]} ({facts.decoding})",
        "limit of an answer": f"{limit} tokens" if limit else "12 tokens per second, 16 to 200",
        "training step": f"{facts.step}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [speech-language-model]
---

# {folder}

A speech language model that was trained with omni {__version__}. The folder holds its weights and
all code that it needs besides packages; omni need not be installed.

| part | |
|---|---|
{table}

## Use

```
pip install {" ".join(needed)} soundfile
```

```python
import soundfile
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)

audio, rate = soundfile.read("recording.wav", dtype="float32")  # 16 kHz, mono
[found] = model.transcribe(processor, audio, rate)
print(found.text)
if found.cut:
    print("The text is incomplete: the limit of tokens was reached.")
```

In two steps, and with other settings than those of the training (`generation_config.json`):

```python
inputs = processor([audio, audio], rate)
output = model.generate(**inputs, decoder="lm", max_new_tokens=100)
print([found.text for found in processor.transcripts(output, inputs)])
```

- A recording is an array of 16 kHz, mono, of any length. One of more than {1.25 * longest:.1f} s
  is cut at pauses into pieces of at most {longest:.1f} s, as long as those of the training, for
  which silero-vad is needed.
- In fp32 the tokens are omni's. Weights are stored in half precision where that holds every value
  exactly, and loaded in fp32. In another dtype, or with autocast, results differ by rounding.
- Written with torch {torch.__version__} and transformers {transformers.__version__}.
- `trust_remote_code=True` runs the Python files of this folder. They read no files, open no
  connections and unpickle nothing; weights are safetensors, and missing ones or wrong shapes are
  an error.
- `generate` and `transcribe` are the model's own: generation settings of transformers other than
  `max_new_tokens` and the end token have no effect, and its pipelines do not know the model.

## Licences

{_licences(licences)}
"""


def _licences(licences: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for part, names in licences.items():
        files = ", ".join(f"`{name}`" for name in names)
        missing = "no licence file lay beside the weights; the licence of their source applies"
        lines.append(f"- {part}: {files or missing}")
    return "\n".join(lines)
