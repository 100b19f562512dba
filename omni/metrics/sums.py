"""Sums of losses over batches, steps and ranks, as one dataclass that packs into one tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omni.model.speech_lm import LossSums

if TYPE_CHECKING:
    from typing_extensions import Self

_LOSSES = ("loss", "tokens", "correct", "ctc", "kl")


@dataclass
class LossTotals:
    """Sums of `LossSums` over batches; Python floats are fp64, so that counts are exact.

    `StepSums` adds what is counted beside the losses. All fields but `tasks` are numbers.
    """

    loss: float = 0.0
    tokens: float = 0.0
    correct: float = 0.0
    ctc: float = 0.0
    kl: float = 0.0
    tasks: Tensor = field(  # (tasks, 3)
        default_factory=lambda: torch.zeros(1, 3, dtype=torch.float64), kw_only=True
    )

    @classmethod
    def of_losses(cls, packed: Tensor) -> Self:
        """Read the vector of `pack_losses`; whatever else is counted stays zero."""
        losses, tasks = packed[: len(_LOSSES)].tolist(), packed[len(_LOSSES) :]
        return cls(*losses, tasks=tasks.view(-1, 3))

    def pack(self) -> Tensor:
        """Return all sums as one fp64 vector, for the all-reduce over ranks."""
        numbers = torch.tensor([getattr(self, n) for n in self._names()], dtype=torch.float64)
        return torch.cat((numbers, self.tasks.flatten()))

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        size = len(cls._names())
        return cls(*packed[:size].tolist(), tasks=packed[size:].view(-1, 3))

    def __iadd__(self, other: Self) -> Self:
        for name in self._names():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tasks = self.tasks + other.tasks
        return self

    @property
    def counted(self) -> float:
        """Supervised text tokens, without the weights of tasks."""
        return float(self.tasks[:, 1].sum())

    @classmethod
    def _names(cls) -> list[str]:
        return [item.name for item in fields(cls) if item.name != "tasks"]


def pack_losses(out: LossSums) -> Tensor:
    """Return (5 + 3 * tasks,) fp64 on the device of the losses, so that the host need not wait."""
    columns = torch.stack([getattr(out, name).detach().double() for name in _LOSSES])
    return torch.cat((columns, out.tasks.detach().double().flatten()))


def as_tasks(rows: list[list[float]]) -> Tensor:
    """Return sums by task as the (tasks, 3) tensor of `LossTotals`."""
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)


def zero_losses(tasks: int) -> Tensor:
    """Return what `pack_losses` packs, of no batch."""
    return torch.zeros(len(_LOSSES) + 3 * tasks, dtype=torch.float64)
