"""The encoder in a Whisper folder of CTranslate2, as faster-whisper keeps them on disk.

model.bin is a list of named arrays (ctranslate2/specs/model_spec.py, binary version 6). A string is
a 16-bit length, which counts a final zero, and bytes; an array is its name, 8-bit rank, 32-bit
sizes, an 8-bit type, a 32-bit number of bytes, and the bytes. Little-endian throughout.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_VERSIONS = (5, 6)
_TYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]
_HEAD = 64  # every Whisper has heads of this width


def read_ct2_encoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The encoder's configuration and tensors under transformers' names, fp16 or fp32.

    Weights in int8 are multiplied out with their scales. Raises ValueError for other files.
    """
    with (folder / "model.bin").open("rb") as file:
        try:
            held = _arrays(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (struct.error, UnicodeDecodeError, IndexError):
            raise ValueError("model.bin ends early, or is not CTranslate2's") from None
    try:
        state = _renamed(held)
    except KeyError as error:
        raise ValueError(f"model.bin has no {error.args[0]}: not a Whisper model") from None
    width, n_mels, _ = state["conv1.weight"].shape
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in state)
    return {
        "model_type": "whisper",
        "d_model": width,
        "num_mel_bins": n_mels,
        "encoder_attention_heads": width // _HEAD,
        "encoder_ffn_dim": len(state["layers.0.fc1.weight"]),
        "encoder_layers": layers,
        "max_source_positions": len(state["embed_positions.weight"]),
    }, state


def _arrays(data: mmap.mmap) -> dict[str, Tensor]:
    """All arrays of the encoder."""
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal at
        size = number("H")
        value = data[at : at + size - 1].decode()
        at += size
        return value

    version = number("I")
    if version not in _VERSIONS:
        raise ValueError(f"model.bin is of version {version}, expected one of {_VERSIONS}")
    kind, _ = text(), number("I")
    if not kind.startswith("WhisperSpec"):
        raise ValueError(f"model.bin holds a {kind}, expected a WhisperSpec")
    found: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _TYPES[number("B")]
        size = number("I")
        if name.startswith("encoder/"):
            if size != math.prod(shape) * dtype.itemsize or at + size > len(data):
                raise ValueError(f"model.bin: {name} is cut short")
            flat = torch.frombuffer(bytearray(data[at : at + size]), dtype=dtype)
            found[name.removeprefix("encoder/")] = flat.view(shape)
        at += size
    return found


def _renamed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"embed_positions.weight": held["position_encodings/encodings"]}
    for conv in ("conv1", "conv2"):
        state[f"{conv}.weight"] = _weight(held, conv)
        state[f"{conv}.bias"] = held[f"{conv}/bias"]

    def norm(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"] = held[f"{theirs}/gamma"]
        state[f"{ours}.bias"] = held[f"{theirs}/beta"]

    def linear(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"] = _weight(held, theirs)
        state[f"{ours}.bias"] = held[f"{theirs}/bias"]

    norm("layer_norm", "layer_norm")
    layer = 0
    while layer == 0 or f"layer_{layer}/ffn/linear_0/weight" in held:
        theirs, ours = f"layer_{layer}", f"layers.{layer}"
        norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        joined = f"{theirs}/self_attention/linear_0"
        weights = _weight(held, joined).chunk(3)
        biases = held[f"{joined}/bias"].chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            state[f"{ours}.self_attn.{name}.weight"] = weight
            if name != "k_proj":  # Whisper has none; theirs is zero
                state[f"{ours}.self_attn.{name}.bias"] = bias
        linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        layer += 1
    return state


def _weight(held: dict[str, Tensor], name: str) -> Tensor:
    weight = held[f"{name}/weight"]
    if weight.dtype not in (torch.int8, torch.int16):
        return weight
    scale = held[f"{name}/weight_scale"].float()
    return weight.float() / scale.view(-1, *[1] * (weight.ndim - 1))
