"""Write a trained model as a folder that transformers loads with the code in it, without omni."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omni.checkpoint.checkpoint import Checkpoint
from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.text import TextPolicy
from omni.inference.standalone.card import CardFacts, model_card
from omni.inference.standalone.code import AUTO_MAP, PROCESSOR_MAP, code_files
from omni.inference.standalone.licences import copy_licences
from omni.inference.transcriber import longest_piece
from omni.model.chat_template import Template
from omni.model.decode import Decoding
from omni.model.encoder.weights import read_whisper_files, whisper_folder
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFLanguageModel
from omni.model.lm.lora import is_adapter
from omni.model.lm.pretrained import source_folder
from omni.model.speech_lm import OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.stream.encoder_facts import EncoderFacts

Adapters = Literal["merged", "apart"]
_SHARD = "5GB"
_HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Source:
    """Checkpoint to export. model: its adapters are merged already if they are to be."""

    found: Checkpoint
    model: OmniModel
    template: Template
    config: dict[str, Any]
    """The run's config.yaml."""
    decoding: Decoding

    @property
    def has_adapters(self) -> bool:
        return any(is_adapter(name) for name, _ in self.model.lm.named_parameters())


def write_folder(source: Source, out: Path) -> None:
    """Write configuration, weights, tokenizer, code, model card and licences into `out`."""
    found, model = source.found, source.model
    facts = EncoderFacts.from_dict(found.encoder)
    encoder = whisper_folder(facts.source)
    out.mkdir(parents=True, exist_ok=True)
    whisper, tensors = read_whisper_files(encoder)
    _write_json(out / "config.json", _config(source, facts, vars(whisper)))
    _save_tensors(dict(_tensors(model, tensors)), out)
    if source.has_adapters:
        _write_adapter(source, out / "adapter")
    _write_processor(source, facts, out)
    _write_generation(source, out)
    for name, text in code_files(source.has_adapters).items():
        (out / name).write_text(text, encoding="utf-8")
    base = None if model.config.source is None else source_folder(model.config.source.uri)
    licences = copy_licences(found.path, encoder, base, out)
    card = model_card(CardFacts.of(found, source.decoding, source.has_adapters), licences, out.name)
    (out / "README.md").write_text(card, encoding="utf-8")


def _config(source: Source, facts: EncoderFacts, whisper: dict[str, int]) -> dict[str, Any]:
    import transformers

    shape = source.model.config
    values: dict[str, Any] = {
        "architectures": ["OmniSpeechModel"],
        "auto_map": AUTO_MAP,
        "model_type": "omni_speech",
        "dtype": "float32",
        "transformers_version": transformers.__version__,
        "audio_config": whisper,
        "layer_ids": facts.layers,
        "feature_dtype": facts.dtype,
        "feature_format": facts.format,
        "stack": shape.stack,
        "projector": shape.projector,
        "projector_hidden": shape.projector_hidden,
        "summary_tokens": shape.summary_tokens,
        "layers": shape.layers,
        "ctc": shape.ctc,
    }
    if isinstance(shape.lm, GPTConfig):
        values["gpt_config"] = vars(shape.lm)
    else:
        # Weights are stored in several precisions, and loaded in that of the whole model.
        unused = ("dtype", "torch_dtype", "_name_or_path", "transformers_version")
        kept = {k: v for k, v in shape.lm.architecture.items() if k not in unused}
        values["text_config"] = kept
        values["tie_word_embeddings"] = bool(kept.get("tie_word_embeddings"))
    if source.has_adapters and shape.lora is not None:
        lora = shape.lora
        values["lora"] = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    return values


def _tensors(model: OmniModel, encoder: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under the names that `OmniSpeechModel` has for them."""
    yield from ((f"audio_tower.{name}", tensor) for name, tensor in encoder.items())
    inner = "lm.model." if isinstance(model.lm, HFLanguageModel) else "lm."
    for name, tensor in model.state_dict().items():
        own = name.startswith("lm.")
        yield (f"language_model.{name.removeprefix(inner)}" if own else name), tensor


def _save_tensors(tensors: dict[str, Tensor], out: Path) -> None:
    """Write safetensors of at most 5 GB each; tied weights are written once."""
    from huggingface_hub import save_torch_state_dict

    # Tied weights share memory, and have to share it afterwards.
    exact: dict[tuple[int, torch.Size], Tensor] = {}
    stored = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in exact:
            exact[key] = _smallest(tensor.detach())
        stored[name] = exact[key]
    save_torch_state_dict(stored, out, max_shard_size=_SHARD)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)  # The library writes files for their owner alone.


def _smallest(tensor: Tensor) -> Tensor:
    """Return the tensor in half precision where that holds every value of it exactly."""
    if tensor.dtype == torch.float32:
        for dtype in _HALF_PRECISIONS:
            half = tensor.to(dtype)
            if torch.equal(half.float(), tensor):
                return half
    return tensor.clone().contiguous()


def _write_adapter(source: Source, folder: Path) -> None:
    """Write the adapters in the format of peft, for the language model without the rest."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import save_file

    lm, shape = source.model.lm, source.model.config
    assert shape.lora is not None
    inner = lm.model if isinstance(lm, HFLanguageModel) else lm
    adapted = {n for n, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    folder.mkdir()
    LoraConfig(
        r=shape.lora.rank,
        lora_alpha=shape.lora.alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in adapted}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    weights = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.detach().contiguous()
        for name, tensor in inner.named_parameters()
        if is_adapter(name)
    }
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)


def _write_processor(source: Source, facts: EncoderFacts, out: Path) -> None:
    from transformers import WhisperFeatureExtractor

    tokenizer = source.template.tokenizer
    tokenizer.to_transformers().save_pretrained(out)
    WhisperFeatureExtractor(feature_size=facts.n_mels).save_pretrained(out)
    policy = TextPolicy.of(source.config["data"])
    settings = {
        "mode": facts.mode,
        "margin_seconds": facts.margin_seconds,
        "longest_piece": longest_piece(facts.longest_seconds),
        "prompt": source.config["data"]["prompt"] or policy.prompts.get(DEFAULT_TASK, ""),
        "template": source.template.kind,
        "text": {
            "unicode": policy.unicode,
            "language": policy.language,
            "language_tag": policy.language_tag,
        },
        **_tokens(tokenizer),
    }
    values = {
        "processor_class": "OmniSpeechProcessor",
        "auto_map": PROCESSOR_MAP,
        "settings": settings,
    }
    _write_json(out / "processor_config.json", values)


def _tokens(tokenizer: SpeechTokenizer) -> dict[str, Any]:
    """Return what `SpeechTokenizer` knows besides the vocabulary and the chat template."""
    saved = json.loads(tokenizer.to_json())
    named = "end_token" in saved
    names = ("bos_token", "end_token")
    return {
        "tokens": {name: saved[name] for name in names} if named else None,
        "rendering": saved.get("rendering"),
    }


def _write_generation(source: Source, out: Path) -> None:
    from transformers import GenerationConfig

    end, decoding = source.template.end, source.decoding
    GenerationConfig(
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        max_new_tokens=decoding.max_new_tokens,
        decoder=decoding.decoder,
        ctc_weight=decoding.ctc_weight,
    ).save_pretrained(out)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
