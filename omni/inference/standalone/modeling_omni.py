"""A trained model of omni as a model of transformers: Whisper's encoder, projector, language model.

`generate` decodes as omni does: where there is a CTC head, jointly by the language model and the
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from omni.inference.standalone.configuration_omni import OmniSpeechConfig
from omni.model.ctc import LinearCTC, TiedCTC
from omni.model.decode import Decoding, Request, decode
from omni.model.encoder.transformer import WhisperTransformer
from omni.model.encoder.weights import WhisperConfig
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFConfig, HFLanguageModel
from omni.model.lm.prompts import embed_prompt
from omni.model.packed_attention import SegmentLayout
from omni.model.projector import PROJECTORS, LayerMix
from omni.model.special_marks import AUDIO
from omni.model.speech_input import SpeechInput
from omni.model.summary import SummaryPool
from omni.stream.codec import DTYPES, FeatureCodec

if TYPE_CHECKING:
    from omni.inference.standalone.processing_omni import OmniSpeechProcessor, OmniTranscript

_ENCODE_BATCH = 16  # windows, on an accelerator
_WRONG_WEIGHTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@dataclass
class OmniSpeechOutput(ModelOutput):
    """Answers to P prompts."""

    sequences: Tensor | None = None
    """(P, L) token ids without the end token, padded with it."""
    lengths: Tensor | None = None
    """(P,) tokens of each answer."""
    cut: Tensor | None = None
    """(P,) True where the limit of tokens came before the end: the answer is incomplete."""


@dataclass
class OmniSpeechLogits(ModelOutput):
    """Logits of the next token."""

    logits: Tensor | None = None
    """(P, T, V) fp32; a recording's position in the prompt takes as many as it has soft tokens."""
    attention_mask: Tensor | None = None
    """(P, T), False beyond the end of a prompt."""


