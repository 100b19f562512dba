"""The Python files of an exported folder."""

from __future__ import annotations

from omni.inference.standalone.bundle import bundle

_HERE = "omni.inference.standalone"
_MODEL = f"{_HERE}.modeling_omni:OmniSpeechModel"
_TOKENIZER = "omni.model.tokenizer:SpeechTokenizer"
_ROOTS = {
    f"{_HERE}.configuration_omni": ["OmniSpeechConfig"],
    f"{_HERE}.modeling_omni": ["OmniSpeechModel"],
    f"{_HERE}.processing_omni": ["OmniSpeechProcessor"],
}
_OMITTED = [
    # Training, and files of other formats, pickle's among them.
    *(f"{_TOKENIZER}.{name}" for name in ("train", "load", "save", "to_json", "from_json")),
    *(f"{_TOKENIZER}.{name}" for name in ("at", "to_tiktoken")),
    *(f"omni.corpus.text:TextPolicy.{name}" for name in ("of", "transcript")),
    *(f"omni.model.lm.gpt:GPT.{name}" for name in ("compile_layers", "recompute", "shards")),
    *(f"omni.model.lm.hf:HFLanguageModel.{name}" for name in ("recompute", "shards")),
    # `omni train` has compared the language model with transformers' own.
    "omni.model.lm.hf:HFLanguageModel.check_head",
]
AUTO_MAP = {
    "AutoConfig": "configuration_omni.OmniSpeechConfig",
    "AutoModel": "modeling_omni.OmniSpeechModel",
}
PROCESSOR_MAP = {"AutoProcessor": "processing_omni.OmniSpeechProcessor"}


def code_files(adapters: bool) -> dict[str, str]:
    """Return the source of each file by its name.

    adapters: the model keeps adapters, for which the package peft is needed.
    """
    omitted = _OMITTED if adapters else [*_OMITTED, f"{_MODEL}._add_adapters"]
    return bundle(_ROOTS, omit=omitted, types={"omni.model.speech_lm:OmniModel": _MODEL})
