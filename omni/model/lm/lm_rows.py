"""Read the weights of a published language model by rows, so that a rank reads only its shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni.model.download import SourceError
from omni.model.lm.hf import HFLanguageModel
from omni.model.lm.lora import is_adapter

_FLOATS = ("F32", "BF16", "F16")
_BASE_LAYER = ".base_layer."  # peft's name for the layer that an adapter wraps


class NotByRows(Exception):
    """transformers makes the model's weights from those of its files; the message says why."""


@dataclass(frozen=True)
class LMRows:
    """Weights of a language model by the names of its parameters, in the dtype of its files."""

    read: Callable[[str, int, int], Tensor]
    """Return rows of a tensor by its name, first row and end."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LMRows:
        return cls(lambda name, first, end: tensors[plain_name(name)][first:end])


@dataclass(frozen=True)
class _Stored:
    """A tensor of a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def plain_name(name: str) -> str:
    """Return the name that a parameter has without adapters."""
    return name.replace(_BASE_LAYER, ".")


def open_hf(folder: Path, lm: HFLanguageModel) -> LMRows:
    """Open the safetensors files of a transformers model.

    Raises NotByRows unless each parameter of `lm` is a tensor of the files, with its name and
    shape, and no other weight is there: transformers may rename, merge or dequantize the others.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise NotByRows("it is a GGUF file")
    if json.loads(config.read_bytes()).get("quantization_config"):
        raise NotByRows("its weights are quantized")
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if any(getattr(lm.model, name, None) for name in kept):
        raise NotByRows("transformers keeps some of its modules in fp32")
    try:
        stored: dict[str, _Stored] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    stored[name] = _Stored(path, tuple(part.get_shape()), part.get_dtype())
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{folder}: cannot be loaded: {error}") from None
    names = _names_in_files(lm, stored)

    def read(name: str, first: int, end: int) -> Tensor:
        found = names[plain_name(name)]
        # A file that stays open would keep what was read of it in memory.
        with safe_open(stored[found].path, framework="pt") as file:
            rows: Tensor = file.get_slice(found)[first:end]
            return rows

    return LMRows(read)


def _names_in_files(lm: HFLanguageModel, stored: Mapping[str, _Stored]) -> dict[str, str]:
    """Return the names in the files by parameter. Raises NotByRows."""
    if not stored:
        raise NotByRows("it has no safetensors files")
    names = {}
    prefix = f"{lm.model.base_model_prefix}."
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            continue
        own = plain_name(name).removeprefix("model.")
        found = next((n for n in (own, own.removeprefix(prefix)) if n in stored), None)
        if found is None:
            raise NotByRows(f"its files have no {own}")
        part = stored[found]
        if part.shape != tuple(parameter.shape) or part.dtype not in _FLOATS:
            raise NotByRows(f"{found} is {part.dtype} {part.shape} in its files")
        names[plain_name(name)] = found
    tied = "lm_head.weight"  # Some files hold a head beside the embeddings that it is tied to.
    unused = {n for n in stored if "weight" in n} - {*names.values(), tied}
    if unused:
        raise NotByRows(f"its files have {min(unused)}, which is not a parameter")
    return names
