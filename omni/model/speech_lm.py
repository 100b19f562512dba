"""The speech language model: projector and language model over one packed batch.

Soft tokens replace the token embeddings at audio positions. Losses are sums over supervised tokens,
so that any split into ranks and microbatches adds up to the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omni.model.batch import Batch
from omni.model.ctc import CTCHead, Embeds, LinearCTC, TiedCTC, ctc_losses
from omni.model.lm.gpt import GPT, scatter_soft_tokens
from omni.model.lm.gpt_block import GPTConfig, rms
from omni.model.lm.hf import HFConfig, HFLanguageModel
from omni.model.lm.lora import (
    LoraShape,
    add_lora,
    init_adapters,
    is_adapter,
    without_adapters,
)
from omni.model.losses import Distillation, kl_divergence
from omni.model.projector import LayerMix, Projector, make_projector
from omni.model.shards import copy_, is_sharded
from omni.model.speech_input import SpeechInput
from omni.model.summary import SummaryPool

_MEASURED = ("soft_size", "summary.centre", "summary.gain")
"""Values that are saved as weights, and never trained."""


@dataclass(frozen=True)
class LMSource:
    """Identity of a pretrained language model."""

    uri: str
    """nanochat:DIR[@STEP], or hf:ID_OR_DIR[@REVISION] or ms:ID[@REVISION]."""
    fingerprint: str
    """Hash of its weights."""


@dataclass(frozen=True)
class OmniConfig:
    """Shape and regularisation of an `OmniModel`; written into every checkpoint."""

    lm: GPTConfig | HFConfig
    """Shape of the language model."""
    feature_dim: int
    """The encoder's d_model."""
    layers: int = 1
    """Encoder layers per frame; several are mixed by learnt weights."""
    stack: int = 4
    """Encoder frames per soft token."""
    projector: str = "mlp"
    """A name in `PROJECTORS`, or package.module:Class."""
    projector_hidden: int | None = None
    """Hidden width of the projector; None: the width of the language model."""
    summary_tokens: int = 0
    """Soft tokens per recording that summarise all of it, see `omni.model.summary`."""
    dropout: float = 0.0
    """Dropout on a GPT's embeddings and residual branches, in training."""
    token_dropout: float = 0.0
    """Share of text positions whose embedding is masked in training."""
    audio_dropout: float = 0.0
    """Share of soft tokens that are masked in training."""
    ctc: bool = False
    """Add a CTC head on the soft tokens."""
    source: LMSource | None = None
    """Pretrained weights of the language model; None: initialised from a seed."""
    lora: LoraShape | None = None

    @property
    def frame_dim(self) -> int:
        """Width of a frame in the stream: all of its layers."""
        return self.layers * self.feature_dim

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if not self.summary_tokens:
            del values["summary_tokens"]  # Fingerprints of models without them stay as they were.
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniConfig:
        values = dict(values)
        lm = values.pop("gpt", None) or values.pop("lm")  # The first checkpoints call it gpt.
        source, lora = values.pop("source", None), values.pop("lora", None)
        if lora is not None:
            lora = LoraShape(lora["rank"], lora["alpha"], tuple(lora["targets"]))
        return cls(
            lm=HFConfig(**lm) if "architecture" in lm else GPTConfig(**lm),
            source=None if source is None else LMSource(**source),
            lora=lora,
            **values,
        )


