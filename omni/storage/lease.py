"""Lease of a folder: one process at a time writes into it.

    lease.json            the lease that holds, renewed by its owner: number, owner, heartbeat
    leases/000003.json    the claim of number 3, never changed

Whoever creates the claim of the next number has the folder; only one process can
(omni/storage/exclusive.py). The owner of a smaller number finds the claim of a larger one before it
writes (omni/storage/fence.py), and stops. Clocks of different hosts are never compared: an observer
waits, by its own clock, for a heartbeat that changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omni.errors import ExitCode
from omni.storage.atomic import write_atomic
from omni.storage.exclusive import ConditionsUnsupported, create_exclusively, create_unguarded
from omni.storage.fence import Fence, LeaseError, LeaseLost, is_registered, register, unregister
from omni.storage.owner import Owner, this_process
from omni.storage.path import ObjectPath, StoragePath
from omni.storage.retry import retry_storage

LEASE_FILE = "lease.json"
CLAIMS = "leases"
_HEARTBEATS = 6
"""Heartbeats that an owner misses before its lease expires."""
_SETTLE_SECONDS = 2.0
"""Wait for the writes of others where the storage has no conditional write."""
_END_SECONDS = 15.0
"""Time that an owner which lost its lease has to end by itself."""


class LeaseHeld(LeaseError):
    """The owner of the lease is alive."""


@dataclass(frozen=True)
class LeaseState:
    """Hold the content of lease.json and of a claim."""

    number: int
    """Fencing number: 1, 2, ... in the order in which processes had the folder."""
    token: str
    """Random text of one claim."""
    owner: Owner
    seconds: float
    """Seconds without a heartbeat after which the lease expires."""
    interval: float
    """Seconds between two heartbeats."""
    beat: int = 0
    """Heartbeats so far."""
    time: float = 0.0
    """Time of the last one, in seconds since 1970 by the clock of the owner's host."""
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    def __str__(self) -> str:
        age = max(0.0, time.time() - self.time)
        return f"{self.owner} (lease {self.number}, heartbeat {age:.0f} s ago)"


def read_lease(folder: StoragePath) -> LeaseState | None:
    """Return the lease that holds, released or not; None without one. Raises OSError."""
    newest = _newest_claim(folder)
    return _read(folder, newest) if newest else None


