"""Export a trained model to the formats of other projects, or to a small folder of our own.

transformers: a folder with the code in it, which decodes any model as omni does
(`omni.inference.standalone`). nanochat: a nanochat checkpoint folder (language model and
tokenizer), with the audio weights and the CTC head in files of their own, since nanochat has none
for them. hf: the Voxtral format of transformers, which takes a Whisper encoder on whole 30 s
windows, the mlp projector, and a language model that does not scale or cap its logits; it has no
place for a CTC head. omni: a checkpoint in bf16 without optimizer state, for `model.base` and for
every job that takes a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omni.checkpoint.base import write_base
from omni.checkpoint.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from omni.errors import ConfigError
from omni.inference.export_script import transcribe_script
from omni.inference.standalone.folder import Adapters, Source, write_folder
from omni.inference.transcriber import longest_piece
from omni.model.chat_template import PLACEHOLDER, Template, make_template, transcription
from omni.model.decode import Decoding, DecodingOptions
from omni.model.download import SourceError
from omni.model.encoder.weights import read_whisper_files, whisper_folder
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFLanguageModel
from omni.model.lm.lora import merge_lora
from omni.model.lm.nanochat import save_nanochat
from omni.model.projector import PROJECTORS, Projector
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.storage.path import StoragePath

Format = Literal["transformers", "hf", "nanochat", "omni"]
_MAX_NEW_TOKENS = 200  # of checkpoints of older versions


@dataclass(frozen=True)
class Exported:
    """Files that were written, and what the format lacks of the model."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def export(
    checkpoint: StoragePath, to: Format, out: Path, adapters: Adapters = "merged"
) -> Exported:
    """Write the model in the format `to` into the folder `out`.

    adapters: merged into the language model, or, for transformers, apart from it. Raises
    ConfigError when the checkpoint cannot be used, `out` is not empty, or the format cannot
    represent the model.
    """
    try:
        found = read_checkpoint(checkpoint, verify=True)
        model = found.load_model().eval()
        config = _read_config(found)
        template = make_template(found.tokenizer(), config["data"].get("template", "auto"))
    except (CheckpointError, SourceError, ValueError) as error:
        raise ConfigError(f"--checkpoint: {error}") from None
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out: {out}: expected a new or empty folder")
    if to == "omni":
        write_base(found, out)
        return Exported(sorted(out.iterdir()))
    if adapters == "apart" and (to != "transformers" or model.config.lora is None):
        raise ConfigError(
            "--adapters apart: expected --to transformers and a model with adapters (model.train)"
        )
    if missing := missing_for(to, model.config, found.encoder):
        raise ConfigError(
            f"--to {to}: {found.path} was trained without what this format needs: "
            f"{', '.join(missing)}"
        )
    if model.config.lora is not None and adapters == "merged":
        merge_lora(model.lm)
    try:
        # What other projects write greedily has no beam.
        decoding = Decoding.of_config(
            config, DecodingOptions(beam=1), head=model.ctc_head is not None
        )
    except ValueError as error:
        raise ConfigError(f"--checkpoint: {checkpoint}: eval.decode: {error}") from None
    if to == "transformers":
        try:
            write_folder(Source(found, model, template, config, decoding), out)
        except SourceError as error:
            raise ConfigError(f"--checkpoint: {error}") from None
    elif to == "nanochat":
        _export_nanochat(found, model, template, decoding, out)
    else:
        limit = decoding.max_new_tokens
        _export_voxtral(found, model, template, config["data"]["prompt"], limit, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    notes = []
    if (beam := int((config.get("eval") or {}).get("beam") or 1)) > 1:
        notes.append(f"{to} decodes greedily: omni searches {beam} answers by eval.beam")
    if decoding.decoder == "lm" or to == "transformers":
        return Exported(files, notes)
    where = (
        "is left out" if to == "hf" else "is in ctc_head.safetensors, which nanochat does not read"
    )
    return Exported(
        files,
        [
            *notes,
            f"{to} decodes by the language model alone: the CTC head, with which omni decodes this "
            f"model (eval.decode {decoding.decoder}), {where}",
        ],
    )


def _read_config(found: Checkpoint) -> dict[str, Any]:
    import yaml

    config: dict[str, Any] = yaml.safe_load((found.path / "config.yaml").read_text())
    return config


def _export_nanochat(
    found: Checkpoint,
    model: OmniModel,
    template: Template,
    decoding: Decoding,
    out: Path,
) -> None:
    assert isinstance(model.lm, GPT)
    try:
        save_nanochat(model.lm, out, found.state.step, template.tokenizer)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--to nanochat: tokenizer.pkl: {error}") from None
    audio = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(("lm.", "ctc_head."))
    }
    save_file(audio, out / "audio.safetensors")
    if model.ctc_head is not None:
        head = {name: tensor.contiguous() for name, tensor in model.ctc_head.state_dict().items()}
        save_file(head, out / "ctc_head.safetensors")
    shape = {k: v for k, v in model.config.to_dict().items() if k not in ("lm", "source", "lora")}
    encoder = {k: v for k, v in found.encoder.items() if k != "longest_seconds"}
    facts = {
        "model": shape,
        "encoder": encoder,
        "template": template.kind,
        "longest_piece_seconds": longest_piece(found.encoder["longest_seconds"]),
        "max_new_tokens": decoding.max_new_tokens or _MAX_NEW_TOKENS,
        "decode": decoding.decoder,
        "ctc_weight": decoding.ctc_weight,
    }
    (out / "audio.json").write_text(json.dumps(facts, indent=1))


