"""One owner per stage: a lock file with a heartbeat, for local disks, NFS and Lustre alike.

Creation is a hard link of a whole file, which is atomic on all of them. The heartbeat is a counter
in the file, and a watcher judges it by its own clock: hosts whose clocks differ cannot take a live
lease for a dead one. An owner on this host whose process is gone is dead at once; a container with
pids of its own counts as another host.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.errors import LeaseLostError, StorageError, UserError
from harness.ledger.files import dump, process_exists, read_json, temporary_name, write_bytes
from harness.ledger.tree import StageFolder

EXPIRY_S = float(os.environ.get("HARNESS_LEASE_EXPIRY_S", "60"))
"""An owner that nobody can ask is given up after so long; the same for all who share a root."""
BEAT_S = EXPIRY_S / 12
MOST_SKEW_S = 1200.0
"""Clocks of hosts that share a root do not differ by more."""
_FRESH_S = 1.0
_QUIET_S = 30.0
"""Whoever waits for longer says so."""


def _clock() -> float:
    """Seconds that go on while the machine is suspended, where the system counts those."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class LeaseHeldError(UserError):
    """The stage has a living owner."""


def this_host() -> str:
    """Where a pid means what it means here: name of the machine, its last boot, pid namespace.

    A rebooted host is another one, and so is a container beside us, of the same name perhaps.
    HARNESS_HOST stands in for the name where several machines have the same one.
    """
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    with suppress(OSError):
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    return f"{os.environ.get('HARNESS_HOST') or socket.gethostname()}:{boot}:{namespace}"


def process_started(pid: int) -> str | None:
    """A text that differs when the pid is used again by another process; None if it is gone."""
    if not _proc_is_ours():
        return "unknown" if process_exists(pid) else None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        # Gone, or another user's where /proc hides those (hidepid).
        return "unknown" if process_exists(pid) else None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _proc_is_ours() -> bool:
    """False where there is no /proc (macOS), or it shows the pids of another namespace (`unshare
    --pid` without `--mount-proc`): the bare existence of a pid has to do."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def read_lease(path: Path) -> dict[str, Any] | None:
    """Content of a lease file; None if there is none."""
    try:
        return read_json(path)
    except UserError:
        # Only a file system that lost the content of a rename shows this: nobody owns such a lease.
        return {"token": "", "host": "", "pid": 0, "started": None, "beat": 0}


def is_long_silent(path: Path) -> bool:
    """True if the file was not written for longer than any two clocks differ, or is not there."""
    try:
        return time.time() - path.stat().st_mtime > MOST_SKEW_S + EXPIRY_S
    except OSError:
        return True


def stands_still_s(path: Path) -> float | None:
    """For how long an owner on this host, whose process is there, has given no sign: it was stopped
    (Ctrl-Z), or its disk hangs. None while it beats; of other hosts, whose clocks differ, always.
    """
    lease = read_lease(path)
    if lease is None or lease["host"] != this_host():
        return None
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return None
    return age if age > 2 * EXPIRY_S else None


def owner_is_dead(lease: dict[str, Any]) -> bool | None:
    """True or False for an owner on this host, None where only the heartbeat can tell."""
    if not lease["token"]:
        return True
    if lease["host"] != this_host():
        return None
    started = process_started(int(lease["pid"]))
    if started is not None and "unknown" in (started, lease["started"]):
        return False  # the bare existence of the pid has to do
    return started != lease["started"]


def takeover_guard(path: Path) -> Path:
    """The lease on taking a lease away from its owner; a process killed meanwhile leaves it."""
    return path.with_name(f"{path.name}.takeover")


class Silence:
    """How long owners on other hosts have given no sign, by this process's own clock."""

    def __init__(self, expiry_s: float = EXPIRY_S) -> None:
        self.expiry_s = expiry_s
        self._seen: dict[str, tuple[Any, float]] = {}

    def is_over(self, stage_id: str, folder: StageFolder) -> bool:
        """True if the stage's owner cannot be asked and neither its heartbeat nor its status has
        changed for `expiry_s` of asking."""
        lease, status = read_lease(folder.lease), read_json(folder.status) or {}
        if lease is not None and owner_is_dead(lease):
            lease = None  # it says nothing of who has claimed the stage since
        host = lease["host"] if lease else status.get("host")
        if host == this_host() or status.get("job") or status.get("token"):
            return False  # its process, or the scheduler, can be asked
        sign = (lease and (lease["token"], lease["beat"]), status.get("attempt"))
        known = self._seen.get(stage_id)
        if known is None or known[0] != sign:
            self._seen[stage_id] = (sign, time.monotonic())
            return False
        return time.monotonic() - known[1] > self.expiry_s

    def forget(self, stage_id: str) -> None:
        """Starts anew for this stage."""
        self._seen.pop(stage_id, None)