@dataclass(frozen=True)
class LossSums:
    """Sums over a batch, scalars; divide by the global `tokens`."""

    loss: Tensor
    """Cross-entropy of the supervised tokens, each times the weight of its task."""
    tokens: Tensor
    """Sum of these weights."""
    correct: Tensor
    """Number of supervised tokens that are predicted correctly."""
    ctc: Tensor = field(default_factory=lambda: torch.zeros(()))
    """CTC loss of the utterances; zero without a CTC head."""
    kl: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Divergence from the teacher; zero without distillation."""
    tasks: Tensor = field(default_factory=lambda: torch.zeros(1, 3))
    """(tasks, 3): unweighted cross-entropy, tokens and correct tokens of each task."""


class OmniModel(SpeechInput, nn.Module):
    """Projector, language model and optional CTC head.

    The CTC head predicts the transcript from the soft tokens alone (see `omni.model.ctc`). It
    trains the projector directly, before the language model attends to the audio, and decodes
    beside the language model (see `omni.model.decode`).

    lm: the pretrained language model, see `omni.model.lm.pretrained`; None builds its shape.
    The training loop sets `task_weights`, (tasks,) fp32, and `distillation`.
    """

    def __init__(
        self, config: OmniConfig, lm: GPT | HFLanguageModel | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        width = config.lm.width
        self.projector = self._make_projector()
        self.mix = LayerMix(config.layers, config.feature_dim) if config.layers > 1 else None
        self.summary: SummaryPool | None = None
        if config.summary_tokens:
            self.summary = SummaryPool(
                config.summary_tokens, config.stack, config.layers, config.feature_dim, width
            )
        self.lm = lm if lm is not None else _build(config.lm)
        self.soft_size: nn.Parameter | None = None
        if isinstance(self.lm, HFLanguageModel):
            # The RMS of the embeddings before training, which may change them; saved as a weight.
            there = lm is not None and not self.lm.embedding_matrix().is_meta
            size = self.lm.embedding_size() if there else 1.0
            self.soft_size = nn.Parameter(torch.tensor([size]), requires_grad=False)
        else:
            self.lm.dropout = config.dropout
        if config.lora is not None:
            add_lora(self.lm, config.lora, seed)
        vocabulary = config.lm.vocab_size
        self.ctc_head: CTCHead | None = None
        if config.ctc:
            head = LinearCTC if isinstance(self.lm, GPT) else TiedCTC
            self.ctc_head = head(width, vocabulary)
        self.task_weights: Tensor | None = None
        self.distillation: Distillation | None = None

    @property
    def tasks(self) -> int:
        return 1 if self.task_weights is None else len(self.task_weights)

    def _make_projector(self) -> nn.Module:
        c = self.config
        return make_projector(c.projector, c.stack, c.feature_dim, c.lm.width, c.projector_hidden)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise everything that is not pretrained from a seed, sharded or not alike."""
        generator = torch.Generator().manual_seed(seed)
        sharded = any(map(is_sharded, self.parameters()))
        # A plug-in may do anything to its weights, so that it needs them whole.
        projector = self._make_projector() if sharded else self.projector
        projector.init_weights(generator)  # type: ignore[operator]
        if isinstance(projector, Projector):
            projector.init_output(generator)
        if sharded:
            for name, parameter in projector.named_parameters():
                copy_(self.projector.get_parameter(name), parameter)
            for name, buffer in projector.named_buffers():
                self.projector.get_buffer(name).copy_(buffer)
            if self.mix is not None:
                self.mix.logits.zero_()
        if self.config.source is None and isinstance(self.lm, GPT):
            self.lm.init_weights(generator)
        if self.ctc_head is not None:
            self.ctc_head.init_weights(generator)
        if self.summary is not None:
            self.summary.init_weights(generator)
        if sharded and self.config.lora is not None:
            init_adapters(self.lm, seed)

    def train_parts(self, parts: Sequence[str]) -> None:
        """Freeze all parameters but those of the named parts: projector, lora, lm."""
        for name, parameter in self.named_parameters():
            inside = name.startswith("lm.")
            kind = "lora" if is_adapter(name) else "lm" if inside else "projector"
            parameter.requires_grad_(kind in parts and name not in _MEASURED)

    def kept_by_reference(self, name: str) -> bool:
        """Tell whether a parameter is pretrained and frozen; checkpoints leave such ones out."""
        if self.config.source is None or not name.startswith("lm."):
            return False
        return not self.get_parameter(name).requires_grad

    def forward(self, batch: Batch, ctc_only: bool = False) -> LossSums:
        """Compute the losses of a batch; ctc_only skips the language model."""
        soft_NC = self.project(batch.audio_NF, batch.audio_starts_N)
        if ctc_only:
            return self._ctc_sums(soft_NC, batch)
        x = self.lm.embed(batch.tokens_BT)
        has_id = ~batch.audio_mask_BT
        audio_NC = soft_NC
        if self.training and self.config.audio_dropout:
            kept = _keep(soft_NC, self.config.audio_dropout)
            audio_NC = torch.where(kept, soft_NC, self._hidden_input().to(soft_NC.dtype))
        if self.training and self.config.token_dropout:
            kept = _keep(x, self.config.token_dropout)
            x = torch.where(kept, x, self._hidden_input().to(x.dtype))
            has_id = has_id & kept.squeeze(-1)
        x = scatter_soft_tokens(x, audio_NC, batch.audio_at_N)
        if self.summary is not None:
            x = scatter_soft_tokens(x, self.summaries(batch), batch.summary_at_M)
        layout = batch.layout()
        hidden = self.lm.trunk(x, batch.tokens_BT, layout, has_id)
        # Logits of other positions are not needed: audio outnumbers text several times.
        hidden_SC, targets = _at(hidden, batch), _at(batch.targets_BT, batch)
        losses, correct = self.lm.loss(hidden_SC, targets)
        tasks = _at(batch.tasks_BT, batch)
        weights = self._weights(tasks)
        zero = losses.new_zeros(())
        return LossSums(
            losses.sum() if weights is None else (losses * weights).sum(),
            _count(targets) if weights is None else weights.sum(),
            correct.sum(),
            zero if self.ctc_head is None else self._ctc(soft_NC, batch, self.lm),
            zero if batch.teacher is None else self._kl(hidden_SC, targets, batch.teacher),
            self._by_task(losses, correct, tasks),
        )

    def summaries(self, batch: Batch) -> Tensor:
        """Return the summary tokens of a batch (M, C), some of them masked in training."""
        recordings = len(batch.summary_at_M) // self.config.summary_tokens
        summary_MC = self.summarize(batch.audio_NF, batch.audio_starts_N, recordings)
        assert summary_MC is not None
        if not (self.training and self.config.audio_dropout):
            return summary_MC
        kept = _keep(summary_MC, self.config.audio_dropout)
        return torch.where(kept, summary_MC, self._hidden_input().to(summary_MC.dtype))

    def _hidden_input(self) -> Tensor:
        """Return what hidden positions hold (C,): the mean embedding at the RMS of embeddings.

        A zero vector at the first position of a segment, which sees no other, stays zero through
        all layers, and each norm multiplies its gradient by 1/sqrt(eps): 12 layers overflow.
        """
        mean = self.lm.embedding_matrix().detach().float().mean(0)
        least = torch.finfo(mean.dtype).tiny  # Divides no mean of zero.
        unit: Tensor = mean * (len(mean) ** 0.5 / mean.norm().clamp(min=least))
        return unit if self.soft_size is None else unit * self.soft_size

    def _ctc_sums(self, soft_NC: Tensor, batch: Batch) -> LossSums:
        """Compute the CTC loss alone; no parameter of the language model gets a gradient."""
        ctc = self._ctc(soft_NC, batch, _Frozen(self.lm))
        zero = ctc.new_zeros(())
        tasks = _at(batch.tasks_BT, batch)
        weights = self._weights(tasks)
        count = _count(tasks) if weights is None else weights.sum()
        return LossSums(zero, count.to(ctc.dtype), zero, ctc, zero, ctc.new_zeros(self.tasks, 3))

    def _weights(self, tasks: Tensor) -> Tensor | None:
        """Return the weight of each position by its task; None: all are 1."""
        return None if self.task_weights is None else self.task_weights.to(tasks.device)[tasks]

    def _by_task(self, losses: Tensor, correct: Tensor, tasks: Tensor) -> Tensor:
        columns = torch.stack(
            (losses.detach(), torch.ones_like(losses), correct.to(losses.dtype)), 1
        )
        return columns.new_zeros(self.tasks, 3).index_add_(0, tasks, columns)

    def _kl(self, hidden_SC: Tensor, targets: Tensor, teacher: Batch) -> Tensor:
        """Sum the divergence from the teacher: the LM without adapters, given the transcript."""
        assert self.distillation is not None
        was_training = self.lm.training
        self.lm.eval()
        with torch.no_grad(), without_adapters(self.lm):
            layout, ids = teacher.layout(), teacher.tokens_BT
            has_id = torch.ones_like(ids, dtype=torch.bool)
            hidden = self.lm.trunk(self.lm.embed(ids), ids, layout, has_id)
            teacher_SC = _at(hidden, teacher)
        self.lm.train(was_training)
        return kl_divergence(self.lm, hidden_SC, teacher_SC, targets, self.distillation)

    def _ctc(self, soft_NC: Tensor, batch: Batch, lm: Embeds) -> Tensor:
        """Sum the CTC loss over the recordings whose transcript fits into their soft tokens.

        What is said in a recording is its label, whatever is asked about it.
        """
        assert self.ctc_head is not None
        labels = batch.ctc
        if labels is None or not labels.soft_lengths:
            # DDP needs a gradient for every trainable parameter.
            unused: Tensor = self.ctc_head(rms(soft_NC[:0]), lm)
            return unused.sum() * 0.0
        if labels.rows_N is not None:
            soft_NC = soft_NC.index_select(0, labels.rows_N)
        return ctc_losses(self.ctc_head, rms(soft_NC), lm, labels).sum()


def _at(x_BT: Tensor, batch: Batch) -> Tensor:
    """Return x (B, T, ...) at the supervised positions, (S, ...)."""
    return x_BT.flatten(0, 1).index_select(0, batch.supervised_S)


def _count(x_S: Tensor) -> Tensor:
    """Return the length of x as a tensor on its device, without a copy from the host."""
    return torch.full((), len(x_S), device=x_S.device)


class _Frozen:
    """The token embeddings of a language model without their gradient."""

    def __init__(self, lm: GPT | HFLanguageModel) -> None:
        self._lm = lm

    def embedding_matrix(self) -> Tensor:
        return self._lm.embedding_matrix().detach()


def _keep(x: Tensor, rate: float) -> Tensor:
    """Draw a mask of the positions that are not hidden, (..., 1) bool."""
    return torch.rand(*x.shape[:-1], 1, device=x.device) >= rate


def _build(shape: GPTConfig | HFConfig) -> GPT | HFLanguageModel:
    return GPT(shape) if isinstance(shape, GPTConfig) else HFLanguageModel(shape)
