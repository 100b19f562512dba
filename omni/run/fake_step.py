"""Count the storages of a training step on torch's fake tensors, which have shapes and no data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Documented under "Fake tensor" and "Extending PyTorch"; torch exports them nowhere else.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omni.model.batch import Batch, CTCLabels
from omni.model.packed_attention import SegmentLayout, block_mask

Device = Literal["cpu", "cuda"]

_aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that are alive, by kind, and remember the largest sum.

    kinds: bytes by kind now. peak: the same when their sum was largest. Storages that operators
    allocate are `activations` until they are marked as another kind.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._largest = 0
        self._held: dict[int, tuple[weakref.ref[Any], str | None]] = {}

    def mark(self, kind: str | None, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors as `kind` from now on; None: count them no more."""
        for tensor in tensors:
            key = self._add(tensor)
            reference, before = self._held[key]
            size = tensor.untyped_storage().nbytes()
            self._held[key] = (reference, kind)
            self._change(before, -size)
            self._change(kind, size)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self._largest = Counter(self.kinds), self._total

    def _add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key, size = int(storage._cdata), storage.nbytes()
        if key not in self._held:

            def freed(_: Any) -> None:
                self._change(self._held.pop(key)[1], -size)

            self._held[key] = (weakref.ref(storage, freed), "activations")
            self._change("activations", size)
            if self._total > self._largest:
                self._largest, self.peak = self._total, Counter(self.kinds)
        return key

    def _change(self, kind: str | None, size: int) -> None:
        if kind is not None:
            self.kinds[kind] += size
            self._total += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._ctc_loss.default:
            out: Any = _ctc_shapes(*args)
        elif func is _aten._ctc_loss_backward.default:
            out = torch.empty_like(args[1])
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out


def _ctc_shapes(
    log_probs_TUK: Tensor, targets: Tensor, lengths: Any, target_lengths: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return the loss and the forward variables of CTC, for which fake tensors have no rule."""
    frames, recordings = log_probs_TUK.shape[:2]
    states = 2 * max(target_lengths, default=0) + 1
    losses = log_probs_TUK.new_empty(recordings)
    return losses, log_probs_TUK.new_empty(recordings, frames, states)


def fake_parameters(model: nn.Module, dtype_of: Callable[[str, Tensor], torch.dtype]) -> None:
    """Replace the parameters and buffers of a model on `meta` by fake ones, tied ones by one.

    dtype_of: number format of a tensor, by its name. Called inside a FakeTensorMode.
    """
    made: dict[int, Tensor] = {}
    replaced = []  # They are kept, so that no other tensor gets their id.
    for prefix, module in model.named_modules():
        own = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**own), *module.named_buffers(**own)]:
            if id(tensor) not in made:
                dtype = dtype_of(f"{prefix}.{name}" if prefix else name, tensor)
                fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = (
                    nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                )
                replaced.append(tensor)
            setattr(module, name, made[id(tensor)])


@dataclass(frozen=True)
class FakeBatch(Batch):
    """A batch without data, whose rows were laid out while it had them."""

    rows: SegmentLayout = field(kw_only=True)

    def layout(self) -> SegmentLayout:
        return self.rows


def fake_batch(batch: Batch, mode: FakeTensorMode, device: Device) -> FakeBatch:
    """Make a fake batch of a real one. device: that of the run, whose attention is laid out."""
    if device == "cuda":
        steps = torch.zeros_like(batch.segments_BT)
        rows: SegmentLayout = FusedLayout(steps, steps > 0, segments_BT=batch.segments_BT)
    else:
        rows = SegmentLayout.packed(batch.segments_BT, kernel="groups")
    teacher = None if batch.teacher is None else fake_batch(batch.teacher, mode, device)
    values = {f.name: _fake(getattr(batch, f.name), mode) for f in fields(batch)}
    return FakeBatch(**(values | {"teacher": teacher}), rows=_fake(rows, mode))


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list):
        return [_fake(item, mode) for item in value]
    if isinstance(value, CTCLabels | SegmentLayout):
        return replace(
            value, **{f.name: _fake(getattr(value, f.name), mode) for f in fields(value)}
        )
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors of a batch, of its labels and of its teacher."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Batch | CTCLabels):
        return [tensor for f in fields(value) for tensor in tensors_of(getattr(value, f.name))]
    return []


@dataclass(frozen=True)
class FusedLayout(SegmentLayout):
    """Rows for a fused attention kernel, which keeps inputs, output and one sum per position."""

    def attend(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        assert self.segments_BT is not None
        if window not in self.masks:
            self.masks[window] = block_mask(self.segments_BT, window)
        out: Tensor = _FusedAttention.apply(q_BTHD, k_BTGD, v_BTGD)  # type: ignore[no-untyped-call]
        return out


class _FusedAttention(torch.autograd.Function):
    """Shapes of what `flex_attention` keeps and allocates as a compiled kernel."""

    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        out = torch.empty_like(q_BTHD)
        sums = q_BTHD.new_empty(q_BTHD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q_BTHD, k_BTGD, v_BTGD, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BTHD: Tensor) -> Any:
        q, k, v, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
