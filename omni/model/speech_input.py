"""Soft tokens of recordings, for the models that read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from omni.model.projector import LayerMix
from omni.model.summary import SummaryPool


class SpeechInput:
    """Part of a model that maps stacked encoder features to soft tokens of its width.

    The model has these modules and a `config` with `stack` and `summary_tokens`.
    """

    config: Any
    projector: nn.Module
    mix: LayerMix | None
    """Weights of several encoder layers."""
    summary: SummaryPool | None
    """Pool of `config.summary_tokens`."""
    soft_size: nn.Parameter | None
    """RMS of soft tokens; None: that of the projector."""

    def project(self, audio_NF: Tensor, starts_N: Tensor | None = None) -> Tensor:
        """Project stacked features (N, F) to soft tokens (N, C); starts_N: see `Batch`."""
        x = audio_NF.to(next(self.projector.parameters()).dtype)
        if self.mix is not None:
            x = self.mix(x)
        return self._sized(self.projector(x, starts_N))

    def summarize(self, audio_NF: Tensor, starts_N: Tensor, recordings: int) -> Tensor | None:
        """Summarise the recordings in stacked features, to (recordings * summary_tokens, C).

        None without summary tokens.
        """
        if self.summary is None:
            return None
        return self._sized(self.summary(audio_NF, starts_N, recordings))

    def _sized(self, soft: Tensor) -> Tensor:
        return soft if self.soft_size is None else soft * self.soft_size
