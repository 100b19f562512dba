"""Chat templates of published model families, each with a small tokenizer of the family's kind.

The templates are written after the published description of each family's format. The tokenizers
are trained here on a few sentences: what matters is how they treat spaces and special tokens.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from omni.model.lm.pretrained import hf_tokenizer
from omni.model.tokenizer import SpeechTokenizer

TEXT = [
    "Please press one to mute yourself.",
    "Please enter your mailbox number, followed by the pound key.",
    "Write down what is said.\n\nYou are a helpful assistant.",
    "user assistant system model Today Date: 26 Jul 2024 [INST] [/INST] <<SYS>> <|user|>",
    "The conference is now in recording mode: hello, hello. What number was it?",
]
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A chat template, its tokenizer's kind and special tokens, and the token ending an answer."""

    template: str
    kind: str
    """bytes: byte-level BPE. pieces: sentencepiece BPE with a space in front of each text, as in
    the first Llamas. spaces: sentencepiece BPE without it, as in Gemma. unigram: sentencepiece."""
    bos: str | None
    eos: str
    end: str
    special: tuple[str, ...] = ()
    rstrip: bool = False
    """Special tokens take the white space after them, as Phi-3's do."""
    adds_bos: bool = False
    """The tokenizer begins each text with `bos` by itself."""
    system: bool = True
    """The template takes a system message."""


def _turns(user: str, assistant: str, system: str = "") -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}" + user + "{% elif m['role'] == "
        "'assistant' %}" + assistant + "{% else %}" + system + "{% endif %}{% endfor %}"
    )


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{% endif %}{% endfor %}"
)


def _default_system(text: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        + text
        + "<|im_end|>\n' }}{% endif %}"
        + _CHATML
    )


LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] "
    "| trim %}{% set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: ' + strftime_now('%d %b %Y') + '\n\n' + lead + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "(m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
FAMILIES = {
    "llama-2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set lead = '<<SYS>>\n' + "
        "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}"
        "{% set lead = '' %}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "((lead if loop.first else '') + m['content']).strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "pieces",
        "<s>",
        "</s>",
        "</s>",
        adds_bos=True,
    ),
    "llama-3": Family(
        LLAMA_3,
        "bytes",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        adds_bos=True,
    ),
    "qwen-2.5": Family(
        _default_system("You are a helpful assistant."),
        "bytes",
        None,
        "<|im_end|>",
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
    ),
    "mistral": Family(
        "{{ bos_token }}"
        + _ALTERNATE
        + _turns("{{ '[INST] ' + m['content'] + ' [/INST]' }}", "{{ m['content'] + eos_token}}"),
        "pieces",
        "<s>",
        "</s>",
        "</s>",
        adds_bos=True,
        system=False,
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role "
        "not supported') }}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else "
        "m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "spaces",
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
        system=False,
    ),
    "phi-3": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
        "{{ eos_token }}{% endif %}",
        "pieces",
        "<s>",
        "<|endoftext|>",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        rstrip=True,
    ),
    "smollm2": Family(
        _default_system("You are a helpful AI assistant named SmolLM."),
        "bytes",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        ("<|endoftext|>",),
    ),
    "chatml": Family(
        _CHATML, "pieces", "<s>", "</s>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "pieces",
        "<s>",
        "</s>",
        "</s>",
        adds_bos=True,
    ),
    "olmo-2": Family(
        "{{ bos_token }}"
        + _turns(
            "{{ '<|user|>\n' + m['content'] + '\n' }}",
            "{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}",
            "{{ '<|system|>\n' + m['content'] + '\n' }}",
        )
        + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "bytes",
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "deepseek-v2": Family(
        "{{ bos_token }}"
        + _turns(
            "{{ 'User: ' + m['content'] + '\n\n' }}",
            "{{ 'Assistant: ' + m['content'] + eos_token }}",
            "{{ m['content'] + '\n\n' }}",
        )
        + "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "bytes",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        adds_bos=True,
    ),
    "japanese": Family(  # A Unigram vocabulary holds its special tokens as pieces.
        "{% for m in messages %}{{ ('ユーザー: ' if m['role'] == 'user' else 'システム: ') + "
        "m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'システム: ' }}{% endif %}",
        "unigram",
        "<s>",
        "</s>",
        "</s>",
    ),
}


def fast_tokenizer(family: Family) -> Any:
    """The tokenizer of a family as transformers has it, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    names = [n for n in (family.bos, family.eos, "<unk>", *family.special) if n is not None]
    inner = _trained(family.kind, tuple(dict.fromkeys(names)), family.rstrip)
    inner = Tokenizer.from_str(inner.to_str())
    if family.adds_bos and family.bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, inner.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>",
        chat_template=family.template,
    )


def speech_tokenizer(family: Family) -> SpeechTokenizer:
    """The tokenizer of a family as omni reads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        fast_tokenizer(family).save_pretrained(folder)
        return hf_tokenizer(Path(folder))


@functools.cache
def _trained(kind: str, names: Sequence[str], rstrip: bool) -> Tokenizer:
    special = [AddedToken(name, rstrip=rstrip, normalized=False, special=True) for name in names]
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        )
        inner.train_from_iterator(TEXT * 3, trainer)
        return inner
    if kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        inner.train_from_iterator(
            TEXT * 3 + ["ユーザー: システム: </s>"],
            trainers.UnigramTrainer(
                vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
            ),
        )
        return inner
    # Sentencepiece's BPE: spaces are "▁", and unknown characters are bytes.
    spaces = normalizers.Replace(" ", "▁")
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if kind == "pieces" else spaces
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁\n]+|\n+"), behavior="isolated")
    pieces = [AddedToken(f"<0x{n:02X}>", normalized=False, special=False) for n in range(256)]
    inner.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=320 + 256,
            special_tokens=[*special, *pieces],
            show_progress=False,
        ),
    )
    inner = _without_added(inner, {f"<0x{n:02X}>" for n in range(256)})
    inner.pre_tokenizer = None
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if kind == "pieces" else []),
        ]
    )
    return inner


def _without_added(inner: Tokenizer, names: set[str]) -> Tokenizer:
    """The same vocabulary in which the named tokens are ordinary ones."""
    values = json.loads(inner.to_str())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in names]
    values["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(values))