class Lease:
    """Lease of `folder` that this process holds, with a thread that renews it."""

    def __init__(self, folder: StoragePath, state: LeaseState, previous: LeaseState | None) -> None:
        self._folder, self._state = folder, state
        self.previous = previous
        """State of the lease before it; None for the first one."""
        self.note: str | None = None
        """Remark for the user: what the storage cannot guarantee."""
        self._lost: LeaseLost | None = None
        self._stop = threading.Event()
        self.fence = make_fence(folder, state.number)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    @classmethod
    def take(
        cls, folder: StoragePath, seconds: float, waiting: Callable[[str], None] = lambda _: None
    ) -> Lease:
        """Take the lease of an existing folder, and renew it until `release`.

        seconds: without a heartbeat after which another process may take it. waiting: called with a
        line before a wait for the heartbeat of an owner that may be dead.
        Raises LeaseHeld if the owner lives, and OSError.
        """
        while True:
            newest = _newest_claim(folder)
            previous = _read(folder, newest) if newest else None
            if newest and not _is_free(previous) and not _expires(folder, newest, seconds, waiting):
                continue  # Something changed: look again.
            state = _new_state(newest + 1, seconds)
            claimed, note = _claim(folder, state)
            if claimed:
                break
        lease = cls(folder, state, previous)
        lease.note = note
        register(lease.fence)
        retry_storage(lease._write)
        lease._thread.start()
        return lease

    @property
    def number(self) -> int:
        return self._state.number

    def advance(self) -> int:
        """Take the next number, so that what still runs under the last one can write no more.

        Raises LeaseLost if another process was faster.
        """
        with self.fence.lock:
            state = _new_state(self.number + 1, self._state.seconds)
            if not retry_storage(lambda: _claim(self._folder, state)[0]):
                self.fence.check()
                raise LeaseLost(f"{self._folder}: another driver has taken over this run")
            self._state = state
            self.fence.number = state.number
            retry_storage(self._write)
        return state.number

    def raise_if_lost(self) -> None:
        """Raise LeaseLost once the thread has found that another process took over."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Stop renewing, and let the next process take over without waiting."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._state.interval)
        if self._lost is None:
            with contextlib.suppress(OSError, LeaseLost):
                self._write(released=True)
        unregister(self.fence)

    def _write(self, released: bool = False) -> None:
        """Write lease.json with one heartbeat more."""
        with self.fence.lock:
            state = self._state
            state = replace(state, beat=state.beat + 1, time=time.time(), released=released)
            self.fence.check()
            write_atomic(self._folder / LEASE_FILE, state.encode())
            self._state = state

    def _renew(self) -> None:
        while not self._stop.wait(self._state.interval):
            try:
                self._write()
            except OSError:
                continue  # Whether another process took over is asked again before any write.
            except LeaseLost as error:
                self._lost = error
                # The main thread may hang in a call that never returns.
                if not self._stop.wait(_END_SECONDS):
                    _end_process(error)
                return


def make_fence(folder: StoragePath, number: int) -> Fence:
    """Make the check of writes under the lease `number`."""

    def find_successor(number: int) -> str | None:
        if isinstance(folder, ObjectPath):
            newer = _claim_path(folder, number + 1).is_file()
        else:
            # A listing, since network file systems remember for a while that a name was absent.
            newer = _newest_claim(folder) > number
        if not newer:
            return None
        newest = read_lease(folder)
        return "another driver" if newest is None else f"the driver on {newest.owner}"

    return Fence(str(folder), number, find_successor)


def follow_lease(folder: StoragePath, number: int, interval: float) -> None:
    """Let this process write into `folder` under a driver's lease, and end it once that is lost.

    interval: seconds between two checks; every write checks too.
    """
    fence = make_fence(folder, number)
    register(fence)

    def watch() -> None:
        while is_registered(fence):
            time.sleep(interval)
            try:
                fence.check()
            except OSError:
                continue
            except LeaseLost as error:
                if is_registered(fence):
                    _end_process(error)

    threading.Thread(target=watch, daemon=True, name="lease").start()


def heartbeat_interval(seconds: float) -> float:
    """Return the seconds between two heartbeats of a lease that expires after `seconds`."""
    return seconds / _HEARTBEATS


def _end_process(error: LeaseLost) -> None:
    """End this process at once: it may hang where no exception reaches it."""
    os.write(2, f"omni: {error}\n".encode())
    os._exit(ExitCode.RUN_TAKEN)


def _new_state(number: int, seconds: float) -> LeaseState:
    return LeaseState(
        number,
        uuid.uuid4().hex,
        this_process(),
        seconds,
        heartbeat_interval(seconds),
        time=time.time(),
    )


def _is_free(state: LeaseState | None) -> bool:
    return state is not None and (state.released or state.owner.is_dead())


def _expires(
    folder: StoragePath, number: int, seconds: float, waiting: Callable[[str], None]
) -> bool:
    """Watch the lease `number` until it has expired; return False if it changed hands meanwhile.

    seconds: to wait where its state cannot be read. Raises LeaseHeld after a heartbeat.
    """
    first, written = _read(folder, number), _content(folder)
    limit = seconds if first is None else first.seconds
    poll = min(1.0, limit / _HEARTBEATS / 2)
    waiting(
        f"{folder} belongs to {'another process' if first is None else first}; waiting up to "
        f"{limit:.0f} s to see whether it is alive"
    )
    began = polled = time.monotonic()
    while time.monotonic() - began <= limit:
        time.sleep(poll)
        if time.monotonic() - polled > poll + limit / _HEARTBEATS:
            began = time.monotonic()  # This process was stopped, and may have missed heartbeats.
        polled = time.monotonic()
        if _newest_claim(folder) != number:
            return False
        state = _read(folder, number)
        if _is_free(state):
            return False
        if first is None or state is None:
            alive = _content(folder) != written  # The owner may be of a newer version.
        else:
            alive = state.beat != first.beat
        if alive:
            kill = "" if state is None else f": kill {state.owner.pid} on {state.owner.host}"
            raise LeaseHeld(
                f"{folder}: another driver trains this run: {state or LEASE_FILE + ' changes'}. "
                f"Let it end, or stop it{kill}; then the same command continues the run. For a "
                "second run choose another run.name"
            )
    return True


def _content(folder: StoragePath) -> bytes:
    try:
        return (folder / LEASE_FILE).read_bytes()
    except FileNotFoundError:
        return b""


def _claim(folder: StoragePath, state: LeaseState) -> tuple[bool, str | None]:
    """Try to create the claim; return whether it is this one, and what that does not guarantee."""
    path = _claim_path(folder, state.number)
    path.parent.mkdir(exist_ok=True)
    try:
        return create_exclusively(path, state.encode()), None
    except ConditionsUnsupported as error:
        note = (
            f"{LEASE_FILE}: {error}: two drivers of this run that start within seconds of each "
            "other may both train; later ones are refused"
        )
        return create_unguarded(path, state.encode(), _SETTLE_SECONDS), note


def _claim_path(folder: StoragePath, number: int) -> StoragePath:
    return folder / CLAIMS / f"{number:06d}.json"


def _newest_claim(folder: StoragePath) -> int:
    """Return the largest number that was claimed; 0 if none. Raises OSError."""
    claims = folder / CLAIMS
    if isinstance(claims, Path):
        try:
            names = os.listdir(claims)
        except FileNotFoundError:
            claims.parent.stat()  # An unreachable folder is not one without claims.
            return 0
    else:
        names = [info.base_name for info in claims.listing()]
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def _read(folder: StoragePath, number: int) -> LeaseState | None:
    """Return the state of a lease: lease.json, or its claim before the first heartbeat.

    None if neither can be read as one. Raises OSError where the storage does not answer.
    """
    for path in (folder / LEASE_FILE, _claim_path(folder, number)):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            document = json.loads(path.read_bytes())
            state = LeaseState(**{**document, "owner": Owner(**document["owner"])})
            if state.number == number:
                return state
    return None
