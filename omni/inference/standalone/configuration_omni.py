"""Configuration of an exported model of omni, for transformers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class OmniSpeechConfig(PretrainedConfig):
    """Shape of a speech language model: Whisper's encoder, a projector and a language model.

    audio_config: shape of the encoder, fields of `WhisperConfig`. layer_ids: encoder layers that
    are concatenated; empty: the last one alone. feature_dtype, feature_format: rounding of the
    features that the model was trained with, see `FeatureCodec`. gpt_config: shape of a language
    model of nanochat's architecture; None: text_config is that of a language model of transformers.
    stack: encoder frames per soft token. projector, projector_hidden: see `PROJECTORS`.
    summary_tokens: see `SummaryPool`. layers: encoder layers that are mixed. ctc: there is a CTC
    head. lora: rank, alpha and targets of adapters that are not merged.
    """

    model_type = "omni_speech"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        audio_config: dict[str, int] | None = None,
        layer_ids: list[int] | None = None,
        feature_dtype: str = "bf16",
        feature_format: str = "exact",
        gpt_config: dict[str, Any] | None = None,
        text_config: Any = None,
        stack: int = 4,
        projector: str = "mlp",
        projector_hidden: int | None = None,
        summary_tokens: int = 0,
        layers: int = 1,
        ctc: bool = False,
        lora: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if isinstance(text_config, dict):
            values = dict(text_config)
            text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.audio_config = audio_config
        self.layer_ids = layer_ids or []
        self.feature_dtype, self.feature_format = feature_dtype, feature_format
        self.gpt_config = gpt_config
        self.text_config = text_config
        self.stack = stack
        self.projector, self.projector_hidden = projector, projector_hidden
        self.summary_tokens = summary_tokens
        self.layers, self.ctc, self.lora = layers, ctc, lora
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)
