"""Copy what a job needs of a folder, before Ray uploads it to the cluster.

Ray's own packaging follows links out of the folder and in circles, uploads .git and what
.git/info/exclude ignores, and checks the size only of the finished archive.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni.errors import ConfigError

_NEVER = {
    ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache",
    ".ruff_cache", ".pytest_cache", ".hypothesis", ".tox", ".idea", ".vscode", ".DS_Store",
}  # fmt: skip
_SECRETS = (".env", ".env.*", "*.pem", "*.key", ".netrc")
_CODE = ("omni", "jobs")
_MOST_COUNTED = 20_000  # files; the size of a larger folder is given as "over"


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not uploaded; path: relative to the working directory.

    size: bytes. at_least: the folder holds more, and counting all of it would take long.
    """

    path: str
    reason: str
    size: int
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.path} ({'over ' * self.at_least}{readable(self.size)}, {self.reason})"


@dataclass(frozen=True)
class Packed:
    """Number of files and bytes that were copied into `folder`, and what was left out."""

    folder: Path
    files: int
    size: int
    left_out: list[LeftOut]


def pack(source: Path, into: Path, exclude: Sequence[str] = (), limit: int = 200 << 20) -> Packed:
    """Copy what a job needs of `source` into the empty folder `into`.

    Leaves out version control and caches, run directories, what git ignores, files that look like
    secrets, links that lead outside, and paths or names that match a pattern of `exclude`. Adds
    omni's own code where `source` does not hold it, so that the cluster runs this version.

    Raises ConfigError for more than `limit` bytes.
    """
    source = source.resolve()
    ignored = _ignored_by_git(source)
    left_out: list[LeftOut] = []
    chosen: list[tuple[Path, int]] = []
    for folder, names, files in os.walk(source):
        here = Path(folder)
        for name in sorted(names):
            path = here / name
            reason = _reason_not(path, source, exclude, ignored)
            if reason is not None:
                names.remove(name)
                left_out.append(LeftOut(str(path.relative_to(source)), reason, *_size(path)))
        for name in sorted(files):
            path = here / name
            reason = _reason_not(path, source, exclude, ignored)
            if reason is None:
                chosen.append((path.relative_to(source), path.stat().st_size))
            elif reason != "cache":
                left_out.append(LeftOut(str(path.relative_to(source)), reason, *_size(path)))
    pairs = [(source / path, path, size) for path, size in chosen]
    for package in _CODE:
        if not (source / package / "__init__.py").is_file():
            pairs += _package(package)
    _check_size([(str(path), size) for _, path, size in pairs], limit)
    for original, path, _ in pairs:
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(original, into / path)
    left_out.sort(key=lambda item: -item.size)
    return Packed(into, len(pairs), sum(size for *_, size in pairs), left_out)


def readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _reason_not(path: Path, source: Path, exclude: Sequence[str], ignored: set[Path]) -> str | None:
    """Return the reason to leave out a path; None to upload it."""
    name, relative = path.name, str(path.relative_to(source))
    if name in _NEVER or name.endswith((".pyc", ".egg-info")):
        return "cache" if name.endswith(".pyc") else "version control, environment or cache"
    if any(fnmatch.fnmatch(name, pattern) for pattern in _SECRETS):
        return "may hold secrets: everyone on the cluster could read it"
    if any(fnmatch.fnmatch(relative, p) or fnmatch.fnmatch(name, p) for p in exclude):
        return "--exclude"
    if path in ignored:
        return "ignored by git"
    if (path / "checkpoints").is_dir() and (path / "config.yaml").is_file():
        return "a run directory"
    if path.is_symlink():
        target = path.resolve()
        if path.is_dir():
            return "a link to a folder"
        if not target.is_file() or source not in target.parents:
            return "a link that leads outside"
    return None


def _ignored_by_git(source: Path) -> set[Path]:
    """List what git ignores; nothing where there is no git or no repository."""
    ignored = ["--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        out = subprocess.run(
            ["git", "ls-files", "-z", *ignored], cwd=source, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {source / name for name in out.stdout.decode(errors="replace").split("\0") if name}


def _package(name: str) -> Iterator[tuple[Path, Path, int]]:
    """List (file, its path in the copy, bytes) of one of omni's packages."""
    root = Path(__file__).parents[2] / name
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path, Path(name) / path.relative_to(root), path.stat().st_size


def _size(path: Path) -> tuple[int, bool]:
    """Count the bytes of a file or folder, and say if that is only a part of them."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size, False
    total, seen = 0, 0
    for folder, _, files in os.walk(path):
        for name in files:
            total += os.lstat(os.path.join(folder, name)).st_size
            seen += 1
            if seen == _MOST_COUNTED:
                return total, True
    return total, False


def _check_size(files: Sequence[tuple[str, int]], limit: int) -> None:
    total = sum(size for _, size in files)
    if total <= limit:
        return
    largest = sorted(files, key=lambda item: -item[1])[:5]
    named = ", ".join(f"{name} ({readable(size)})" for name, size in largest)
    raise ConfigError(
        f"the working directory holds {readable(total)}, expected at most {readable(limit)}: data "
        f"belongs on storage that every node sees. The largest: {named}. Leave them out with "
        "--exclude, or allow it with --max_mb"
    )
