"""The speech language model: projector and GPT over one packed batch.

Soft tokens replace the audio positions after the embedding norm; the loss is the summed
cross-entropy of the supervised tokens, so that any split over ranks and microbatches adds up to
the same number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.model.batch import IGNORED, Batch
from omni.model.gpt import GPT, GPTConfig, rms, scatter_soft_tokens
from omni.model.packing import SegmentLayout
from omni.model.projector import Projector


@dataclass(frozen=True)
class OmniConfig:
    """Shape and regularisation of an `OmniModel`; written into every checkpoint.

    stack: encoder frames per soft token. feature_dim: the encoder's d_model.
    dropout: on embeddings and residual branches. token_dropout: share of text inputs whose
    embedding is hidden. audio_dropout: share of soft tokens that are hidden. All in training only.
    ctc: a CTC head on the soft tokens (see `OmniModel`).
    """

    gpt: GPTConfig
    feature_dim: int
    stack: int = 4
    projector_hidden: int | None = None
    dropout: float = 0.0
    token_dropout: float = 0.0
    audio_dropout: float = 0.0
    ctc: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniConfig:
        return cls(**{**values, "gpt": GPTConfig(**values["gpt"])})


@dataclass(frozen=True)
class LossSums:
    """Sums over a batch; divide by the global count of supervised tokens.

    ctc: summed CTC loss of the utterances, zero without a CTC head.
    """

    loss: Tensor
    tokens: Tensor
    correct: Tensor
    ctc: Tensor = field(default_factory=lambda: torch.zeros(()))


class OmniModel(nn.Module):
    """Projector + GPT (+ optional CTC head).

    The CTC head reads the transcript off the soft tokens alone, through one linear layer over
    normed projector outputs (vocabulary plus blank). It gives the projector a direct signal long
    before attention has found the audio, and is not used to write text.
    """

    def __init__(self, config: OmniConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(
            config.stack * config.feature_dim, config.gpt.n_embd, config.projector_hidden
        )
        self.lm = GPT(config.gpt, dropout=config.dropout)
        self.ctc_head = (
            nn.Linear(config.gpt.n_embd, config.gpt.vocab_size + 1) if config.ctc else None
        )

    def init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.projector.init_weights(generator)
        self.lm.init_weights(generator)
        if self.ctc_head is not None:
            nn.init.zeros_(self.ctc_head.bias)
            with torch.no_grad():
                self.ctc_head.weight.normal_(0.0, 0.02, generator=generator)

    def project(self, audio_NF: Tensor) -> Tensor:
        """Soft tokens (N, C) of stacked features."""
        return self.projector(audio_NF.to(self.projector.fc1.weight.dtype))

    def forward(self, batch: Batch) -> LossSums:
        soft_NC = self.project(batch.audio_NF)
        x = self.lm.embed(batch.tokens_BT)
        has_id = ~batch.audio_mask_BT
        audio_NC = soft_NC
        if self.training and self.config.audio_dropout:
            audio_NC = soft_NC * _keep(soft_NC, self.config.audio_dropout)
        if self.training and self.config.token_dropout:
            kept = _keep(x, self.config.token_dropout).squeeze(-1).bool()
            x = x * kept.unsqueeze(-1)
            has_id = has_id & kept
        x = scatter_soft_tokens(x, audio_NC, batch.audio_mask_BT)
        layout = SegmentLayout.packed(batch.segments_BT)
        hidden = self.lm.trunk(x, batch.tokens_BT, layout, has_id)
        # Only supervised positions reach the vocabulary: audio outnumbers text several times.
        supervised = batch.targets_BT != IGNORED
        targets = batch.targets_BT[supervised]
        loss, correct = self.lm.loss(hidden[supervised], targets)
        count = torch.tensor(targets.numel(), device=loss.device)
        ctc = self._ctc(soft_NC, batch) if self.ctc_head is not None else loss.new_zeros(())
        return LossSums(loss, count, correct, ctc)

    def _ctc(self, soft_NC: Tensor, batch: Batch) -> Tensor:
        """Summed CTC loss over the utterances whose transcript fits their soft tokens."""
        assert self.ctc_head is not None
        blank = self.config.gpt.vocab_size
        log_probs = F.log_softmax(self.ctc_head(rms(soft_NC)).float(), dim=-1)
        rows = batch.segments_BT.shape[0]
        # One number per utterance over the whole batch, in the order of its soft tokens.
        keys = batch.segments_BT + torch.arange(rows, device=soft_NC.device)[:, None] * 1_000_000
        audio_keys, input_lengths = keys[batch.audio_mask_BT].unique_consecutive(return_counts=True)
        supervised = batch.targets_BT != IGNORED
        _, answer_lengths = keys[supervised].unique_consecutive(return_counts=True)
        if not len(audio_keys):
            return log_probs.sum() * 0.0
        chunks = log_probs.split(input_lengths.tolist())
        answers = batch.targets_BT[supervised].split(answer_lengths.tolist())
        labels = [answer[:-1] for answer in answers]  # without the end token
        lengths = torch.tensor([len(label) for label in labels], device=soft_NC.device)
        return F.ctc_loss(
            nn.utils.rnn.pad_sequence(list(chunks)),
            torch.cat(labels),
            input_lengths,
            lengths,
            blank=blank,
            reduction="sum",
            zero_infinity=True,
        )


def _keep(x: Tensor, rate: float) -> Tensor:
    """1 for kept and 0 for hidden positions, (..., 1)."""
    return (torch.rand(*x.shape[:-1], 1, device=x.device) >= rate).to(x.dtype)
