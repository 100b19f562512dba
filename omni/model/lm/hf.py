"""Any causal language model of transformers, over packed rows of text and soft tokens.

The model runs on `inputs_embeds` with an attention function of ours, which takes the layout of the
rows from the call's keyword arguments, so that a segment sees itself only. What transformers
decodes with it has no layout, and goes through its own scaled dot product attention.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.errors import first_line
from omni.model.download import SourceError
from omni.model.losses import token_losses
from omni.model.packed_attention import SegmentLayout

_ATTENTION = "omni_packed"
_EVERYTHING = 1 << 30  # a window that hides nothing


@dataclass(frozen=True)
class HFConfig:
    """architecture: the model's own configuration, as `PretrainedConfig.to_dict` has it."""

    architecture: dict[str, Any]

    @property
    def width(self) -> int:
        return int(self.architecture["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.architecture["vocab_size"])

    @property
    def sequence_len(self) -> int | None:
        """Positions of the longest sequence it was made for; None where it says nothing."""
        found = self.architecture.get("max_position_embeddings")
        return found if isinstance(found, int) else None


def read_config(folder: Path) -> HFConfig:
    """The configuration in a model's folder. Raises SourceError."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder, **gguf_argument(folder))
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder}: no language model: {first_line(error)}") from None
    text = found.get_text_config()
    values: dict[str, Any] = json.loads(json.dumps(text.to_dict(), default=str))
    for name in ("quantization_config", "id2label", "label2id"):
        values.pop(name, None)
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(values.get(name), int):
            values[name] = getattr(text, name, None)  # some have it under another name
    if not isinstance(values["hidden_size"], int) or not isinstance(values["vocab_size"], int):
        raise SourceError(f"{folder}: its configuration has no hidden_size or vocab_size")
    if values.get("attn_logit_softcapping"):
        raise SourceError(f"{folder}: attention with a soft cap (Gemma 2) is not supported")
    return HFConfig(values)


def load_pretrained(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformers model in a folder, its weights in `dtype`. Raises SourceError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # every rank would draw one
    extra = gguf_argument(folder)
    if extra:
        with contextlib.suppress(ImportError):  # before 5.20 there was no other way
            from transformers import GgufConfig

            extra["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SourceError(f"{folder}: cannot be loaded: {first_line(error)}") from None
    model.config.quantization_config = None  # type: ignore[union-attr]
    return model


class HFLanguageModel(nn.Module):
    """The interface of `GPT` for a transformers model. model None builds one without weights."""

    model: Any  # transformers' classes share no type that says what they can do

    def __init__(self, config: HFConfig, model: nn.Module | None = None) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        _register()
        self.config = config
        if model is None:
            values = dict(config.architecture)
            found = AutoConfig.for_model(values.pop("model_type"), **values)
            model = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
        self.model = model
        self.model.set_attn_implementation(_ATTENTION)
        if self.model.config._attn_implementation != _ATTENTION:
            raise SourceError(f"{type(model).__name__} takes no attention function from outside")
        self.model.generation_config = GenerationConfig()  # no penalties, no sampling
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(self.model, "get_decoder"):
            raise SourceError(f"{type(model).__name__}: not a causal language model with a head")

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings (B, T, C) in fp32: the place where soft tokens enter."""
        return self.model.get_input_embeddings()(ids_BT).float()

    def embedding_matrix(self) -> Tensor:
        """(V, C), as stored."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def embedding_size(self) -> float:
        """Root mean square of the token embeddings, which soft tokens should have too."""
        embeddings: Any = self.model.get_input_embeddings()
        every = torch.arange(0, self.vocab_size, max(1, self.vocab_size // 4096))
        with torch.no_grad():
            values = embeddings(every.to(self.device)).float()
        return float(values.square().mean().sqrt())

    def trunk(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor,
        layout: SegmentLayout,
        value_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C). The ids play no part: all is in the embeddings."""
        out = self.model.get_decoder()(
            inputs_embeds=x_BTC,
            position_ids=layout.positions_BT,
            # Four axes tell transformers to make no mask of its own; ours is in the layout.
            attention_mask=x_BTC.new_zeros(1, 1, 1, 1),
            use_cache=False,
            omni_layout=layout,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of final hidden states (..., C)."""
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden.to(head.weight.dtype)).float()
        shape = self.config.architecture
        logits = logits * (shape.get("logit_scale") or 1.0) / (shape.get("logits_scaling") or 1.0)
        cap = shape.get("final_logit_softcapping")
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, hidden_SC: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
        """As `GPT.loss`."""
        return token_losses(self.logits, self.vocab_size, hidden_SC, targets_S)

    def shards(self) -> list[nn.Module]:
        """What FSDP gathers one at a time: the layers."""
        lists = [m for m in self.model.get_decoder().children() if isinstance(m, nn.ModuleList)]
        return max((list(layers) for layers in lists), key=len)

    def recompute(self) -> None:
        """Keep layers' inputs only, and compute the rest again for the backward pass."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def check_head(self) -> None:
        """Raises SourceError where the model does more to its logits than this class knows."""
        ids = torch.arange(6, device=self.device)[None]
        x = self.model.get_input_embeddings()(ids)
        layout = SegmentLayout.packed(torch.ones_like(ids))
        try:
            mine = self.logits(self.trunk(x, ids, layout))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise SourceError(f"{type(self.model).__name__} is not supported: {reason}") from None
        theirs = self.model(inputs_embeds=x, use_cache=False).logits.float()
        # Rounding adds up over layers; a factor or a cap changes more than that.
        allowed = 1e-3 if x.dtype == torch.float32 else 0.1
        if float((mine - theirs).norm() / theirs.norm()) > allowed:
            raise SourceError(
                f"{type(self.model).__name__}: its logits are not its head's alone; this "
                "architecture is not supported"
            )

    def write(self, rows: Sequence[Tensor], limits: Sequence[int], end: int) -> list[list[int]]:
        """Greedy continuations, see `omni.model.lm.generate`."""
        from transformers import GenerationConfig

        longest = max(map(len, rows))
        # transformers decodes rows that end together: pad on the left.
        x = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=x.device)
        places = torch.arange(longest, device=x.device)
        settings = GenerationConfig(
            max_new_tokens=max(limits), do_sample=False, eos_token_id=end, pad_token_id=end
        )
        written = self.model.generate(
            inputs_embeds=x,
            attention_mask=(places >= longest - lengths[:, None]).long(),
            generation_config=settings,
        )
        answers = []
        for answer, limit in zip(written.tolist(), limits, strict=True):
            upto = answer.index(end) if end in answer else len(answer)
            answers.append(answer[: min(upto, limit)])
        return answers


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers layer: (B, T, H, D), and no weights."""
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
    # A window of n in transformers includes the position itself.
    window = _EVERYTHING if sliding_window is None else sliding_window - 1
    return omni_layout.attend(q.to(v.dtype), k.to(v.dtype), v, window), None


def gguf_argument(folder: Path) -> dict[str, Any]:
    """The argument that names a folder's only GGUF file, where it has no other weights."""
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or not files:
        return {}
    if len(files) > 1:
        raise SourceError(f"{folder}: {len(files)} GGUF files; expected one")
    return {"gguf_file": files[0].name}
