"""What a job takes to the cluster, from real folders and a real git repository."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from omni.cluster.working_dir import pack, readable
from omni.errors import ConfigError


def put(path: Path, size: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: settings, a manifest, and much that no job needs."""
    folder = tmp_path / "project"
    for name in ("configs/mine.yaml", "train.jsonl", "omni/__init__.py", "jobs/__init__.py"):
        put(folder / name)
    put(folder / ".git/objects/pack", 50_000)
    put(folder / ".venv/lib/torch.so", 90_000)
    put(folder / "omni/__pycache__/a.cpython-311.pyc")
    put(folder / ".env")
    put(folder / "old/checkpoints/last/model.safetensors", 70_000)
    put(folder / "old/config.yaml")
    return folder


def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def test_code_and_settings_go_along_and_nothing_else(project: Path, tmp_path: Path) -> None:
    packed = pack(project, into(tmp_path))
    wanted = {"configs/mine.yaml", "train.jsonl", "omni/__init__.py", "jobs/__init__.py"}
    assert files(packed.folder) == wanted
    assert (packed.files, packed.size) == (4, 12)
    left = {item.path: item for item in packed.left_out}
    assert left.keys() == {".git", ".venv", "omni/__pycache__", ".env", "old"}
    assert [item.size for item in packed.left_out][:3] == [90_000, 70_003, 50_000]
    assert str(left[".venv"]).startswith(".venv (90 kB, ")
    assert "run" in left["old"].reason and "secrets" in left[".env"].reason


def test_what_git_ignores_stays(project: Path, tmp_path: Path) -> None:
    for name in (".git", "data/clips/a.flac"):
        put(project / name / "x", 5_000)
    subprocess.run(["rm", "-r", project / ".git"], check=True)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    (project / ".gitignore").write_text("data/\n*.log\n")
    put(project / "configs/b.log")
    put(project / "notes.txt")
    (project / ".git/info/exclude").write_text("notes.txt\n")
    packed = pack(project, into(tmp_path))
    assert {"data", "configs/b.log", "notes.txt"} <= {item.path for item in packed.left_out}
    assert not any("data" in name or name.endswith(".log") for name in files(packed.folder))


def test_patterns_leave_out_more(project: Path, tmp_path: Path) -> None:
    packed = pack(project, into(tmp_path), exclude=["*.jsonl", "configs/m*"])
    assert files(packed.folder) == {"omni/__init__.py", "jobs/__init__.py"}


def test_links_bring_files_of_the_folder_and_no_others(project: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/secret")
    (project / "same.jsonl").symlink_to("train.jsonl")
    (project / "out").symlink_to(tmp_path / "elsewhere/secret")
    (project / "folder").symlink_to(tmp_path / "elsewhere")
    (project / "circle").symlink_to(".")
    packed = pack(project, into(tmp_path))
    assert (packed.folder / "same.jsonl").read_bytes() == b"xxx"
    links = {"out", "folder", "circle"}
    assert links <= {item.path for item in packed.left_out}
    assert not links & set(os.listdir(packed.folder))


def test_a_folder_without_omni_gets_this_version(tmp_path: Path) -> None:
    put(tmp_path / "mine/c.yaml")
    packed = pack(tmp_path / "mine", into(tmp_path))
    found = files(packed.folder)
    here = Path(__file__).parents[2]
    assert (packed.folder / "omni/cluster/working_dir.py").read_bytes() == (
        here / "omni/cluster/working_dir.py"
    ).read_bytes()
    assert {"c.yaml", "jobs/train.py", "omni/assets/whisper-tiny.en/model.safetensors"} <= found
    assert not any("__pycache__" in name for name in found)


def test_too_much_is_refused_naming_the_largest(project: Path, tmp_path: Path) -> None:
    put(project / "corpus/huge.flac", 3_000_000)
    with pytest.raises(ConfigError, match=r"\b3 MB\b.*\b1\.05 MB\b.*corpus/huge"):
        pack(project, into(tmp_path), limit=1 << 20)
    assert not any((tmp_path / "into").iterdir()), "nothing was copied"


def test_sizes_read_well() -> None:
    assert [readable(n) for n in (7, 1_234, 20_500_000, 3.2e12)] == [
        "7 B", "1.23 kB", "20.5 MB", "3,200.0 GB",
    ]  # fmt: skip
