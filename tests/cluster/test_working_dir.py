"""What a job takes to the cluster, from real folders and a real git repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from omni.cluster.job_client import describe
from omni.cluster.working_dir import SECRET, Packed, pack, readable
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
    assert [item.size for item in packed.left_out][:4] == [3, 90_000, 70_003, 50_000]
    assert str(left[".venv"]).startswith(".venv (90 kB, ")
    assert "run" in left["old"].reason and "secrets" in left[".env"].reason


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True)


def test_what_git_ignores_stays(project: Path, tmp_path: Path) -> None:
    """Of a repository without a commit or staged file, all is taken that git does not ignore."""
    shutil.rmtree(project / ".git")
    put(project / "data/clips/a.flac/x", 5_000)
    git(project, "init", "-q")
    (project / ".gitignore").write_text("data/\n*.log\n")
    put(project / "configs/b.log")
    put(project / "notes.txt")
    (project / ".git/info/exclude").write_text("notes.txt\n")
    packed = pack(project, into(tmp_path))
    assert {"data", "configs/b.log", "notes.txt"} <= {item.path for item in packed.left_out}
    sent = files(packed.folder)
    assert not any("data" in name or name.endswith(".log") for name in sent)
    assert "configs/mine.yaml" in sent


AWS = "[default]\naws_access_key_id = AKIA\naws_secret_access_key = wJalr/SECRET\n"
SECRETS = {
    ".aws/credentials": AWS,
    ".ssh/id_ed25519": "-----BEGIN OPENSSH PRIVATE KEY-----\nSECRET\n",
    ".kube/config": "users: [{user: {token: SECRET}}]",
    ".git-credentials": "https://me:SECRET@host",
    ".pypirc": "password = SECRET",
    ".netrc": "machine h login me password SECRET",
    ".env": "TOKEN=SECRET",
    ".env.production": "TOKEN=SECRET",
    "prod.env": "TOKEN=SECRET",
    "kubeconfig": "token: SECRET",
    "deploy/staging.kubeconfig": "token: SECRET",
    "deploy/service-account.json": '{"private_key": "SECRET"}',
    "deploy/google.json": '{"type": "service_account", "private_key": "SECRET"}',
    "deploy/cluster.yaml": "users:\n- user:\n    client-key-data: SECRET\n",
    "deploy/aws.ini": AWS,
    "deploy/server.crt": "-----BEGIN RSA PRIVATE KEY-----\nSECRET\n",
    "deploy/application_default_credentials.json": '{"refresh_token": "SECRET"}',
    "deploy/ID_RSA": "SECRET",
    "terraform.tfstate": '{"secret": "SECRET"}',
    "hf_token": "hf_SECRET",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of somebody who keeps everything in one place."""
    folder = tmp_path / "home"
    for name, text in SECRETS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("configs/mine.yaml", "train.jsonl", "lib/mine.py", ".config/tool", ".hidden"):
        put(folder / name)
    (folder / "lib/keys.py").write_text("MARK = '-----BEGIN PRIVATE KEY-----'")
    (folder / "alias").symlink_to(".aws/credentials")
    (folder / "other").symlink_to(".config/tool")
    return folder


OWN = {"configs/mine.yaml", "train.jsonl", "lib/mine.py", "lib/keys.py"}


def _without_secrets(packed: Packed) -> set[str]:
    """Names of what is sent beside omni's code, in the archive that Ray would upload."""
    archive = packed.folder.parent / "sent.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(packed.folder.rglob("*")):
            if path.is_file():
                zipped.write(path, path.relative_to(packed.folder))
    with zipfile.ZipFile(archive) as zipped:
        for name in zipped.namelist():
            if name.partition("/")[0] not in ("omni", "jobs"):
                assert b"SECRET" not in zipped.read(name), name
        names = set(zipped.namelist())
    assert {"omni/__init__.py", "jobs/train.py"} <= names
    return {name for name in names if name.partition("/")[0] not in ("omni", "jobs")}


def test_secrets_and_hidden_files_stay_without_a_repository(home: Path, tmp_path: Path) -> None:
    packed = pack(home, into(tmp_path))
    assert _without_secrets(packed) == OWN
    left = {item.path: item.reason for item in packed.left_out}
    for name in SECRETS:
        parents = [name, *map(str, Path(name).parents)]
        assert [left[path] for path in parents if path in left] == [SECRET], name
    assert left[".config"] == left[".hidden"] == "hidden" and left["alias"] == SECRET
    said: list[str] = []
    describe(packed, said.append)
    number = sum(reason == SECRET for reason in left.values())
    assert said[1].startswith(f"  without {number} paths that may hold secrets")
    assert packed.files == len(files(packed.folder))


def test_a_repository_sends_what_it_tracks(home: Path, tmp_path: Path) -> None:
    """Secrets that were committed stay here too."""
    git(home, "init", "-q")
    (home / ".gitignore").write_text("train.jsonl\n")
    put(home / "data/big.bin", 9_000)
    git(
        home,
        "add",
        "-f",
        "configs",
        "lib",
        "deploy",
        ".aws",
        ".env",
        "kubeconfig",
        "alias",
        "other",
    )
    packed = pack(home, into(tmp_path))
    assert _without_secrets(packed) == OWN - {"train.jsonl"}
    left = {item.path: item.reason for item in packed.left_out}
    assert left["data"] == "not tracked by git" and left["train.jsonl"] == "ignored by git"
    for name in (".aws", ".env", "kubeconfig", "deploy/google.json", "alias"):
        assert left[name] == SECRET
    assert left["other"].startswith("a link to ")
    (home / "lib/mine.py").unlink()
    again = tmp_path / "again"
    again.mkdir()
    assert "lib/mine.py" not in files(pack(home, again).folder)
    assert files(pack(home / "lib", tmp_path / "lib").folder) >= {"keys.py"}


def test_a_repository_that_git_refuses_is_an_error(home: Path, tmp_path: Path) -> None:
    git(home, "init", "-q")
    (home / ".git/config").write_text("[core")
    with pytest.raises(ConfigError, match=r"^--working_dir .*home: git cannot list .*config"):
        pack(home, into(tmp_path))


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
