"""Run causal language models of transformers over packed rows of text and soft tokens.

The model runs on `inputs_embeds` with omni's attention function, which receives the layout of the
rows in the keyword arguments of the call, so that a segment sees only itself, and in decoding the
cache of its keys and values. A call without a layout uses scaled dot product attention.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni.errors import first_line
from omni.model.download import SourceError
from omni.model.lm.kv_cache import Cache, KVCache
from omni.model.losses import token_losses
from omni.model.packed_attention import SegmentLayout

_ATTENTION = "omni_packed"
_UNLIMITED = 1 << 30  # window in positions
ALLOWED_FP32, ALLOWED_BF16 = 1e-3, 0.1
"""Relative differences of logits: rounding accumulates over layers; a missing factor or cap changes
more than that."""


@dataclass(frozen=True)
class HFConfig:
    """Shape of a transformers language model."""

    architecture: dict[str, Any]
    """Its configuration, as returned by `PretrainedConfig.to_dict`."""

    @property
    def width(self) -> int:
        return int(self.architecture["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.architecture["vocab_size"])

    @property
    def sequence_len(self) -> int | None:
        """Return the maximum number of positions; None where the configuration has none."""
        found = self.architecture.get("max_position_embeddings")
        return found if isinstance(found, int) else None


def source_error(folder: Path, what: str, error: Exception) -> SourceError:
    """Make the error of a folder that transformers cannot load, in one line."""
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it has code of its own (auto_map), and omni runs no code of a model's folder"
    return SourceError(f"{folder}: {what}: {reason}")


def read_config(folder: Path) -> HFConfig:
    """Read the configuration in a model's folder. Raises SourceError."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False, **gguf_argument(folder))
    except (OSError, ValueError, KeyError) as error:
        raise source_error(folder, "expected a language model", error) from None
    text = found.get_text_config()
    values: dict[str, Any] = json.loads(json.dumps(text.to_dict(), default=str))
    for name in ("quantization_config", "id2label", "label2id"):
        values.pop(name, None)
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(values.get(name), int):
            # Some architectures have an alias, which is an attribute only.
            values[name] = getattr(text, name, None)
    if not isinstance(values["hidden_size"], int) or not isinstance(values["vocab_size"], int):
        raise SourceError(f"{folder}: config.json: expected hidden_size and vocab_size")
    if values.get("attn_logit_softcapping"):
        raise SourceError(f"{folder}: attention with a soft cap (Gemma 2) is not supported")
    return HFConfig(values)


