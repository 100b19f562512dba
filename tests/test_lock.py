"""The file of exact versions that production nodes install, beside the ranges of pyproject.toml."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "configs" / "locks" / "linux-x86_64.txt"
EXTRAS = ("s3", "av")
"""Extras of `make lock`."""


def locked() -> dict[str, Requirement]:
    """Read the packages, and make sure that each has a hash."""
    found = {}
    for entry in LOCK.read_text().replace("\\\n", " ").splitlines():
        if entry.startswith("#"):
            continue
        assert re.search(r" --hash=sha256:[0-9a-f]{64}", entry), entry
        requirement = Requirement(entry.partition(" --hash")[0])
        assert [clause.operator for clause in requirement.specifier] == ["=="], entry
        found[canonicalize_name(requirement.name)] = requirement
    return found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_lock_has_what_pyproject_asks_for() -> None:
    """Where this fails: make lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    asked = project["dependencies"] + [line for extra in EXTRAS for line in optional[extra]]
    pins = locked()
    for requirement in map(Requirement, asked):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, requirement
        [clause] = pin.specifier
        assert requirement.specifier.contains(clause.version), f"{requirement}: {pin}"
    assert not {"pytest", "ruff", "mypy"} & pins.keys(), "production nodes need no tools"


def test_the_lock_agrees_with_the_versions_that_are_tested() -> None:
    pins = locked()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        tested = Requirement(line)
        pin = pins.get(canonicalize_name(tested.name))
        assert pin is None or pin.specifier == tested.specifier, f"{tested}: {pin}"


def test_cuda_wheels_are_locked_too() -> None:
    assert {"nvidia-nccl-cu13", "triton"} <= locked().keys()
