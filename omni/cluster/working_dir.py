"""Copy what a job needs of a folder, before Ray uploads it to the cluster.

Ray's own packaging follows links out of the folder and in circles, uploads .git and what
.git/info/exclude ignores, and checks the size only of the finished archive.
"""

from __future__ import annotations

import fnmatch
import os
import re
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
_SECRETS = (
    ".env", ".env.*", "*.env", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", ".htpasswd",
    ".git-credentials", ".aws", ".ssh", ".kube", ".azure", ".gnupg", ".docker", ".boto", ".s3cfg",
    "kubeconfig", "kubeconfig.*", "*.kubeconfig", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.ppk", "*.keystore", "*.tfstate", "*.tfstate.*",
    "*credentials*.json", "credentials", "client_secret*.json", "service[-_]account*.json",
    "secrets.*", "auth_token", "hf_token",
)  # fmt: skip
_SECRET_TEXT = re.compile(
    rb'-----BEGIN [A-Z ]*PRIVATE KEY-----|"type"\s*:\s*"service_account"|\bclient-key-data:|'
    rb"\baws_secret_access_key\s*=",
    re.IGNORECASE,
)
_SOURCES = (".py", ".pyi", ".md", ".rst")  # They may speak of keys.
_LOOKED_AT = 64 << 10  # bytes of a file in which keys are looked for
SECRET = "may hold secrets: everyone on the cluster could read it"
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

    That is what git tracks; without a repository, all files. Left out are hidden ones, caches, run
    directories, files whose names or contents look like secrets, links that lead outside, and paths
    or names that match a pattern of `exclude`. Adds omni's own code where `source` does not hold
    it, so that the cluster runs this version.

    Raises ConfigError for more than `limit` bytes, and for a repository that git cannot list.
    """
    source = source.resolve()
    rules = _Rules(source, exclude)
    left_out: list[LeftOut] = []
    chosen: list[tuple[Path, int]] = []
    for folder, names, files in os.walk(source):
        here = Path(folder)
        for name in sorted(names):
            path = here / name
            reason = rules.reason_not(path)
            if reason is not None:
                names.remove(name)
                left_out.append(LeftOut(str(path.relative_to(source)), reason, *_size(path)))
        for name in sorted(files):
            path = here / name
            reason = rules.reason_not(path)
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
    left_out.sort(key=lambda item: (item.reason != SECRET, -item.size))
    return Packed(into, len(pairs), sum(size for *_, size in pairs), left_out)


def readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


class _Rules:
    """Decide what of a folder is uploaded."""

    def __init__(self, source: Path, exclude: Sequence[str]) -> None:
        self.source, self.exclude = source, exclude
        tracked = _listed_by_git(source, "--cached", "--recurse-submodules")
        ignored = ("--others", "--ignored", "--exclude-standard", "--directory")
        self.ignored = _listed_by_git(source, *ignored)
        # Of a repository without a file, such as a new one, all is taken that is not ignored.
        self.tracked = tracked | {parent for path in tracked for parent in path.parents}

    def reason_not(self, path: Path) -> str | None:
        """Return the reason to leave out a path; None to upload it."""
        name, relative = path.name, str(path.relative_to(self.source))
        if name in _NEVER or name.endswith((".pyc", ".egg-info")):
            return "cache" if name.endswith(".pyc") else "version control, environment or cache"
        if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _SECRETS):
            return SECRET
        if name.startswith("."):
            return "hidden"
        if any(fnmatch.fnmatch(relative, p) or fnmatch.fnmatch(name, p) for p in self.exclude):
            return "--exclude"
        if path in self.ignored:
            return "ignored by git"
        if (path / "checkpoints").is_dir() and (path / "config.yaml").is_file():
            return "a run directory"
        if self.tracked and path not in self.tracked:
            return "not tracked by git"
        if path.is_symlink():
            target = path.resolve()
            if path.is_dir():
                return "a link to a folder"
            if not target.is_file() or self.source not in target.parents:
                return "a link that leads outside"
            inside = [p for p in (target, *target.parents) if self.source in p.parents]
            reasons = [reason for p in inside if (reason := self.reason_not(p)) is not None]
            if reasons:
                return SECRET if SECRET in reasons else f"a link to a path that is {reasons[0]}"
        if not path.is_dir() and not path.is_file():
            return "not a file"
        return SECRET if path.is_file() and _holds_key(path) else None


def _holds_key(path: Path) -> bool:
    """Look for private keys and service accounts in the beginning of a file."""
    if path.suffix in _SOURCES:
        return False
    with path.open("rb") as file:
        return _SECRET_TEXT.search(file.read(_LOOKED_AT)) is not None


def _listed_by_git(source: Path, *options: str) -> set[Path]:
    """List files by `git ls-files`; nothing outside a repository. Raises ConfigError."""
    try:
        out = subprocess.run(
            ["git", "ls-files", "-z", *options], cwd=source, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        if not any((folder / ".git" / "HEAD").is_file() for folder in (source, *source.parents)):
            return set()
        reason = getattr(error, "stderr", b"").decode(errors="replace").partition("\n")[0]
        raise ConfigError(
            f"--working_dir {source}: git cannot list its files: {reason or error}"
        ) from None
    return {source / os.fsdecode(name).rstrip("/") for name in out.stdout.split(b"\0") if name}


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
