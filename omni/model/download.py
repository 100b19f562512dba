"""Download model files from ModelScope and Hugging Face.

A node downloads a model once: processes that need the same one wait for each other. Downloaded
files are compared with the hash that the hub reports before they are used.
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
from omni.storage.digest import digest

ASSETS = Path(__file__).parents[1] / "assets"


class SourceError(RuntimeError):
    """Weights are missing, damaged or of another kind; the message names the file or source."""


class HubError(SourceError):
    """No hub served the files. The message lists each with its reason; a retry may succeed."""


@dataclass(frozen=True)
class HubModel:
    """A model on a hub; revision None is the newest."""

    hub: Literal["ModelScope", "Hugging Face"]
    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, hub: Literal["ModelScope", "Hugging Face"], name: str) -> HubModel:
        """Parse ID or ID@REVISION."""
        model_id, _, revision = name.partition("@")
        return cls(hub, model_id, revision or None)

    def __str__(self) -> str:
        return f"{self.hub} {self.id}" + (f"@{self.revision}" if self.revision else "")

    def download(self, patterns: Sequence[str]) -> Path:
        """Download the files that match and return their folder.

        The hubs' clients resume interrupted downloads. Without a network, files that were
        downloaded before are returned.
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
            # Unlike Hugging Face's client, ModelScope's does not fall back to its cache.
            with contextlib.suppress(Exception):
                cached = Path(snapshot_download(self.id, local_files_only=True, **arguments))
                if any(any(cached.glob(p)) for p in patterns if not p.endswith(".json")):
                    return cached
            raise


def fetch(
    models: Sequence[HubModel], small: Sequence[str], weights: Sequence[Sequence[str]]
) -> Path:
    """Download the first model that its hub serves and return its folder.

    small: patterns of the files beside the weights. weights: groups of patterns in order of
    preference; the first group that the repository has is fetched. Raises HubError with one line
    per model.
    """
    reasons = []
    for model in models:
        try:
            with once_per_node(model):
                return _fetch_one(model, small, weights)
        except Exception as error:  # The hubs' clients raise errors of many unrelated classes.
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
        raise FileNotFoundError(f"the repository has no weights ({wanted})")
    if "config.json" in small and not (folder / "config.json").is_file():
        raise FileNotFoundError("the repository has no config.json")
    for path in found:
        _check_hash(path)
    return folder


def _check_hash(path: Path) -> None:
    """Compare a large file from Hugging Face with its SHA-256, once. Raises OSError.

    Its client names large files by their SHA-256 but does not verify it; ModelScope's does.
    """
    name = path.resolve().name
    if len(name) != 64 or set(name) - set("0123456789abcdef"):
        return
    mark = path.resolve().with_name(f"{name}.checked")
    if mark.is_file():
        return
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    if state.hexdigest() != name:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise OSError(f"{path.name}: the downloaded file has another hash than the hub reports")
    mark.touch()


def once_per_node(model: HubModel | str) -> FileLock:
    """Return the lock that a process of this node holds while it downloads a model."""
    name = digest(str(model), size=8)
    folder = Path(tempfile.gettempdir()) / f"omni-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return FileLock(folder / f"{name}.lock")
