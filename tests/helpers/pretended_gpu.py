"""A GPU that is not there: tensors that say they are on `cuda`, and hold CPU data.

What only a GPU would show fails on any machine: an operation with operands of two devices raises
`MixedDevices`, and what makes the host wait for the device is counted. To autograd and to kernels
the tensors are CPU tensors; to Python, which decides what runs where, they are on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from omni.model import packed_attention, precision

GPU = torch.device("cuda")
_AT = torch.device("cuda", 0)
_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default: "item",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "masked_select",
    _aten.equal.default: "equal",
    _aten._unique2.default: "unique",
    _aten.unique_consecutive.default: "unique",
    _aten.unique_dim.default: "unique",
    _aten.bincount.default: "bincount",
    _aten.repeat_interleave.Tensor: "repeat_interleave",
    _aten._ctc_loss.Tensor: "lengths of ctc_loss",
}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}


class MixedDevices(RuntimeError):
    """An operation has operands on the GPU and on the host."""


class GpuTensor(Tensor):
    """A tensor that Python finds on `cuda`; `inner` holds its data."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        made: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _AT

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return 0

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"GpuTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, on_gpu=True)


class Gpu(TorchFunctionMode):
    """Context of the pretended GPU. waits: what made the host wait, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0
        self._frames: list[bool] = []
        self._dispatch = _Factories(self)

    def __enter__(self) -> Gpu:
        global _active
        _active = self
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(patch.object(torch, "autocast", _autocast))
        self._patches.enter_context(
            patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
        )
        # Views of weights in inference mode would be refused for a subclass.
        for name, method in (("__enter__", _enter), ("__exit__", _exit)):
            self._patches.enter_context(patch.object(torch.inference_mode, name, method))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            real = getattr(torch, name)
            kernels = functools.partial(_of_kernels, real)
            self._patches.enter_context(patch.object(torch, name, kernels))
        self._patches.enter_context(
            patch.object(packed_attention, "_flex_kernel", lambda device: attention)
        )
        self._patches.enter_context(patch.object(precision, "has_bf16", lambda device: True))
        # On a GPU, fused kernels over lists of tensors are taken.
        known = [*_foreach_utils._foreach_supported_types, GpuTensor]
        self._patches.enter_context(patch.object(_foreach_utils, "_foreach_supported_types", known))
        # `Module.to` would put the data of the moved parameters into the old ones.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        self._dispatch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global _active
        super().__exit__(*error)
        self._dispatch.__exit__(*error)
        self._patches.close()
        _active = None

    @staticmethod
    def here() -> Gpu:
        """The one that is entered."""
        assert _active is not None
        return _active

    @property
    def allocates_on_gpu(self) -> bool:
        """Tell whether the innermost call of Python's has operands on the GPU."""
        return bool(self._frames) and self._frames[-1]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Enter the mode where torch has left it."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    @contextlib.contextmanager
    def frame(self, on_gpu: bool) -> Iterator[None]:
        self._frames.append(on_gpu)
        try:
            yield
        finally:
            self._frames.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "_parse_to":
            return func(*args, **kwargs)
        if func is Tensor.backward:
            # Recomputation in the backward pass runs Python that has to find the GPU too.
            with self.frame(True), self.again():
                return torch.autograd.backward(args[0], kwargs.get("gradient"))
        if name in ("to", "cpu", "cuda", "pin_memory") and args and isinstance(args[0], Tensor):
            return self._move(name, func, args, kwargs)
        held = [x for x in tree_leaves((args, kwargs)) if isinstance(x, GpuTensor)]
        if name in ("numpy", "__array__") and held:
            raise MixedDevices("numpy cannot read a GPU")
        if name == "tolist" and held:
            self.waits["tolist"] += 1
            return args[0].inner.tolist()
        given = kwargs.get("device")
        on_gpu = bool(held) if given is None else torch.device(given).type == "cuda"
        if given is not None:
            kwargs["device"] = "cpu"
        with self.frame(on_gpu):
            out = func(*args, **kwargs)
        if name in ("tensor", "new_tensor", "as_tensor", "from_numpy", "asarray") and on_gpu:
            self.waits[name] += 1  # a copy of memory that is not pinned
            out = _wrap(out)
        return out

    def _move(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        if name == "pin_memory":
            if isinstance(tensor, GpuTensor):
                raise MixedDevices("pin_memory of a tensor on the GPU")
            pinned = tensor.detach()
            pinned.is_pinned_copy = True
            return pinned
        if name == "to":
            if rest and isinstance(rest[0], Tensor):
                other = rest.pop(0)
                rest = [other.device, other.dtype, *rest]
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **_plain(kwargs))  # type: ignore[attr-defined]
        else:
            device, dtype, non_blocking = torch.device(name), None, kwargs.get("non_blocking")
        here = isinstance(tensor, GpuTensor)
        there = here if device is None else device.type == "cuda"
        if here and not there:
            self.waits["copy to the host"] += 1
        if there and not here and not (non_blocking and hasattr(tensor, "is_pinned_copy")):
            self.waits["copy from the host"] += 1
        if here != there:
            tensor = _Copy.apply(tensor, there)
        if dtype is None and not kwargs.get("copy"):
            return tensor
        with self.frame(there):
            return Tensor.to(tensor, dtype or tensor.dtype, copy=bool(kwargs.get("copy")))


