"""Floors of the house: imports point downwards, and Ray stays in two rooms."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import omni

PACKAGE = Path(omni.__file__).parent
WITH_RAY = {
    "omni.data.stream",
    "omni.train.attempts",
    "omni.train.auto",
    "omni.train.cluster",
    "omni.train.preflight",
    "omni.train.publish",
    "omni.train.trainer",
    "omni.train.trial",
    "omni.encode",
    "omni.index",
    "omni.submit",
    "omni.bench.stream",
}


def _module(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def _imports(module: str, source: str) -> Iterator[str]:
    """Every module that a source imports anywhere, inside functions too, with its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


SOURCES = {_module(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_imports_of_every_kind_are_seen() -> None:
    source = "import a.b as c\ndef f():\n    from ..data import plan\nfrom . import loop"
    assert set(_imports("omni.train.trainer", source)) == {
        "a.b",
        "omni.data",
        "omni.data.plan",
        "omni.train",
        "omni.train.loop",
    }
    assert "omni.data.plan" in set(_imports("omni.data.stream", SOURCES["omni.data.stream"]))


@pytest.mark.parametrize(
    "floor, above",
    [
        ("omni.config", ["omni.model", "omni.data", "omni.train", "omni.bench", "jobs"]),
        ("omni.model", ["omni.data", "omni.train", "omni.bench", "jobs"]),
        ("omni.data", ["omni.train", "omni.bench", "jobs"]),
        ("omni.train", ["omni.bench", "jobs"]),
        ("omni", ["jobs"]),
    ],
)
def test_imports_point_downwards(floor: str, above: list[str]) -> None:
    modules = [module for module in SOURCES if _within(module, floor)]
    assert modules
    upwards = [
        f"{module} imports {name}"
        for module in modules
        for name in _imports(module, SOURCES[module])
        if any(_within(name, package) for package in above)
    ]
    assert upwards == []


def test_ray_is_imported_where_it_belongs() -> None:
    found = {
        module
        for module, source in SOURCES.items()
        if any(_within(name, "ray") for name in _imports(module, source))
    }
    assert found == WITH_RAY


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_everything_else_works_where_ray_is_not_installed() -> None:
    modules = [name for name in SOURCES if name not in WITH_RAY]
    assert {"omni.model.omni", "omni.data.plan", "omni.train.loop", "omni.evaluate"} <= set(modules)
    done = _python(f"import sys; sys.modules['ray'] = None; import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(WITH_RAY))
def test_the_ban_on_ray_would_be_noticed(module: str) -> None:
    done = _python(f"import sys; sys.modules['ray'] = None; import {module}")
    assert done.returncode == 1
    assert "import of ray halted" in done.stderr or "'ray' is not a package" in done.stderr
