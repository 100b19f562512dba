"""One process at a time writes into a folder, on disk and in a bucket."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from omni.storage import exclusive, lease
from omni.storage.exclusive import ConditionsUnsupported, create_exclusively
from omni.storage.fence import LeaseLost, lease_number, register, unregister
from omni.storage.lease import Lease, LeaseHeld, read_lease
from omni.storage.owner import this_process
from omni.storage.path import ObjectPath, StoragePath, as_path
from tests.helpers.whole_runs import ROOT

RACES = 200

RACER = """
import sys
from pathlib import Path
from omni.storage.exclusive import create_exclusively
for line in sys.stdin:
    name = line.strip()
    won = create_exclusively(Path(sys.argv[1]) / name, f"{sys.argv[2]} {name}".encode())
    print(int(won), flush=True)
"""

OWNER = """
import sys, time
from pathlib import Path
from omni.storage.lease import Lease
from omni.metrics.run_files import append_json
folder = Path(sys.argv[1])
held = Lease.take(folder, float(sys.argv[2]))
print(held.number, flush=True)
while True:
    time.sleep(0.05)
    held.raise_if_lost()
    append_json(folder / "rows.jsonl", [{"of": "first"}])
"""

RANK = """
import sys, time
from pathlib import Path
from omni.storage.lease import follow_lease
follow_lease(Path(sys.argv[1]), 1, 0.1)
print("follows", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of `tmp_path` and writes rows there."""
    process = _python(OWNER, str(tmp_path), "1.5")
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()


def _python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_of_two_processes_that_race_exactly_one_wins(tmp_path: Path) -> None:
    racers = [_python(RACER, str(tmp_path), name) for name in "ab"]
    names = "".join(f"claim-{number}\n" for number in range(RACES))
    answers: dict[int, list[str]] = {}

    def race(number: int, process: subprocess.Popen[str]) -> None:
        answers[number] = process.communicate(names)[0].split()

    threads = [threading.Thread(target=race, args=item) for item in enumerate(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wins = [int(a) + int(b) for a, b in zip(answers[0], answers[1], strict=True)]
    assert wins == [1] * RACES
    assert len(list(tmp_path.iterdir())) == RACES, "no temporary file is left"


def test_of_many_requests_at_once_a_bucket_grants_one(bucket: str) -> None:
    home = as_path(bucket) / uuid.uuid4().hex
    for number in range(3):
        won: list[bool] = []

        def claim(caller: int, name: str = f"claim-{number}", won: list[bool] = won) -> None:
            won.append(create_exclusively(home / name, f"{caller}".encode()))

        threads = [threading.Thread(target=claim, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 3 + [True]


def test_a_success_whose_answer_was_lost_is_a_success(folder: StoragePath) -> None:
    assert create_exclusively(folder / "claim", b"mine")
    assert create_exclusively(folder / "claim", b"mine")
    assert not create_exclusively(folder / "claim", b"another's")
    assert (folder / "claim").read_bytes() == b"mine"


def test_the_folder_is_handed_over_when_it_is_released(folder: StoragePath) -> None:
    first = Lease.take(folder, 60)
    assert first.number == 1 and first.previous is None and first.note is None
    assert lease_number(folder / "checkpoints" / "last") == 1
    assert lease_number(folder.parent) is None
    first.release()
    state = read_lease(folder)
    assert state is not None and state.released and state.owner == this_process()
    second = Lease.take(folder, 60)
    assert second.number == 2 and second.previous is not None and second.previous.released
    second.release()


def test_the_owner_that_lives_is_named(folder: StoragePath) -> None:
    held = Lease.take(folder, 6)
    try:
        with pytest.raises(LeaseHeld) as refused:
            Lease.take(folder, 60)
        mine = this_process()
        assert f"host {mine.host}, pid {mine.pid}" in str(refused.value)
        assert re.search(r"\(lease 1, heartbeat \d+ s ago\)", str(refused.value))
        state = read_lease(folder)
        assert state is not None and state.number == 1
    finally:
        held.release()


def test_a_killed_owner_of_this_host_is_known_to_be_dead(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    owner.kill()  # Not waited for: a process that has ended and was not collected is dead too.
    while owner.poll() is None and "Z" not in Path(f"/proc/{owner.pid}/stat").read_text():
        time.sleep(0.01)
    waits: list[str] = []
    taken = Lease.take(tmp_path, 60, waits.append)
    assert taken.number == 2 and not waits
    assert taken.previous is not None and taken.previous.owner.pid == owner.pid
    taken.release()


@pytest.mark.parametrize("field", ["host", "boot", "namespace", "started"])
def test_a_process_elsewhere_is_not_known_to_be_dead(field: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = replace(this_process(), pid=gone.pid)
    assert dead.is_dead() and not this_process().is_dead()
    other = {"host": "elsewhere", "boot": "another", "namespace": -1, "started": None}
    assert not replace(dead, **{field: other[field]}).is_dead()


def test_a_pid_that_is_used_again_is_another_process() -> None:
    mine = this_process()
    assert mine.started is not None and replace(mine, started=mine.started - 1).is_dead()


def test_a_stopped_owner_loses_the_folder_and_writes_nothing_more(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    while not rows.exists():
        time.sleep(0.01)
    owner.send_signal(signal.SIGSTOP)
    waits: list[str] = []
    began = time.monotonic()
    taken = Lease.take(tmp_path, 60, waits.append)
    assert time.monotonic() - began >= 1.5, "as long as the owner's lease says"
    assert taken.number == 2 and len(waits) == 1
    written = rows.read_bytes()
    owner.send_signal(signal.SIGCONT)
    _, errors = owner.communicate(timeout=20)
    assert owner.returncode != 0
    assert f"pid {os.getpid()} has taken over this run" in errors.splitlines()[-1]
    assert rows.read_bytes() == written
    state = read_lease(tmp_path)
    assert state is not None and state.number == 2 and state.owner == this_process()
    taken.release()


def test_the_lease_number_grows_with_every_attempt(folder: StoragePath) -> None:
    held = Lease.take(folder, 60)
    stale = lease.make_fence(folder, held.number)
    stale.check()
    assert held.advance() == 2 == lease_number(folder)
    held.fence.check()
    with pytest.raises(LeaseLost, match=f"pid {os.getpid()} has taken over"):
        stale.check()
    held.release()


@pytest.mark.parametrize("operation", ["write_bytes", "upload", "unlink", "rmtree"])
def test_a_fenced_process_changes_nothing_in_a_bucket(
    bucket: str, tmp_path: Path, operation: str
) -> None:
    home = as_path(bucket) / uuid.uuid4().hex
    assert isinstance(home, ObjectPath)
    target = home / "file"
    target.write_bytes(b"before")
    (tmp_path / "new").write_bytes(b"after")
    stale = lease.make_fence(home, 1)
    assert create_exclusively(home / "leases" / "000002.json", b"{}")
    register(stale)
    call = {
        "write_bytes": lambda: target.write_bytes(b"after"),
        "upload": lambda: target.upload(tmp_path / "new"),
        "unlink": target.unlink,
        "rmtree": home.rmtree,
    }[operation]
    try:
        with pytest.raises(LeaseLost):
            call()
    finally:
        unregister(stale)
    assert target.read_bytes() == b"before"


def test_a_rank_whose_lease_is_lost_ends_itself(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "000001.json").write_text("{}")
    rank = _python(RANK, str(tmp_path))
    assert rank.stdout is not None and rank.stdout.readline() == "follows\n"
    taken = Lease.take(tmp_path, 1)
    _, errors = rank.communicate(timeout=20)
    assert rank.returncode == 3 and f"pid {os.getpid()} has taken over" in errors
    taken.release()


def test_a_bucket_without_conditions_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = as_path(bucket) / uuid.uuid4().hex
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(exclusive, "s3_client", lambda path: None)
    held = Lease.take(home, 6)
    assert held.number == 1 and held.note is not None and "boto3" in held.note
    with pytest.raises(LeaseHeld):
        Lease.take(home, 1)
    held.release()


def test_a_server_that_ignores_conditions_is_found_out(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name, _ = exclusive.s3_client(as_path(bucket) / "x")  # type: ignore[misc, arg-type]

    class Ignoring:
        def put_object(self, IfNoneMatch: str, **request: object) -> None:  # noqa: N803
            client.put_object(**request)

    key = uuid.uuid4().hex
    monkeypatch.setattr(exclusive, "s3_client", lambda path: (Ignoring(), name, key))
    with pytest.raises(ConditionsUnsupported, match="ignores"):
        create_exclusively(as_path(bucket) / key, b"mine")


def test_a_claim_that_cannot_be_read_expires(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "000007.json").touch()
    waits: list[str] = []
    taken = Lease.take(tmp_path, 1, waits.append)
    assert taken.number == 8 and len(waits) == 1
    taken.release()


def test_credentials_and_endpoint_reach_the_client(bucket: str) -> None:
    path = as_path(bucket)
    assert isinstance(path, ObjectPath)
    found = exclusive.s3_client(path / "a" / "b")
    assert found is not None
    client, name, key = found
    credentials = client._request_signer._credentials
    assert credentials.access_key == os.environ["AWS_ACCESS_KEY_ID"]
    assert (name, key) == ("places", "a/b")
    assert client.meta.endpoint_url.startswith("http://127.0.0.1:")