class Lease:
    """A held lease. Keep calling `check` before writing: it may have been taken over."""

    def __init__(self, path: Path, token: str) -> None:
        self.path = path
        self.token = token
        self._beat = 0
        self._checked: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(cls, path: Path, expiry_s: float = EXPIRY_S) -> Lease:
        """Takes the lease, waiting for a silent owner on another host to expire.

        Raises LeaseHeldError as soon as the owner is seen alive.
        """
        lease = cls(path, uuid.uuid4().hex)
        deadline: float | None = None
        seen: tuple[str, int] | None = None
        while True:
            if lease._create():
                return lease
            held = read_lease(path)
            if held is None:
                continue
            dead = owner_is_dead(held)
            if dead is None:
                now, current = time.monotonic(), (held["token"], held["beat"])
                if seen is None:
                    seen, deadline = current, now + expiry_s
                dead = current == seen and deadline is not None and now >= deadline
                if current != seen:
                    dead = False
                elif not dead:
                    time.sleep(min(1.0, expiry_s / 4))
                    continue
            if not dead:
                raise LeaseHeldError(f"{path}: held by process {held['pid']} on {held['host']}")
            if lease._take_over(held["token"], expiry_s):
                return lease

    def _content(self) -> bytes:
        content = {
            "schema": 1,
            "token": self.token,
            "host": this_host(),
            "pid": os.getpid(),
            "started": process_started(os.getpid()),
        }
        # Last and of a fixed width, so that it can be written over in place.
        return f"{dump(content)[:-2]},\n {self._beat_field()}\n}}\n".encode()

    def _beat_field(self) -> str:
        return f'"beat": {self._beat:12d}'

    def _create(self) -> bool:
        temporary = self.path.with_name(temporary_name(self.path.name))
        write_bytes(temporary, self._content())
        try:
            os.link(temporary, self.path)
            return True
        except OSError as error:
            # A file server's answer may be lost, and its second try find the link that it made.
            if self.is_ours():
                return True
            if isinstance(error, FileExistsError):
                return False
            raise StorageError(self.path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _take_over(self, dead_token: str, expiry_s: float) -> bool:
        """Replaces a dead owner's lease. A second lease makes sure only one process does."""
        try:
            # Judged as any lease is, by life and not by its file's time: clocks of hosts differ.
            guard = Lease.acquire(takeover_guard(self.path), expiry_s)
        except LeaseHeldError:
            time.sleep(0.05)
            return False
        try:
            held = read_lease(self.path)
            if held is None or held["token"] != dead_token or not guard.is_ours():
                return False
            write_bytes(self.path, self._content())
            return True
        finally:
            guard.drop()

    def is_ours(self) -> bool:
        """True if no other process has taken the lease."""
        held = read_lease(self.path)
        return held is not None and held["token"] == self.token

    def check(self) -> None:
        """Raises LeaseLostError if another process owns the stage now."""
        held = read_lease(self.path)
        if held is None or held["token"] != self.token:
            owner = f"process {held['pid']} on {held['host']}" if held else "nobody"
            raise LeaseLostError(f"{self.path}: this process lost the lease; owner now: {owner}")

    def guard(self) -> None:
        """`check`, to be called right before every write: looks at the file once a second only.

        The clock goes on while a process is stopped or its machine sleeps, so one that is
        continued looks.
        """
        if self._checked is None or _clock() - self._checked > _FRESH_S:
            began = _clock()
            self.check()
            self._checked = began

    def start_beating(self, each: Callable[[], None] = lambda: None) -> None:
        """Keeps the heartbeat going in a thread until `release`; calls `each` at every beat."""
        self._thread = threading.Thread(target=self._run, args=(each,), name="lease", daemon=True)
        self._thread.start()

    def _run(self, each: Callable[[], None]) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._write_beat()
                each()
            except LeaseLostError:
                return  # `check` in the main thread raises the same before anything is written
            except (OSError, UserError):
                continue  # a file system that is away for a moment

    def _write_beat(self) -> None:
        """Counts up in place, in the very file that holds our token: whoever takes over puts
        another file there, which a process stopped in the middle of this cannot touch."""
        try:
            file = open(self.path, "r+b", buffering=0)
        except FileNotFoundError:
            raise LeaseLostError(f"{self.path}: is gone") from None
        with file:
            content = file.read()
            if json.loads(content)["token"] != self.token:
                raise LeaseLostError(f"{self.path}: has another owner")
            self._beat += 1
            place = content.rindex(b'"beat":')
            os.pwrite(file.fileno(), self._beat_field().encode(), place)
            os.fsync(file.fileno())

    def release(self) -> None:
        """Gives the lease back if it is still ours; nobody takes it over between look and removal.

        A taker that stands still keeps us waiting for the expiry at most: then the lease stays, and
        counts no more once this process is gone.
        """
        self._stop_beating()
        deadline = time.monotonic() + EXPIRY_S
        while self.is_ours():
            try:
                guard = Lease.acquire(takeover_guard(self.path))
            except LeaseHeldError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
                continue
            except StorageError:  # a full disk takes no file of a taker either
                self.drop()
                return
            try:
                if self.is_ours() and guard.is_ours():
                    self.path.unlink(missing_ok=True)
                    return
            finally:
                guard.drop()

    def drop(self) -> None:
        """`release` without the guard, for locks that are held for a moment, thousands of times.

        The guard, a file more to sync, link and remove, makes it 3 to 8 ms on ext4 instead of 0.3.
        Whoever takes over a lock whose owner stood still for a minute right here still has the
        worker's own lease behind it.
        """
        self._stop_beating()
        if self.is_ours():
            self.path.unlink(missing_ok=True)

    def _stop_beating(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class AttemptGuard:
    """What `Lease.guard` is to rank 0, for the ranks beside it, which hold no lease.

    A claim puts its attempt into status.json before its worker starts: a later number there than
    the rank's own means that the stage was taken over.
    """

    def __init__(self, folder: StageFolder, attempt: int) -> None:
        self.folder, self.attempt = folder, attempt
        self._checked: float | None = None

    def guard(self) -> None:
        """Raises LeaseLostError if a later attempt owns the stage; looks once a second only."""
        if self._checked is not None and _clock() - self._checked <= _FRESH_S:
            return
        began = _clock()
        now = int((read_json(self.folder.status) or {}).get("attempt") or 0)
        if now > self.attempt:
            raise LeaseLostError(
                f"{self.folder.path}: attempt {now} owns the stage now, not attempt {self.attempt}"
            )
        self._checked = began


@contextmanager
def exclusive(path: Path, patience_s: float = math.inf) -> Iterator[None]:
    """Only one process at a time, on any shared file system; the lock of a dead one is taken.

    Raises LeaseHeldError where others hold it for longer than `patience_s`.
    """
    began, has_said = time.monotonic(), False
    while True:
        try:
            lease = Lease.acquire(path)
            break
        except LeaseHeldError as error:
            waited = time.monotonic() - began
            if waited > patience_s:
                raise
            if waited > _QUIET_S and not has_said:
                print(f"waiting: {error}", file=sys.stderr, flush=True)
                has_said = True
            time.sleep(0.1)
    lease.start_beating()
    try:
        yield
    finally:
        lease.drop()
