"""Projectors: stacked encoder frames to soft tokens of the language model's width.

A projector maps `stack` frames to one soft token. To add one, write a class with the constructor,
`init_weights` and `forward` of `SwiGLUProjector`, and name it in `PROJECTORS`, or as
package.module:Class in `model.projector` (docs/plug-ins.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.config.plug_in import check_methods, load_plug_in, make_plug_in
from omni.errors import ConfigError, first_line
from omni.model.shards import set_rows

START_RMS = 0.05
"""RMS of the first soft tokens of `Projector` in a model.

Behind the norm of the CTC head small ones turn fast: with an RMS of 1, its loss falls slowly at
first; with 0, gradients explode.
"""
_GELU_RMS = 0.652
"""RMS of gelu(x) for x of a standard normal distribution."""


def stack_frames(features_TF: Tensor, stack: int) -> Tensor:
    """Concatenate `stack` frames, zero-padded: (T, d) to (ceil(T / stack), stack * d)."""
    frames, width = features_TF.shape
    missing = -frames % stack
    if missing:
        features_TF = F.pad(features_TF, (0, 0, 0, missing))
    return features_TF.reshape(-1, stack * width)


def soft_tokens(frames: int, stack: int) -> int:
    """Count the soft tokens of `frames` encoder frames."""
    return -(-frames // stack)


class Projector(nn.Module):
    """Two-layer MLP without biases: fc2(gelu(fc1(x))), (..., in_dim) to (..., out_dim).

    fc1 starts uniform(+-sqrt(3 / in_dim)), so that unit-variance input gives unit-variance hidden
    values; fc2 starts at zero, so that an untrained projector adds nothing to the residual stream.
    `OmniModel` starts fc2 by `init_output`: behind soft tokens of zero, norms multiply gradients by
    1/sqrt(eps), which are thousands. Weights are fp32; outside autocast the products run in the
    input's dtype.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or out_dim
        self.fc1 = nn.Linear(in_dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, out_dim, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        _uniform(self.fc1, generator)
        self.fc2.weight.zero_()

    @torch.no_grad()
    def init_output(self, generator: torch.Generator | None = None) -> None:
        """Initialise fc2 so that unit-variance input gives soft tokens of RMS `START_RMS`."""
        _uniform(self.fc2, generator)
        self.fc2.weight.mul_(START_RMS / _GELU_RMS)

    def forward(self, x: Tensor, starts_N: Tensor | None = None) -> Tensor:
        return _linear(F.gelu(_linear(x, self.fc1)), self.fc2)


class SwiGLUProjector(nn.Module):
    """RMSNorm, gated MLP, RMSNorm: norm_out(out(silu(gate(x)) * up(x))), x = norm_in(input).

    (..., in_dim) to (..., out_dim). Soft tokens have unit RMS from the first step on, since a
    pretrained language model expects embeddings of a certain RMS; `OmniModel` scales them to it.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or out_dim
        self.norm_in = nn.RMSNorm(in_dim, eps=1e-6)
        self.gate = nn.Linear(in_dim, hidden_dim, bias=False)
        self.up = nn.Linear(in_dim, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, out_dim, bias=False)
        self.norm_out = nn.RMSNorm(out_dim, eps=1e-6)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.gate, self.up, self.out):
            _uniform(linear, generator)
        self.norm_in.weight.fill_(1.0)
        self.norm_out.weight.fill_(1.0)

    def forward(self, x: Tensor, starts_N: Tensor | None = None) -> Tensor:
        normed = self.norm_in(x.to(self.norm_in.weight.dtype))
        hidden = F.silu(self.gate(normed)) * self.up(normed)
        soft: Tensor = self.norm_out(self.out(hidden).to(self.norm_out.weight.dtype))
        return soft


class ConvProjector(nn.Module):
    """Convolutions of kernel 3 and stride 2, one per halving of the frame rate; linear.

    Unlike with plain stacking, neighbouring soft tokens share frames at their edges. Each recording
    is padded with zeros at both ends; nothing crosses from one recording to the next. in_dim is
    `stack`, a power of two, times the width of a frame.
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int | None = None, *, stack: int = 4
    ) -> None:
        super().__init__()
        if stack & (stack - 1) or in_dim % stack:
            raise ValueError(
                f"projector conv: stack {stack}: expected a power of two that divides {in_dim}"
            )
        hidden_dim = hidden_dim or out_dim
        self.stack, self.frame = stack, in_dim // stack
        widths = [self.frame] + [hidden_dim] * (stack.bit_length() - 1)
        self.norm_in = nn.RMSNorm(self.frame, eps=1e-6)
        self.convs = nn.ModuleList(
            nn.Linear(3 * a, b, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.out = nn.Linear(widths[-1], out_dim, bias=False)
        self.norm_out = nn.RMSNorm(out_dim, eps=1e-6)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for linear in [*self.convs, self.out]:
            _uniform(linear, generator)
        self.norm_in.weight.fill_(1.0)
        self.norm_out.weight.fill_(1.0)

    def forward(self, x: Tensor, starts_N: Tensor | None = None) -> Tensor:
        """Project x (N, stack * d).

        starts_N: True where a recording begins; None: at the first row only.
        """
        if starts_N is None:
            starts_N = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            starts_N[:1] = True
        h = x.reshape(-1, self.frame).to(self.norm_in.weight.dtype)
        h = self.norm_in(h)
        starts = torch.zeros(len(h), dtype=torch.bool, device=x.device)
        starts[:: self.stack] = starts_N
        for conv in self.convs:
            before = F.pad(h, (0, 0, 1, 0))[:-1] * ~starts[:, None]
            ends = F.pad(starts[1:], (0, 1), value=True)
            after = F.pad(h, (0, 0, 0, 1))[1:] * ~ends[:, None]
            window = torch.cat((before, h, after), dim=-1)[::2]
            h, starts = F.gelu(conv(window)), starts[::2]
        soft: Tensor = self.norm_out(self.out(h).to(self.norm_out.weight.dtype))
        return soft


_SHARE_OF_LAST = 0.8
"""Weight of the last layer at first where the projector was trained on it alone."""


class LayerMix(nn.Module):
    """Weighted sum of normalised encoder layers, (N, stack * layers * d) to (N, stack * d).

    The weights are softmax(logits) of learnt logits, and alike at first.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers, self.width = layers, width
        self.logits = nn.Parameter(torch.zeros(layers))

    @torch.no_grad()
    def begin_at_last(self) -> None:
        """Give the last layer most of the weight."""
        logits = torch.zeros(self.layers)
        logits[-1] = math.log((self.layers - 1) * _SHARE_OF_LAST / (1 - _SHARE_OF_LAST))
        set_rows(self.logits, lambda first, end: logits[first:end])

    def forward(self, x: Tensor) -> Tensor:
        stack = x.shape[1] // (self.layers * self.width)  # -1 is refused for a batch without rows.
        split = x.view(len(x), stack, self.layers, self.width).to(self.logits.dtype)
        return torch.einsum("nsld,l->nsd", split, self.logits.softmax(0)).flatten(1)


_SETTING = "model.projector"
PROJECTORS: dict[str, type[nn.Module]] = {
    "mlp": Projector,
    "swiglu": SwiGLUProjector,
    "conv": ConvProjector,
}


def make_projector(
    kind: str, stack: int, frame: int, out_dim: int, hidden_dim: int | None
) -> nn.Module:
    """Build the projector named `kind` for `stack` frames of width `frame`.

    kind: a name in `PROJECTORS`, or package.module:Class. Raises ValueError.
    """
    if kind not in PROJECTORS:
        return _plug_in(kind, stack * frame, out_dim, hidden_dim)
    extra = {"stack": stack} if kind == "conv" else {}
    return PROJECTORS[kind](stack * frame, out_dim, hidden_dim, **extra)


def check_projector(name: str, stack: int, frame: int, out_dim: int, hidden: int | None) -> None:
    """Try a plug-in on two recordings. Raises ConfigError where it has another interface."""
    projector = make_projector(name, stack, frame, out_dim, hidden)
    starts = torch.tensor([True, False, True])
    try:
        projector.init_weights(torch.Generator().manual_seed(0))  # type: ignore[operator]
        soft = projector(torch.ones(3, stack * frame), starts)
    except Exception as error:
        raise ConfigError(
            f"{_SETTING}: {name}: failed on 3 rows of width {stack * frame}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
    if not isinstance(soft, Tensor) or soft.shape != (3, out_dim):
        got = tuple(soft.shape) if isinstance(soft, Tensor) else type(soft).__name__
        raise ConfigError(
            f"{_SETTING}: {name}: expected forward(x, starts) to return (3, {out_dim}) for 3 rows, "
            f"got {got}"
        )
    if not soft.isfinite().all():
        raise ConfigError(f"{_SETTING}: {name}: its soft tokens are not finite")
    if buffers := sorted(set(projector.state_dict()) - set(dict(projector.named_parameters()))):
        # Averages over batches would also differ between ranks.
        raise ConfigError(
            f"{_SETTING}: {name}: checkpoints keep parameters alone; expected no buffers but those "
            f"registered with persistent=False, got {', '.join(buffers)}"
        )


def _plug_in(name: str, in_dim: int, out_dim: int, hidden_dim: int | None) -> nn.Module:
    if not issubclass(load_plug_in(name, _SETTING), nn.Module):
        raise ConfigError(f"{_SETTING}: {name}: expected a subclass of torch.nn.Module")
    made: nn.Module = make_plug_in(name, _SETTING, in_dim, out_dim, hidden_dim)
    check_methods(made, name, _SETTING, "init_weights", "forward")
    if next(made.parameters(), None) is None:
        raise ConfigError(f"{_SETTING}: {name}: expected parameters to train")
    return made


def _uniform(linear: nn.Linear, generator: torch.Generator | None) -> None:
    """Initialise so that unit-variance input gives unit-variance output."""
    bound = math.sqrt(3.0 / linear.in_features)
    linear.weight.uniform_(-bound, bound, generator=generator)


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype))
