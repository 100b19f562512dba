"""Read the encoder from a Whisper folder of CTranslate2, the format of faster-whisper.

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
_HEAD_WIDTH = 64  # in all sizes of Whisper


def read_ct2_encoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read configuration and tensors of the encoder under transformers' names, in fp16 or fp32.

    Integer weights are dequantized. Raises ValueError for other files.
    """
    with (folder / "model.bin").open("rb") as file:
        try:
            arrays = _read_arrays(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (struct.error, UnicodeDecodeError, IndexError):
            raise ValueError("model.bin: truncated, or not a file of CTranslate2") from None
    try:
        state = _rename(arrays)
    except KeyError as error:
        raise ValueError(f"model.bin: no {error.args[0]}; expected a Whisper model") from None
    width, n_mels, _ = state["conv1.weight"].shape
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in state)
    return {
        "model_type": "whisper",
        "d_model": width,
        "num_mel_bins": n_mels,
        "encoder_attention_heads": width // _HEAD_WIDTH,
        "encoder_ffn_dim": len(state["layers.0.fc1.weight"]),
        "encoder_layers": layers,
        "max_source_positions": len(state["embed_positions.weight"]),
    }, state


def _read_arrays(data: mmap.mmap) -> dict[str, Tensor]:
    """Read the named arrays of the encoder."""
    offset = 0

    def number(form: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + form, data, offset)
        offset += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal offset
        size = number("H")
        value = data[offset : offset + size - 1].decode()
        offset += size
        return value

    version = number("I")
    if version not in _VERSIONS:
        raise ValueError(f"model.bin: version {version}: expected one of {_VERSIONS}")
    kind, _ = text(), number("I")
    if not kind.startswith("WhisperSpec"):
        raise ValueError(f"model.bin: {kind}: expected a WhisperSpec")
    found: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _TYPES[number("B")]
        size = number("I")
        if name.startswith("encoder/"):
            if size != math.prod(shape) * dtype.itemsize or offset + size > len(data):
                raise ValueError(f"model.bin: {name}: truncated")
            flat = torch.frombuffer(bytearray(data[offset : offset + size]), dtype=dtype)
            found[name.removeprefix("encoder/")] = flat.view(shape)
        offset += size
    return found


def _rename(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename arrays to transformers' names and split joined projections."""
    state = {"embed_positions.weight": arrays["position_encodings/encodings"]}
    for conv in ("conv1", "conv2"):
        state[f"{conv}.weight"] = _weight(arrays, conv)
        state[f"{conv}.bias"] = arrays[f"{conv}/bias"]

    def norm(source: str, target: str) -> None:
        state[f"{target}.weight"] = arrays[f"{source}/gamma"]
        state[f"{target}.bias"] = arrays[f"{source}/beta"]

    def linear(source: str, target: str) -> None:
        state[f"{target}.weight"] = _weight(arrays, source)
        state[f"{target}.bias"] = arrays[f"{source}/bias"]

    norm("layer_norm", "layer_norm")
    layer = 0
    while layer == 0 or f"layer_{layer}/ffn/linear_0/weight" in arrays:
        source, target = f"layer_{layer}", f"layers.{layer}"
        norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
        joined = f"{source}/self_attention/linear_0"
        weights = _weight(arrays, joined).chunk(3)
        biases = arrays[f"{joined}/bias"].chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            state[f"{target}.self_attn.{name}.weight"] = weight
            if name != "k_proj":  # Whisper's keys have no bias; CTranslate2 stores zeros.
                state[f"{target}.self_attn.{name}.bias"] = bias
        linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
        norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        linear(f"{source}/ffn/linear_0", f"{target}.fc1")
        linear(f"{source}/ffn/linear_1", f"{target}.fc2")
        layer += 1
    return state


def _weight(arrays: dict[str, Tensor], name: str) -> Tensor:
    """Return a weight, dequantized by its scale if it is an integer."""
    weight = arrays[f"{name}/weight"]
    if weight.dtype not in (torch.int8, torch.int16):
        return weight
    scale = arrays[f"{name}/weight_scale"].float()
    return weight.float() / scale.view(-1, *[1] * (weight.ndim - 1))