def load_pretrained(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the transformers model in a folder with weights in `dtype`. Raises SourceError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # Every rank would draw one.
    extra = gguf_argument(folder)
    if extra:
        with contextlib.suppress(ImportError):  # Before 5.20, GGUF was always dequantized.
            from transformers import GgufConfig

            extra["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, **extra
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise source_error(folder, "cannot be loaded", error) from None
    model.config.quantization_config = None  # type: ignore[union-attr]
    return model


class HFLanguageModel(nn.Module):
    """A transformers model with the interface of `GPT`.

    model: None builds one with random weights in `dtype`. Raises SourceError for a model that is
    not supported.
    """

    model: Any  # transformers' classes have no common type with the methods used here.

    def __init__(
        self,
        config: HFConfig,
        model: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        _register()
        self.config = config
        if model is None:
            values = dict(config.architecture)
            found = AutoConfig.for_model(values.pop("model_type"), **values)
            model = AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=False)
        self.model = model
        self.model.set_attn_implementation(_ATTENTION)
        if self.model.config._attn_implementation != _ATTENTION:
            raise SourceError(
                f"{type(model).__name__}: custom attention functions are not supported"
            )
        # The checkpoint's generation settings may contain penalties and sampling.
        self.model.generation_config = GenerationConfig()
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(self.model, "get_decoder"):
            raise SourceError(
                f"{type(model).__name__}: expected a causal language model with a head"
            )

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.model.parameters())
        return parameter.device

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Compute token embeddings (B, T, C) in fp32, among which soft tokens are inserted."""
        embedded: Tensor = self.model.get_input_embeddings()(ids_BT)
        return embedded.float()

    def head(self) -> nn.Linear:
        """Return the layer that computes the logits."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    def embedding_matrix(self) -> Tensor:
        """Return the token embeddings (V, C) as stored."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def embedding_size(self) -> float:
        """Measure the RMS of the token embeddings, to which soft tokens are scaled."""
        embeddings: Any = self.model.get_input_embeddings()
        sample = torch.arange(0, self.vocab_size, max(1, self.vocab_size // 4096))
        with torch.no_grad():
            values = embeddings(sample.to(self.device)).float()
        return float(values.square().mean().sqrt())

    def trunk(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor,
        layout: SegmentLayout,
        value_mask_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Compute the final hidden states (B, T, C); idx_BT and value_mask_BT are not used."""
        out = self.model.get_decoder()(
            inputs_embeds=x_BTC,
            position_ids=layout.positions_BT,
            # transformers builds no mask of its own when it is given a 4D one.
            attention_mask=x_BTC.new_zeros(1, 1, 1, 1),
            use_cache=False,
            omni_layout=layout,
            omni_cache=cache,
        )
        if cache is not None:
            cache.advance(x_BTC, layout)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute fp32 logits (..., V) of final hidden states (..., C)."""
        head = self.head()
        logits: Tensor = head(hidden.to(head.weight.dtype)).float()
        shape = self.config.architecture
        logits = logits * (shape.get("logit_scale") or 1.0) / (shape.get("logits_scaling") or 1.0)
        cap = shape.get("final_logit_softcapping")
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, hidden_SC: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
        """See `GPT.loss`."""
        return token_losses(self.logits, self.vocab_size, hidden_SC, targets_S)

    def shards(self) -> list[nn.Module]:
        """List the modules that FSDP gathers one at a time: the layers."""
        lists = [m for m in self.model.get_decoder().children() if isinstance(m, nn.ModuleList)]
        return max((list(layers) for layers in lists), key=len)

    def recompute(self) -> None:
        """Store only the inputs of layers, and recompute activations in the backward pass."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def check_head(self, allowed: float | None = None) -> None:
        """Compare logits with the model's own on six tokens, and those of a seventh from the cache.

        allowed: largest relative difference; None: by the dtype of the weights. Raises SourceError
        where they differ more: its forward pass has a step that this class lacks, or its layers
        keep something else than keys and values.
        """
        ids = torch.arange(7, device=self.device)[None]
        x = self.model.get_input_embeddings()(ids)
        layout = SegmentLayout.plain((1, 6), self.device)
        cache = KVCache(1)
        try:
            logits = self.logits(self.trunk(x[:, :6], ids[:, :6], layout, None, cache))
            layout = SegmentLayout.plain((1, 1), self.device, cache.lengths_B)
            last = self.logits(self.trunk(x[:, 6:], ids[:, 6:], layout, None, cache))
            logits = torch.cat((logits, last), 1)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise SourceError(f"{type(self.model).__name__} is not supported: {reason}") from None
        wanted = self.model(inputs_embeds=x, use_cache=False).logits.float()
        if allowed is None:
            allowed = ALLOWED_FP32 if x.dtype == torch.float32 else ALLOWED_BF16
        if float((logits - wanted).norm() / wanted.norm()) > allowed:
            raise SourceError(
                f"{type(self.model).__name__} is not supported: it changes the logits of its head"
            )

    def learnt_positions(self) -> int | None:
        """Return the number of position embeddings; None for a model that computes positions."""
        words = self.model.get_input_embeddings()
        found = [
            module.num_embeddings - getattr(module, "offset", 0)
            for module in self.model.get_decoder().modules()
            if isinstance(module, nn.Embedding) and module is not words
        ]
        return min(found, default=None)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _attend(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    omni_layout: SegmentLayout | None = None,
    omni_cache: Cache | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend in a layer of transformers; returns (B, T, H, D) and None for the weights."""
    if others.get("s_aux") is not None or others.get("softcap") is not None:
        raise RuntimeError(f"{type(module).__name__}: attention sinks and caps are not supported")
    if omni_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query_BHTD,
            key_BGTD,
            value_BGTD,
            attention_mask,
            scaling=scaling,
            **others,
        )
        return out
    width = query_BHTD.shape[-1]
    if scaling is not None and not math.isclose(scaling, width**-0.5):
        query_BHTD = query_BHTD * (scaling * width**0.5)
    q, k, v = (t.transpose(1, 2) for t in (query_BHTD, key_BGTD, value_BGTD))
    # A window in transformers includes the position itself.
    window = _UNLIMITED if sliding_window is None else sliding_window - 1
    q, k = q.to(v.dtype), k.to(v.dtype)
    if omni_cache is None:
        return omni_layout.attend(q, k, v, window), None
    layer: Any = module.layer_idx
    return omni_cache.attend(layer, q, k, v, omni_layout, window), None


def gguf_argument(folder: Path) -> dict[str, Any]:
    """Return transformers' `gguf_file` argument for a folder that has only one GGUF file.

    Raises SourceError where there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or not files:
        return {}
    if len(files) > 1:
        raise SourceError(f"{folder}: expected one GGUF file, found {len(files)}")
    return {"gguf_file": files[0].name}
