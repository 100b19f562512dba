"""The speech language model: projector and language model over one packed batch.

Soft tokens replace the audio positions among the token embeddings; losses are sums over supervised
tokens, so that any split over ranks and microbatches adds up to the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omni.model.batch import IGNORED, Batch
from omni.model.ctc import CTCHead, LinearCTC, TiedCTC, ctc_losses
from omni.model.lm.gpt import GPT, GPTConfig, rms, scatter_soft_tokens
from omni.model.lm.hf import HFConfig, HFLanguageModel
from omni.model.lm.lora import LoraShape, add_lora, is_adapter, without_adapters
from omni.model.losses import Distillation, kl_divergence
from omni.model.packed_attention import SegmentLayout
from omni.model.projector import LayerMix, make_projector


@dataclass(frozen=True)
class LMSource:
    """A pretrained language model: where it came from, and the hash of its weights."""

    uri: str  # nanochat:DIR[@step] or hf:ID_OR_DIR[@revision]
    fingerprint: str


@dataclass(frozen=True)
class OmniConfig:
    """Shape and regularisation of an `OmniModel`; written into every checkpoint.

    lm: the language model's shape. source: where its weights come from; None: from a seed.
    feature_dim: the encoder's d_model. layers: how many of its layers a frame holds, to be mixed.
    stack: encoder frames per soft token. projector: a name in `PROJECTORS`.
    dropout: on a GPT's embeddings and residual branches. token_dropout: share of text inputs whose
    embedding is hidden. audio_dropout: share of soft tokens that are hidden. All in training only.
    ctc: a CTC head on the soft tokens (see `OmniModel`).
    """

    lm: GPTConfig | HFConfig
    feature_dim: int
    layers: int = 1
    stack: int = 4
    projector: str = "mlp"
    projector_hidden: int | None = None
    dropout: float = 0.0
    token_dropout: float = 0.0
    audio_dropout: float = 0.0
    ctc: bool = False
    source: LMSource | None = None
    lora: LoraShape | None = None

    @property
    def frame_dim(self) -> int:
        """Width of a frame as it comes from the stream."""
        return self.layers * self.feature_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniConfig:
        values = dict(values)
        lm = values.pop("gpt", None) or values.pop("lm")  # gpt: what it was called at first
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
    """Sums over a batch; divide by the global `tokens`.

    loss: cross-entropy of the supervised tokens, each times its task's weight; tokens: the sum of
    these weights. correct: how many are predicted rightly.
    ctc: CTC loss of the utterances, zero without a CTC head. kl: the divergence from the language
    model that reads the transcript, zero without distillation.
    tasks: (tasks, 3) cross-entropy, tokens and correct ones of each task, without weights.
    """

    loss: Tensor
    tokens: Tensor
    correct: Tensor
    ctc: Tensor = field(default_factory=lambda: torch.zeros(()))
    kl: Tensor = field(default_factory=lambda: torch.zeros(()))
    tasks: Tensor = field(default_factory=lambda: torch.zeros(1, 3))


class OmniModel(nn.Module):
    """Projector + language model (+ optional CTC head).

    The CTC head reads the transcript off the soft tokens alone (see `omni.model.ctc`). It gives the
    projector a direct signal long before attention has found the audio, and is not used to write
    text.

    lm: the pretrained language model, see `omni.model.lm.pretrained`; None builds its shape.
    task_weights, distillation: what the loss is made of; set by who trains.
    """

    def __init__(
        self, config: OmniConfig, lm: GPT | HFLanguageModel | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        width = config.lm.width
        self.projector = make_projector(
            config.projector, config.stack, config.feature_dim, width, config.projector_hidden
        )
        self.mix = LayerMix(config.layers, config.feature_dim) if config.layers > 1 else None
        self.lm = lm if lm is not None else _build(config.lm)
        self.soft_size: nn.Parameter | None = None
        if isinstance(self.lm, HFLanguageModel):
            # What its embeddings measure; kept with the weights, since training may change them.
            size = 1.0 if lm is None else self.lm.embedding_size()
            self.soft_size = nn.Parameter(torch.tensor([size]), requires_grad=False)
        else:
            self.lm.dropout = config.dropout
        if config.lora is not None:
            add_lora(self.lm, config.lora, seed)
        vocabulary = config.lm.vocab_size
        self.ctc_head: CTCHead | None = None
        if config.ctc:
            own = isinstance(self.lm, GPT)
            self.ctc_head = LinearCTC(width, vocabulary) if own else TiedCTC(width, vocabulary)
        self.task_weights: Tensor | None = None
        self.distillation: Distillation | None = None

    @property
    def tasks(self) -> int:
        return 1 if self.task_weights is None else len(self.task_weights)

    def init_weights(self, seed: int) -> None:
        """From a seed: all that is not pretrained."""
        generator = torch.Generator().manual_seed(seed)
        self.projector.init_weights(generator)  # type: ignore[operator]
        if self.config.source is None and isinstance(self.lm, GPT):
            self.lm.init_weights(generator)
        if self.ctc_head is not None:
            self.ctc_head.init_weights(generator)

    def train_parts(self, parts: Sequence[str]) -> None:
        """Freeze everything but these: projector, lora, lm. Sizes of soft tokens stay."""
        for name, parameter in self.named_parameters():
            inside = name.startswith("lm.")
            kind = "lora" if is_adapter(name) else "lm" if inside else "projector"
            parameter.requires_grad_(kind in parts and name != "soft_size")

    def kept_by_reference(self, name: str) -> bool:
        """Whether a parameter is a pretrained model's and frozen: checkpoints leave it out."""
        if self.config.source is None or not name.startswith("lm."):
            return False
        return not self.get_parameter(name).requires_grad

    def project(self, audio_NF: Tensor, starts_N: Tensor | None = None) -> Tensor:
        """Soft tokens (N, C) of stacked features; starts_N as in `Batch`."""
        x = audio_NF.to(next(self.projector.parameters()).dtype)
        if self.mix is not None:
            x = self.mix(x)
        soft: Tensor = self.projector(x, starts_N)
        return soft if self.soft_size is None else soft * self.soft_size

    def forward(self, batch: Batch, listen_only: bool = False) -> LossSums:
        """listen_only: leave the language model out; CTC is the only loss."""
        soft_NC = self.project(batch.audio_NF, batch.audio_starts_N)
        if listen_only:
            return self._listen(soft_NC, batch)
        x = self.lm.embed(batch.tokens_BT)
        has_id = ~batch.audio_mask_BT
        audio_NC = soft_NC
        if self.training and self.config.audio_dropout:
            audio_NC = self._hide(soft_NC, _keep(soft_NC, self.config.audio_dropout))
        if self.training and self.config.token_dropout:
            kept = _keep(x, self.config.token_dropout).squeeze(-1).bool()
            x = self._hide(x, kept.unsqueeze(-1))
            has_id = has_id & kept
        x = scatter_soft_tokens(x, audio_NC, batch.audio_mask_BT)
        layout = SegmentLayout.packed(batch.segments_BT)
        hidden = self.lm.trunk(x, batch.tokens_BT, layout, has_id)
        # Only supervised positions reach the vocabulary: audio outnumbers text several times.
        supervised = batch.targets_BT != IGNORED
        targets, hidden_SC = batch.targets_BT[supervised], hidden[supervised]
        losses, right = self.lm.loss(hidden_SC, targets)
        tasks = batch.tasks_BT[supervised]
        weights = None if self.task_weights is None else self.task_weights.to(x.device)[tasks]
        loss = losses.sum() if weights is None else (losses * weights).sum()
        count = (
            torch.tensor(targets.numel(), device=loss.device) if weights is None else weights.sum()
        )
        zero = loss.new_zeros(())
        return LossSums(
            loss,
            count,
            right.sum(),
            zero if self.ctc_head is None else self._ctc(soft_NC, batch),
            zero if batch.teacher is None else self._kl(hidden_SC, targets, batch.teacher),
            self._by_task(losses, right, tasks),
        )

    def _hide(self, x: Tensor, kept: Tensor) -> Tensor:
        """x where it is kept, else nothing: zero in a GPT, which mixes its input into every layer.

        In other models a zero stays zero through all layers where no other position is seen, and
        each norm on the way multiplies its gradient by 1/sqrt(eps): 30 layers overflow. There the
        mean embedding stands for nothing.
        """
        if isinstance(self.lm, GPT):
            return x * kept
        nothing = self.lm.embedding_matrix().detach().float().mean(0)
        return torch.where(kept.bool(), x, nothing.to(x.dtype))

    def _listen(self, soft_NC: Tensor, batch: Batch) -> LossSums:
        ctc = self._ctc(soft_NC, batch)
        # Whoever adds up gradients over ranks waits for every parameter's.
        for parameter in self.lm.parameters():
            if parameter.requires_grad:
                ctc = ctc + parameter.flatten()[0] * 0.0
        zero = ctc.new_zeros(())
        count = (batch.targets_BT != IGNORED).sum().to(ctc.dtype)
        return LossSums(zero, count, zero, ctc, zero, ctc.new_zeros(self.tasks, 3))

    def _by_task(self, losses: Tensor, right: Tensor, tasks: Tensor) -> Tensor:
        columns = torch.stack((losses.detach(), torch.ones_like(losses), right.to(losses.dtype)), 1)
        return columns.new_zeros(self.tasks, 3).index_add_(0, tasks, columns)

    def _kl(self, hidden_SC: Tensor, targets: Tensor, teacher: Batch) -> Tensor:
        """Summed divergence from what the language model, as it came, says to the transcript."""
        assert self.distillation is not None
        was_training = self.lm.training
        self.lm.eval()
        with torch.no_grad(), without_adapters(self.lm):
            layout = SegmentLayout.packed(teacher.segments_BT)
            ids = teacher.tokens_BT
            has_id = torch.ones_like(ids, dtype=torch.bool)
            hidden = self.lm.trunk(self.lm.embed(ids), ids, layout, has_id)
            teacher_SC = hidden[teacher.targets_BT != IGNORED]
        self.lm.train(was_training)
        return kl_divergence(self.lm, hidden_SC, teacher_SC, targets, self.distillation)

    def _ctc(self, soft_NC: Tensor, batch: Batch) -> Tensor:
        """Summed CTC loss over the utterances whose transcript fits their soft tokens."""
        assert self.ctc_head is not None
        rows = batch.segments_BT.shape[0]
        # One number per utterance over the whole batch, in the order of its soft tokens.
        keys = batch.segments_BT + torch.arange(rows, device=soft_NC.device)[:, None] * 1_000_000
        _, soft_lengths = keys[batch.audio_mask_BT].unique_consecutive(return_counts=True)
        supervised = batch.targets_BT != IGNORED
        _, answer_lengths = keys[supervised].unique_consecutive(return_counts=True)
        if not len(soft_lengths):
            return self.ctc_head(rms(soft_NC), self.lm).sum() * 0.0
        answers = batch.targets_BT[supervised].split(answer_lengths.tolist())
        labels = [answer[:-1] for answer in answers]  # without the end token
        return ctc_losses(self.ctc_head, rms(soft_NC), self.lm, soft_lengths.tolist(), labels).sum()


def _keep(x: Tensor, rate: float) -> Tensor:
    """1 for kept and 0 for hidden positions, (..., 1)."""
    return (torch.rand(*x.shape[:-1], 1, device=x.device) >= rate).to(x.dtype)


def _build(shape: GPTConfig | HFConfig) -> GPT | HFLanguageModel:
    return GPT(shape) if isinstance(shape, GPTConfig) else HFLanguageModel(shape)
