"""Choose the language model, tokenizer, template and shape of a run's model."""

from __future__ import annotations

from datetime import datetime

import yaml

from omni.checkpoint.base import differences, has_language_model, read_base
from omni.checkpoint.checkpoint import Checkpoint, CheckpointError
from omni.config import Config
from omni.corpus.index import Index
from omni.errors import ConfigError
from omni.model.chat_template import Template, make_template
from omni.model.download import HubError, SourceError
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFConfig
from omni.model.lm.lora import LoraShape
from omni.model.lm.pretrained import Pretrained, find_pretrained
from omni.model.projector import PROJECTORS, check_projector
from omni.model.speech_lm import OmniConfig
from omni.model.tokenizer import SpeechTokenizer
from omni.storage.path import StoragePath
from omni.stream.encoder_facts import EncoderFacts


def find_language_model(config: Config) -> Pretrained | None:
    """Find the pretrained language model that `model.lm` names; None for a GPT from scratch.

    Raises ConfigError for a model that cannot be used, HubError where a hub is unavailable.
    """
    if config.model.lm == "scratch":
        return None
    try:
        return find_pretrained(config.model.lm, with_tokenizer=config.tokenizer.path is None)
    except HubError:
        raise
    except SourceError as error:
        raise ConfigError(f"model.lm: {error}") from None


def find_base(config: Config) -> Checkpoint | None:
    """Read the checkpoint that `model.base` names. Raises ConfigError."""
    if config.model.base is None:
        return None
    if config.tokenizer.path is not None:
        raise ConfigError("tokenizer.path: model.base brings its tokenizer; leave out one of them")
    try:
        return read_base(config.model.base)
    except CheckpointError as error:
        raise ConfigError(f"model.base: {error}") from None


def check_base(base: Checkpoint, config: Config, model: OmniConfig, encoder: EncoderFacts) -> None:
    """Raise ConfigError where the weights of the base do not fit the model of the run."""
    if base.model.source and has_language_model(base) and "lm" not in config.model.train:
        raise ConfigError(
            f"model.train: {config.model.train}; expected lm in it: model.base has trained the "
            "language model, which a run that does not train it loads as it was published"
        )
    if base.encoder["fingerprint"] != encoder.fingerprint:
        raise ConfigError(
            f"encoder.weights: {encoder.source}; expected the weights on whose features model.base "
            f"was trained ({base.encoder['source']}, fingerprint {base.encoder['fingerprint']})"
        )
    trained_on = base.encoder.get("layers") or []
    # A mix begins with most of the weight on its last layer, see `LayerMix`.
    features = encoder.layers if model.layers == 1 else encoder.layers[-1:] if trained_on else []
    if base.model.layers == 1 and features != trained_on:
        raise ConfigError(
            f"encoder.layers: {config.encoder.layers}; expected {trained_on or 'last'}, on whose "
            "features model.base was trained, or several layers of which it is the last"
        )
    if unequal := differences(base.model, model):
        raise ConfigError(f"{'; '.join(unequal)}, as model.base has it")


def choose_tokenizer(
    config: Config,
    resume: StoragePath | None,
    train: Index,
    lm: Pretrained | None,
    base: Checkpoint | None = None,
) -> SpeechTokenizer:
    """Load or train the tokenizer: the first of those that there are.

    A chat template that prints the date prints that of the run's beginning.

    The run's own, if it continues with the same tokenizer settings; that of `model.base`;
    `tokenizer.path`; that of the language model; one trained on the corpus. resume: folder of the
    checkpoint to continue from.
    """
    if resume is not None:
        saved = yaml.safe_load((resume / "config.yaml").read_text())
        if saved.get("tokenizer") == config.tokenizer.model_dump(mode="json"):
            return SpeechTokenizer.from_json((resume / "tokenizer.json").read_text())
    if base is not None:
        return base.tokenizer()
    if config.tokenizer.path is not None:
        try:
            return SpeechTokenizer.load(config.tokenizer.path).at(datetime.now())
        except Exception as error:  # The tokenizers library raises plain Exception.
            raise ConfigError(f"tokenizer.path: {config.tokenizer.path}: {error}") from None
    if lm is not None and lm.tokenizer is not None:
        return lm.tokenizer.at(datetime.now())
    texts = train.table["text"].to_pylist() + train.table["prompt"].to_pylist()
    return SpeechTokenizer.train(texts, config.tokenizer.vocab_size)


def choose_template(config: Config, tokenizer: SpeechTokenizer) -> Template:
    try:
        return make_template(tokenizer, config.data.template)
    except ValueError as error:
        raise ConfigError(f"data.template: {error}") from None


