"""Versions and environment variables that a job takes from the machine that submits it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from omni.storage.digest import digest
from omni.storage.uri import redact

EXPECTED = "OMNI_EXPECTED_VERSIONS"
_FORWARDED = (
    *("WHISPER_MS_ID", "WHISPER_HF_ID", "HF_ENDPOINT", "HF_HOME", "MODELSCOPE_DOMAIN"),
    # Targets of trackers, but never their keys: everyone sees them on the dashboard.
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_BASE_URL"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *("SWANLAB_PROJ_NAME", "SWANLAB_WORKSPACE", "SWANLAB_MODE"),
)
_DISTRIBUTION = "nanochat-omni"


def forwarded_variables() -> dict[str, str]:
    """Return the environment variables that workers need, without those that hold credentials."""
    given = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    return {name: text for name, text in given.items() if redact(text) == text}


def installed_versions() -> dict[str, str]:
    """Return the versions of omni's requirements by name, without local labels such as +cpu."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # omni runs from a folder of source files.
        lines = ["ray", "torch", "transformers", "numpy", "pyarrow", "safetensors", "tokenizers"]
    versions = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[requirement.name] = metadata.version(requirement.name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return versions


def expected_versions() -> str:
    """Write the versions installed here as JSON, for `differences` on the cluster."""
    return json.dumps(installed_versions())


def differences(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for each package whose version differs from where the job was submitted."""
    try:
        expected = json.loads(environment.get(EXPECTED, "{}"))
    except ValueError:
        return []
    here = installed_versions()
    return [
        f"{name} is {here.get(name, 'missing')} here and {version} where the job was submitted"
        for name, version in expected.items()
        if here.get(name) != version
    ]


def code_digest() -> str:
    """Return a digest of omni's own source files, by which nodes with other code are found."""
    root = Path(__file__).parents[1]
    paths = sorted(root.rglob("*.py"))
    return digest(*(x for p in paths for x in (str(p.relative_to(root)), p.read_bytes())), size=6)