def _export_voxtral(
    found: Checkpoint,
    model: OmniModel,
    template: Template,
    prompt: str,
    max_new_tokens: int | None,
    out: Path,
) -> None:
    from transformers import (
        AutoConfig,
        GenerationConfig,
        VoxtralConfig,
        VoxtralEncoderConfig,
        VoxtralForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    lm = model.lm
    assert isinstance(lm, HFLanguageModel) and isinstance(model.projector, Projector)
    whisper, encoder = read_whisper_files(whisper_folder(found.encoder["source"]))
    tokenizer = template.tokenizer.to_transformers()
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    audio_id = int(tokenizer.convert_tokens_to_ids(PLACEHOLDER))
    rows = max(lm.vocab_size, audio_id + 1)
    text = dict(lm.config.architecture) | {"vocab_size": rows, "tie_word_embeddings": False}
    config = VoxtralConfig(
        audio_config=VoxtralEncoderConfig(
            hidden_size=whisper.d_model,
            intermediate_size=whisper.encoder_ffn_dim,
            num_hidden_layers=whisper.encoder_layers,
            num_attention_heads=whisper.encoder_attention_heads,
            num_mel_bins=whisper.num_mel_bins,
            max_source_positions=whisper.max_source_positions,
        ),
        text_config=AutoConfig.for_model(text.pop("model_type"), **text),
        audio_token_id=audio_id,
    )
    config.tie_word_embeddings = False
    with torch.device("meta"):
        target = VoxtralForConditionalGeneration(config)
    state = {f"model.audio_tower.{name}": t.float() for name, t in encoder.items()}
    scale = 1.0 if model.soft_size is None else float(model.soft_size)
    state["model.multi_modal_projector.linear_1.weight"] = model.projector.fc1.weight
    state["model.multi_modal_projector.linear_2.weight"] = model.projector.fc2.weight * scale
    for name, tensor in lm.model.get_decoder().state_dict().items():
        state[f"model.language_model.{name}"] = tensor
    embeddings = "model.language_model." + _weight_name(
        lm.model.get_decoder(), lm.model.get_input_embeddings()
    )
    state[embeddings] = _pad_rows(lm.embedding_matrix(), rows)
    state["lm_head.weight"] = _pad_rows(lm.model.get_output_embeddings().weight, rows)
    # Tied weights share memory, which safetensors refuses to write.
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    missing, unexpected = target.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise ConfigError(f"--to hf: missing or unexpected tensors: {missing + unexpected}")
    target.generation_config = GenerationConfig(
        eos_token_id=template.end, pad_token_id=template.end, suppress_tokens=[audio_id]
    )
    target.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=whisper.num_mel_bins).save_pretrained(out)
    script = transcribe_script(
        template.prompt(transcription(prompt, "")),
        stack=model.config.stack,
        longest_piece=longest_piece(found.encoder["longest_seconds"]),
        max_new_tokens=max_new_tokens or _MAX_NEW_TOKENS,
    )
    (out / "transcribe.py").write_text(script)


def missing_for(to: Format, shape: OmniConfig, encoder: Mapping[str, Any]) -> list[str]:
    """Return the settings that a model would need for the format `to`; none if it fits.

    encoder: `EncoderFacts.to_dict()` of the features that it is trained on.
    """
    if to == "omni":
        return []
    if to == "transformers":
        return [] if shape.projector in PROJECTORS else [f"model.projector {', '.join(PROJECTORS)}"]
    gpt = isinstance(shape.lm, GPTConfig)
    if to == "nanochat":
        return [] if gpt else ["model.lm scratch or nanochat:DIR"]
    if gpt:
        return ["model.lm hf:ID or ms:ID"]
    caps = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    required = []
    if encoder["mode"] != "full":
        required.append("encoder.mode full")
    if encoder.get("layers"):
        required.append("encoder.layers last")
    if shape.projector != "mlp" or shape.projector_hidden not in (None, shape.lm.width):
        required.append("model.projector mlp, as wide as the language model")
    if shape.summary_tokens:
        required.append("model.summary_tokens 0")
    if shape.stack != 4:
        required.append("model.stack 4")
    if any(shape.lm.architecture.get(name) for name in caps):  # type: ignore[union-attr]
        required.append("a language model that does not scale or cap its logits")
    return required


def _weight_name(parent: nn.Module, child: nn.Module) -> str:
    name = next(name for name, module in parent.named_modules() if module is child)
    return f"{name}.weight"


def _pad_rows(weight: Tensor, rows: int) -> Tensor:
    """Pad the matrix with rows of zeros to `rows` rows."""
    return torch.cat((weight, weight.new_zeros(rows - len(weight), weight.shape[1])))
