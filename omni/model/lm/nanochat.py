"""Read and write nanochat's checkpoints: model_NNNNNN.pt, meta_NNNNNN.json, tokenizer.pkl."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.model.download import SourceError
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.tokenizer import SpeechTokenizer

_COMPILED = "_orig_mod."  # prefix of the parameter names of a module compiled by torch.compile


def load_nanochat(
    folder: str | Path, step: int | None = None, device: str | torch.device = "cpu"
) -> GPT:
    """Load the language model of a nanochat checkpoint, in fp32 and eval mode.

    step: None takes the largest. Residual scalars that older checkpoints lack get values without
    effect. Raises SourceError naming the file and what was expected.
    """
    state = {name: tensor.float() for name, tensor in open_nanochat(folder, step).items()}
    with torch.device("meta"):
        model = GPT(find_nanochat(folder, step)[0])
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    return model.to(device).eval()


def open_nanochat(folder: str | Path, step: int | None = None) -> dict[str, Tensor]:
    """Map the tensors of a checkpoint into memory as they are stored; see `load_nanochat`."""
    config, path = find_nanochat(folder, step)
    state = {name.removeprefix(_COMPILED): tensor for name, tensor in _read_state(path).items()}
    state.setdefault("resid_lambdas", torch.ones(config.n_layer))
    state.setdefault("x0_lambdas", torch.zeros(config.n_layer))
    with torch.device("meta"):
        model = GPT(config)
    _check_shapes(path, state, {name: tuple(p.shape) for name, p in model.named_parameters()})
    return state


def find_nanochat(folder: str | Path, step: int | None = None) -> tuple[GPTConfig, Path]:
    """Return the shape and the weights file of a checkpoint. Raises SourceError."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder; expected a nanochat checkpoint folder")
    steps = sorted(
        int(match[1])
        for path in folder.glob("model_*.pt")
        if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    )
    if not steps:
        raise SourceError(f"{folder}: expected nanochat's model_NNNNNN.pt files, found none")
    if step is not None and step not in steps:
        raise SourceError(f"{folder}: no step {step}; expected one of {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    return _read_config(folder / f"meta_{chosen:06d}.json"), folder / f"model_{chosen:06d}.pt"


def find_tokenizer(folder: str | Path) -> Path:
    """Find tokenizer.pkl in a checkpoint folder or in nanochat's tokenizer/ above it.

    Raises SourceError.
    """
    folder = Path(folder).expanduser().absolute()
    above = [parent / "tokenizer" for parent in list(folder.parents)[:2]]
    for candidate in (folder, folder / "tokenizer", *above):
        if (candidate / "tokenizer.pkl").is_file():
            return candidate / "tokenizer.pkl"
    raise SourceError(
        f"{folder}: no tokenizer.pkl in it or in a folder tokenizer/ beside or above it; "
        "set tokenizer.path"
    )


def save_nanochat(
    model: GPT, folder: str | Path, step: int, tokenizer: SpeechTokenizer | None = None
) -> Path:
    """Write `model` (and tokenizer.pkl) as a nanochat checkpoint; returns the weights file.

    tokenizer.pkl contains an `Encoding` of the package tiktoken, which must be installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model_{step:06d}.pt"
    torch.save({n: t.detach().float().cpu().clone() for n, t in model.state_dict().items()}, path)
    meta = {"step": step, "model_config": asdict(model.config)}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))
    if tokenizer is not None:
        with (folder / "tokenizer.pkl").open("wb") as file:
            pickle.dump(tokenizer.to_tiktoken(), file)
    return path


def _read_config(path: Path) -> GPTConfig:
    try:
        found = json.loads(path.read_text())["model_config"]
        given: dict[str, Any] = {"window_pattern": "L", **found}
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{path}: expected JSON with model_config") from None
    known = {field.name: field.type for field in fields(GPTConfig)}
    if unknown := sorted(given.keys() - known.keys()):
        raise SourceError(f"{path}: model_config.{unknown[0]}: unknown field")
    if missing := sorted(known.keys() - given.keys()):
        raise SourceError(f"{path}: model_config.{missing[0]}: missing field")
    for name, value in given.items():
        expected = str if known[name] == "str" else int
        if type(value) is not expected:
            raise SourceError(
                f"{path}: model_config.{name}: expected {expected.__name__}, got {value!r}"
            )
    try:
        return GPTConfig(**given)
    except ValueError as error:
        raise SourceError(f"{path}: model_config: {error}") from None


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"{path}: expected only tensors, refused to load: {reason}") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise SourceError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise SourceError(f"{path}: expected a dictionary of tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise SourceError(f"{path}: {name!r}: expected a tensor")
    return state


def _check_shapes(
    path: Path, state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "missing"
        wanted = expected.get(name, "no such tensor")
        if found != wanted:
            raise SourceError(
                f"{path}: {name}: expected {wanted} by model_config of its meta file, found {found}"
            )
