"""Find and load pretrained language models and their tokenizers by URI.

nanochat:DIR[@STEP]       a checkpoint folder of nanochat, its newest step if none is named
hf:DIR                    a folder in transformers layout, or with one GGUF file
hf:ID[@REVISION]          the same from Hugging Face; ms:ID[@REVISION] from ModelScope
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from omni.model.download import HubModel, SourceError, fetch
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import (
    HFConfig,
    HFLanguageModel,
    gguf_argument,
    load_pretrained,
    read_config,
    source_error,
)
from omni.model.lm.lm_rows import LMRows, open_hf
from omni.model.lm.nanochat import (
    find_nanochat,
    find_tokenizer,
    load_nanochat,
    open_nanochat,
)
from omni.model.speech_lm import LMSource, OmniConfig
from omni.model.tokenizer import Rendering, SpeechTokenizer

_LM_FILES = ["*.json", "*.jinja", "tokenizer*", "*.model"]
_WEIGHTS = (["model*.safetensors"], ["*.gguf"])


@dataclass(frozen=True)
class Pretrained:
    """Shape, identity and tokenizer of a pretrained language model."""

    shape: GPTConfig | HFConfig
    source: LMSource
    tokenizer: SpeechTokenizer | None
    """None where it was not asked for, because `tokenizer.path` names another."""


def find_pretrained(uri: str, with_tokenizer: bool = True) -> Pretrained:
    """Find a language model, hashing its weights without loading them. Raises SourceError."""
    kind, folder, step = _locate(uri)
    if kind == "nanochat":
        shape, path = find_nanochat(folder, step)
        tokenizer = _nanochat_tokenizer(folder) if with_tokenizer else None
        return Pretrained(shape, LMSource(uri, _digest([path])), tokenizer)
    found = read_config(folder)
    tokenizer = hf_tokenizer(folder) if with_tokenizer else None
    return Pretrained(found, LMSource(uri, _digest(_weight_files(folder))), tokenizer)


def load_lm(config: OmniConfig, frozen: torch.dtype | None = None) -> GPT | HFLanguageModel | None:
    """Load the pretrained language model of `config`; None where it has none.

    frozen: dtype of weights that are not trained; None: fp32.
    Raises SourceError, also where the hash of the weights is not that of `config.source`.
    """
    if config.source is None:
        return None
    kind, folder, step = _verified(config.source)
    if kind == "nanochat":
        model = load_nanochat(folder, step).train()
        return model if frozen is None else model.to(frozen)
    assert isinstance(config.lm, HFConfig)
    lm = HFLanguageModel(config.lm, load_pretrained(folder, frozen or torch.float32))
    lm.check_head()
    return lm


def source_folder(uri: str) -> Path:
    """Return the folder of a language model, downloaded if needed. Raises SourceError."""
    return _locate(uri)[1]


def empty_lm(config: OmniConfig, frozen: torch.dtype | None = None) -> GPT | HFLanguageModel:
    """Build the language model that `load_lm` would load, to be filled by `lm_rows`."""
    if isinstance(config.lm, HFConfig):
        return HFLanguageModel(config.lm, dtype=frozen or torch.float32)
    lm = GPT(config.lm)
    return lm if config.source is None or frozen is None else lm.to(frozen)


def lm_rows(config: OmniConfig, lm: GPT | HFLanguageModel) -> LMRows:
    """Open the published weights of `lm`, without adapters. Raises as `load_lm`, and NotByRows."""
    assert config.source is not None
    kind, folder, step = _verified(config.source)
    if isinstance(lm, HFLanguageModel):
        return open_hf(folder, lm)
    return LMRows.of(open_nanochat(folder, step))


def _verified(source: LMSource) -> tuple[str, Path, int | None]:
    """Locate a language model. Raises SourceError where its weights have another hash."""
    kind, folder, step = _locate(source.uri)
    path = find_nanochat(folder, step)[1] if kind == "nanochat" else None
    found = _digest([path] if path is not None else _weight_files(folder))
    if found != source.fingerprint:
        raise SourceError(
            f"{source.uri}: its weights have the hash {found}, expected {source.fingerprint}, "
            "which the model was trained with"
        )
    return kind, folder, step


def hf_tokenizer(folder: Path) -> SpeechTokenizer:
    """Load the fast tokenizer in a transformers model's folder. Raises SourceError."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **gguf_argument(folder)
        )
        inner = found.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise source_error(folder, "expected a fast tokenizer", error) from None
    if found.eos_token is None:
        raise SourceError(f"{folder}: the tokenizer has no end-of-sequence token")
    adds_bos = found("x").input_ids[:1] == [found.bos_token_id]
    template = found.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    inner.no_padding()
    inner.no_truncation()
    named = {name: t for name, t in found.special_tokens_map.items() if isinstance(t, str)}
    return SpeechTokenizer(
        inner,
        bos_token=found.bos_token if adds_bos else None,
        end_token=found.eos_token,
        chat_template=template,
        rendering=Rendering(named),
    )


def _nanochat_tokenizer(folder: Path) -> SpeechTokenizer:
    path = find_tokenizer(folder)
    try:
        return SpeechTokenizer.load(path)
    except (OSError, ValueError) as error:
        raise SourceError(str(error)) from None


def _locate(uri: str) -> tuple[str, Path, int | None]:
    """Parse a URI to kind, local folder and nanochat step; downloads from a hub if needed."""
    kind, _, name = uri.partition(":")
    if kind == "nanochat":
        match = re.fullmatch(r"(.+?)(?:@(\d+))?", name)
        if match is None:
            raise SourceError(f"{uri}: expected nanochat:DIR or nanochat:DIR@STEP")
        return kind, Path(match[1]).expanduser(), int(match[2]) if match[2] else None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return kind, folder, None
    if name.startswith((".", "/", "~")):
        raise SourceError(f"{uri}: no such folder")
    model = HubModel.parse("ModelScope" if kind == "ms" else "Hugging Face", name)
    return kind, fetch([model], _LM_FILES, _WEIGHTS), None


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.gguf"))
    if not files:
        raise SourceError(f"{folder}: expected model*.safetensors, or one GGUF file")
    return files


def _digest(files: list[Path]) -> str:
    """Hash the contents of files, independent of their paths."""
    digest = hashlib.blake2b(digest_size=12)
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