def language_model_shape(
    config: Config, lm: Pretrained | None, vocab_size: int
) -> GPTConfig | HFConfig:
    """Describe the language model; lm: the pretrained one, None for a GPT of that vocabulary.

    Needs no corpus, so that settings are refused before one is read. Raises ConfigError for
    settings that contradict each other.
    """
    m = config.model
    shape: GPTConfig | HFConfig
    try:
        shape = (
            lm.shape
            if lm is not None
            else GPTConfig(
                sequence_len=m.sequence_len,
                vocab_size=vocab_size,
                n_layer=m.n_layer,
                n_head=m.n_head,
                n_kv_head=m.n_kv_head or m.n_head,
                n_embd=m.n_embd,
                window_pattern=m.window_pattern,
            )
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    context = shape.sequence_len
    if context is not None and config.optim.bin_positions > context:
        setting = "model.sequence_len" if lm is None else f"model.lm {config.model.lm}"
        raise ConfigError(
            f"optim.bin_positions: {config.optim.bin_positions}; expected at most the context of "
            f"the model, {context} positions ({setting}). optim.bins_per_block makes larger batches"
        )
    if m.dropout and not isinstance(shape, GPTConfig):
        raise ConfigError(
            "model.dropout: expected 0 for a pretrained transformers model: only a GPT has dropout"
        )
    if _projector(config, shape) == "conv" and m.stack & (m.stack - 1):
        raise ConfigError(f"model.stack: expected a power of two for conv, got {m.stack}")
    if config.optim.kl_weight and "lm" in m.train:
        raise ConfigError(
            "optim.kl_weight: the teacher of distillation is the frozen language model; expected "
            "model.train without lm"
        )
    _check_rates(config, shape)
    return shape


def _projector(config: Config, shape: GPTConfig | HFConfig) -> str:
    return config.model.projector or ("mlp" if isinstance(shape, GPTConfig) else "swiglu")


def model_config(
    config: Config, tokenizer: SpeechTokenizer, encoder: EncoderFacts, lm: Pretrained | None
) -> OmniConfig:
    """Describe the model. Raises ConfigError for settings that contradict each other."""
    m = config.model
    shape = language_model_shape(config, lm, tokenizer.vocab_size)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens; expected at most the "
            f"{shape.vocab_size} of the language model {config.model.lm}"
        )
    projector = _projector(config, shape)
    if projector not in PROJECTORS:
        check_projector(projector, m.stack, encoder.d_model, shape.width, m.projector_hidden)
    layers = encoder.layers
    return OmniConfig(
        lm=shape,
        feature_dim=encoder.d_model,
        layers=len(layers) if layers else 1,
        stack=m.stack,
        projector=projector,
        projector_hidden=m.projector_hidden,
        summary_tokens=m.summary_tokens,
        dropout=m.dropout,
        token_dropout=m.token_dropout,
        audio_dropout=m.audio_dropout,
        ctc=config.optim.ctc_weight > 0,
        source=None if lm is None else lm.source,
        lora=LoraShape(m.lora_rank, m.lora_alpha or 2 * m.lora_rank, tuple(m.lora_targets))
        if "lora" in m.train
        else None,
    )


def _check_rates(config: Config, shape: GPTConfig | HFConfig) -> None:
    """Raise ConfigError for a learning rate of parameters that do not train."""
    train = config.model.train
    # Of a transformers model, embeddings and head are one table unless it says otherwise.
    tied = isinstance(shape, HFConfig) and shape.architecture.get("tie_word_embeddings", True)
    trained = {
        "projector_lr": "projector" in train,
        "mix_lr": "projector" in train and _mixes_layers(config),
        "lora_lr": "lora" in train,
        "embedding_lr": "lm" in train,
        "unembedding_lr": "lm" in train and not tied,
        "scalar_lr": "lm" in train,
        "muon_lr": "lm" in train and isinstance(shape, GPTConfig),
    }
    reasons = {
        "mix_lr": "it weighs several encoder.layers, with projector in model.train",
        "muon_lr": "Muon trains the matrices of a GPT, with lm in model.train",
        "unembedding_lr": "the output head trains with lm in model.train, unless its weights are "
        "the embeddings",
    }
    for name, trains in trained.items():
        if getattr(config.optim, name) is not None and not trains:
            reason = reasons.get(name, f"model.train {train} trains nothing with it")
            raise ConfigError(f"optim.{name}: {reason}; leave it out")


def _mixes_layers(config: Config) -> bool:
    layers = config.encoder.layers
    return layers == "all" or (layers != "last" and len(layers) > 1)