class OmniSpeechModel(SpeechInput, PreTrainedModel, GenerationMixin):
    """A speech language model. Its inputs are what `OmniSpeechProcessor` returns."""

    config_class = OmniSpeechConfig
    main_input_name = "input_features"
    input_modalities = ["audio", "text"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OmniSpeechConfig) -> None:
        super().__init__(config)
        whisper = WhisperConfig(**(config.audio_config or {}))
        self.audio_tower = WhisperTransformer(whisper, None)
        self._wrapped: list[HFLanguageModel] = []
        self.soft_size: torch.nn.Parameter | None = None
        if config.gpt_config is not None:
            shape = GPTConfig(**config.gpt_config)
            self.language_model: Any = GPT(shape)
            width, vocabulary = shape.width, shape.vocab_size
        else:
            text = config.text_config
            width, vocabulary = int(text.hidden_size), int(text.vocab_size)
            architecture = {**text.to_dict(), "hidden_size": width, "vocab_size": vocabulary}
            self.language_model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
            # In a list it is no submodule: the weights keep the names of the language model's own.
            self._wrapped.append(HFLanguageModel(HFConfig(architecture), self.language_model))
            self.soft_size = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        extra = {"stack": config.stack} if config.projector == "conv" else {}
        self.projector = PROJECTORS[config.projector](
            config.stack * whisper.d_model, width, config.projector_hidden, **extra
        )
        self.mix = LayerMix(config.layers, whisper.d_model) if config.layers > 1 else None
        self.summary: SummaryPool | None = None
        if config.summary_tokens:
            self.summary = SummaryPool(
                config.summary_tokens, config.stack, config.layers, whisper.d_model, width
            )
        head = LinearCTC if config.gpt_config is not None else TiedCTC
        self.ctc_head: Any = head(width, vocabulary) if config.ctc else None
        if config.lora is not None:
            self._add_adapters(config.lora)
        self.post_init()  # type: ignore[no-untyped-call]

    def _add_adapters(self, lora: dict[str, Any]) -> None:
        from omni.model.lm.lora import LoraShape, add_lora

        shape = LoraShape(lora["rank"], lora["alpha"], tuple(lora["targets"]))
        add_lora(self.language_model, shape)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load weights from safetensors only. Raises ValueError if one is missing or does not fit.

        transformers itself would initialise missing weights at random, and say so in a log.
        """
        wants_info = options.pop("output_loading_info", False)
        for name in ("use_safetensors", "trust_remote_code"):
            options.pop(name, None)
        loaded: Any = super().from_pretrained(
            *arguments,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,  # This class is the code of the folder; no other is run.
            **options,
        )
        model, info = loaded
        wrong = {name: sorted(map(str, info[name])) for name in _WRONG_WEIGHTS if info.get(name)}
        if wrong:
            raise ValueError(f"the weights do not fit config.json: {wrong}")
        return (model, info) if wants_info else model

    @property
    def lm(self) -> GPT | HFLanguageModel:
        """Return the language model with the interface that decoding uses."""
        return self._wrapped[0] if self._wrapped else self.language_model

    @torch.inference_mode()
    def encode(
        self,
        input_features: Tensor,
        mel_lengths: Tensor,
        frame_lengths: Tensor,
        window_counts: Tensor,
    ) -> list[Tensor]:
        """Encode the windows of P pieces to features (T, d_model x layers), rounded as in training.

        See `OmniSpeechProcessor.__call__` for the arguments.
        """
        mels = [
            mel[:, :length]
            for mel, length in zip(input_features.cpu(), mel_lengths.tolist(), strict=True)
        ]
        padded = self.device.type != "cpu"
        order = sorted(range(len(mels)), key=lambda i: mels[i].shape[1])
        windows: dict[int, Tensor] = {}
        # On CPU one window at a time is fastest; others compute a batch of similar length.
        size = _ENCODE_BATCH if padded else 1
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            found = self.audio_tower.encode(
                [mels[i] for i in chosen], padded, self.config.layer_ids
            )
            windows |= dict(zip(chosen, found, strict=True))
        kept = frame_lengths.tolist()
        width = self.config.audio_config["d_model"] * max(1, len(self.config.layer_ids))
        dtype = DTYPES[self.config.feature_dtype]
        codec = FeatureCodec(width, dtype, self.config.feature_format)
        features, at = [], 0
        for count in window_counts.tolist():
            parts = [windows[i][: kept[i]].to(dtype) for i in range(at, at + count)]
            features.append(codec.roundtrip(torch.cat(parts)))
            at += count
        return features

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        input_features: Tensor,
        mel_lengths: Tensor,
        frame_lengths: Tensor,
        window_counts: Tensor,
        piece_counts: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> OmniSpeechLogits:
        """Compute the logits after each position of the prompts. For inference only."""
        features = self.encode(input_features, mel_lengths, frame_lengths, window_counts)
        prompts = [
            embed_prompt(self, prompt, [piece])  # type: ignore[arg-type]
            for prompt, piece in zip(input_ids.tolist(), features, strict=True)
        ]
        x = torch.nn.utils.rnn.pad_sequence([p.x_TC for p in prompts], batch_first=True)
        ids = torch.nn.utils.rnn.pad_sequence([p.ids_T for p in prompts], batch_first=True)
        lengths = torch.tensor([len(p.ids_T) for p in prompts], device=x.device)
        given = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        layout = SegmentLayout.packed(given.long())
        hidden = self.lm.trunk(x, ids.clamp(min=0), layout, ids != AUDIO)
        return OmniSpeechLogits(logits=self.lm.logits(hidden), attention_mask=given)

    @torch.inference_mode()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        input_features: Tensor,
        mel_lengths: Tensor,
        frame_lengths: Tensor,
        window_counts: Tensor,
        piece_counts: Tensor | None = None,
        *,
        decoder: str | None = None,
        ctc_weight: float | None = None,
        max_new_tokens: int | None = None,
        transcription: bool = True,
    ) -> OmniSpeechOutput:
        """Decode the answers to P prompts with one recording each.

        The arguments are what `OmniSpeechProcessor` returns. decoder: lm, ctc or joint; ctc_weight,
        max_new_tokens: see `Decoding`. None takes them from generation_config.json. transcription:
        the answers are what is said in the recordings; others are the language model's alone.
        """
        given: Any = self.generation_config
        settings = Decoding.of(
            decoder or given.decoder,
            given.ctc_weight if ctc_weight is None else ctc_weight,
            given.max_new_tokens if max_new_tokens is None else max_new_tokens,
            head=self.ctc_head is not None,
        )
        features = self.encode(input_features, mel_lengths, frame_lengths, window_counts)
        requests = [
            Request(prompt, [piece], transcription)
            for prompt, piece in zip(input_ids.tolist(), features, strict=True)
        ]
        # It has the parts of an OmniModel that decoding uses.
        found = decode(self, requests, end=given.eos_token_id, settings=settings)  # type: ignore[arg-type]
        answers = [choice.answer for choice in found]
        longest = max((len(answer.ids) for answer in answers), default=0)
        sequences = torch.full((len(answers), longest), given.eos_token_id)
        for row, answer in zip(sequences, answers, strict=True):
            row[: len(answer.ids)] = torch.tensor(answer.ids, dtype=torch.long)
        return OmniSpeechOutput(
            sequences=sequences,
            lengths=torch.tensor([len(answer.ids) for answer in answers], dtype=torch.long),
            cut=torch.tensor([answer.cut for answer in answers], dtype=torch.bool),
        )

    def transcribe(
        self,
        processor: OmniSpeechProcessor,
        recordings: np.ndarray | Sequence[np.ndarray],
        sampling_rate: int,
        *,
        language: str | None = None,
        **options: Any,
    ) -> list[OmniTranscript]:
        """Transcribe recordings of any length, (S,) mono each.

        language: see `OmniSpeechProcessor.__call__`. options: see `generate`.
        """
        inputs = processor(recordings, sampling_rate, language=language)
        return processor.transcripts(self.generate(**inputs, **options), inputs)
