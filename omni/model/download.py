"""Where weights come from: ModelScope, Hugging Face, a folder, or omni's own assets.

A node downloads a model once: processes that want the same one wait for each other. What a hub
serves is compared with the hash that it names before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from omni.errors import first_line

ASSETS = Path(__file__).parents[1] / "assets"


class SourceError(RuntimeError):
    """No source could serve the weights; the message names each with its reason."""


class HubError(SourceError):
    """The hubs did not serve: not the fault of a setting, and worth another try."""


@dataclass(frozen=True)
class HubModel:
    """A model on a hub; without a revision its newest one."""

    hub: Literal["ModelScope", "Hugging Face"]
    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, hub: Literal["ModelScope", "Hugging Face"], name: str) -> HubModel:
        """ID or ID@REVISION."""
        model_id, _, revision = name.partition("@")
        return cls(hub, model_id, revision or None)

    def __str__(self) -> str:
        return f"{self.hub} {self.id}" + (f"@{self.revision}" if self.revision else "")

    def download(self, patterns: Sequence[str]) -> Path:
        """The folder with what matches; the clients resume what was interrupted.

        Without a network it is what was downloaded before.
        """
        arguments: dict[str, Any] = {"allow_patterns": list(patterns)}
        if self.revision:
            arguments["revision"] = self.revision
        if self.hub == "Hugging Face":
            from huggingface_hub import snapshot_download as hf_download

            return Path(hf_download(self.id, **arguments))
        from modelscope import snapshot_download

        try:
            return Path(snapshot_download(self.id, **arguments))
        except Exception:
            with contextlib.suppress(Exception):  # its client does not look there by itself
                held = Path(snapshot_download(self.id, local_files_only=True, **arguments))
                if any(any(held.glob(p)) for p in patterns if not p.endswith(".json")):
                    return held
            raise


def fetch(
    models: Sequence[HubModel], small: Sequence[str], weights: Sequence[Sequence[str]]
) -> Path:
    """The folder of the first model that a hub serves.

    small: patterns of the files beside the weights. weights: patterns by preference; the first that
    the repository has are fetched. Raises HubError with a line for each model.
    """
    reasons = []
    for model in models:
        try:
            with once_per_node(model):
                return _fetch_one(model, small, weights)
        except Exception as error:  # every hub client has its own family of errors
            reasons.append(f"  {model}: {type(error).__name__}: {first_line(error)}")
    raise HubError("no source served the weights:\n" + "\n".join(reasons))


def _fetch_one(model: HubModel, small: Sequence[str], weights: Sequence[Sequence[str]]) -> Path:
    for patterns in weights:
        folder = model.download([*small, *patterns])
        found = [path for pattern in patterns for path in folder.glob(pattern)]
        if any(path.suffix != ".json" for path in found):
            break
    else:
        wanted = ", ".join(pattern for patterns in weights for pattern in patterns)
        raise FileNotFoundError(f"no weights in it ({wanted})")
    if "config.json" in small and not (folder / "config.json").is_file():
        raise FileNotFoundError("the repository holds no config.json")
    for path in found:
        _check_hash(path)
    return folder


def _check_hash(path: Path) -> None:
    """Hugging Face keeps large files under their SHA-256, but does not look whether it is theirs;
    ModelScope's client does."""
    name = path.resolve().name
    if len(name) != 64 or set(name) - set("0123456789abcdef"):
        return
    mark = path.resolve().with_name(f"{name}.checked")
    if mark.is_file():
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != name:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise OSError(f"{path.name}: what was downloaded has another hash than the hub names")
    mark.touch()


def once_per_node(model: HubModel | str) -> FileLock:
    """Held by whoever downloads it to this node."""
    name = hashlib.blake2b(str(model).encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"omni-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return FileLock(folder / f"{name}.lock")
