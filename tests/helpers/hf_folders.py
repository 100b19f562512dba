"""Small random language models of transformers, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from omni.model.lm.hf import HFConfig, HFLanguageModel
from omni.model.tokenizer import SpeechTokenizer

VOCABULARY = 320
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512},
    "gpt_neox": {},
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
)


def random_model(kind: str = "llama", attention: str | None = None, **changes: Any) -> Any:
    values = {**_COMMON, **ARCHITECTURES.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def wrapped(kind: str = "llama", **changes: Any) -> HFLanguageModel:
    model = random_model(kind, **changes)
    values = {**model.config.to_dict(), "hidden_size": 64, "vocab_size": VOCABULARY}
    return HFLanguageModel(HFConfig(values), model).eval()


def chat_tokenizer() -> SpeechTokenizer:
    """A byte-level tokenizer of a chat model."""
    plain = SpeechTokenizer.train(["please enter your mailbox number"] * 3, 300)
    inner = plain.to_transformers().backend_tokenizer
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return SpeechTokenizer(inner, end_token="<|im_end|>", chat_template=CHAT)


def save_folder(folder: Path, kind: str = "llama", tokenizer: bool = True, **changes: Any) -> Path:
    """A model in transformers layout."""
    random_model(kind, **changes).save_pretrained(folder)
    if tokenizer:
        chat_tokenizer().to_transformers().save_pretrained(folder)
    return folder