class _Factories(TorchDispatchMode):
    """See operations without operands, which C++ code starts for tensors of the GPU."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, on_gpu=self._gpu.allocates_on_gpu)


class _Copy(torch.autograd.Function):
    """A copy between host and GPU; its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return _wrap(tensor.detach().clone()) if to_gpu else _unwrap(tensor).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (_unwrap(gradient) if ctx.to_gpu else _wrap(gradient)), None


_active: Gpu | None = None
_real_autocast = torch.autocast
_real_grouped = torch._C._group_tensors_by_device_and_dtype


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """Autocast of the kernels that really run, those of the CPU."""
    return _real_autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _enter(mode: Any) -> None:
    mode.instead = torch.set_grad_enabled(not mode.mode and torch.is_grad_enabled())
    mode.instead.__enter__()


def _exit(mode: Any, *error: Any) -> None:
    mode.instead.__exit__(*error)


def _of_kernels(real: Any, device_type: str = "cpu") -> Any:
    return real("cpu" if device_type == "cuda" else device_type)


def attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, block_mask: Any, enable_gqa: bool
) -> Tensor:
    """What `flex_attention` computes, by the block mask's own function over all positions.

    The kernel itself is compiled for a GPU; here its operands are checked.
    """
    from torch.nn.attention.flex_attention import create_mask

    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        if not isinstance(found := getattr(block_mask, name), GpuTensor):
            raise MixedDevices(f"flex_attention: {name} of the block mask is {type(found)}")
    rows, length = len(q_BHTD), q_BHTD.shape[2]
    assert _active is not None
    # In the backward pass, recomputation finds no modes.
    modes = torch._C._len_torch_function_stack()
    with contextlib.nullcontext() if modes else _active.again():
        visible = create_mask(block_mask.mask_mod, rows, None, length, length, device=q_BHTD.device)
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHTD, k_BGTD, v_BGTD, attn_mask=visible, enable_gqa=enable_gqa
    )


def _grouped(tensors: list[list[Tensor | None]], *rest: Any) -> dict[Any, Any]:
    """Group lists of tensors as torch does, with the device that Python finds them on."""
    groups = _real_grouped(tensors, *rest)
    return {
        (_AT if isinstance(found[0][0][0], GpuTensor) else device, dtype): found
        for (device, dtype), found in groups.items()
    }


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "copy"}


def _wrap(value: Any) -> Any:
    return GpuTensor(value) if type(value) is Tensor else value


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any], on_gpu: bool) -> Any:
    """Run an operation on the data, and put its results on the device of its operands."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    held = [x for x in operands if isinstance(x, GpuTensor)]
    gpu = _active
    if held:
        _check(func, operands, args)
        if gpu is not None:
            gpu.operations += 1
            name = _WAITS.get(func)
            if func in _INDEXING and any(
                x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
            ):
                name = "index by a mask"
            if name is not None:
                gpu.waits[name] += 1
    elif operands or not on_gpu:
        return func(*args, **kwargs)
    out = tree_map(_wrap, func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs)))
    if isinstance(func, torch._ops.OpOverload) and held:
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def _check(func: Any, operands: list[Tensor], args: Any) -> None:
    """Raise MixedDevices; numbers of no dimension may come from the host, and copies may cross."""
    others = [x for x in operands if not isinstance(x, GpuTensor)]
    written = args and isinstance(args[0], Tensor) and not isinstance(args[0], GpuTensor)
    if func is _aten.copy_.default:
        if others and _active is not None:
            _active.waits["copy_ across"] += 1
        return
    if any(x.dim() for x in others) or (others and written and str(func).endswith("_.Tensor")):
        shapes = (f"{x.device.type} {tuple(x.shape)}" for x in operands)
        raise MixedDevices(f"{func}: {', '.join(shapes)}")
