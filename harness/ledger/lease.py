"""One owner per stage: a lock file with a heartbeat, for local disks, NFS and Lustre alike.

Creation is a hard link of a whole file, which is atomic on all of them. The heartbeat is a counter
in the file, and a watcher judges it by its own clock: hosts whose clocks differ cannot take a live
lease for a dead one. An owner on this host whose process is gone is dead at once.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import LeaseLostError, UserError
from harness.ledger.files import dump, read_json, write_bytes
from harness.ledger.tree import StageFolder

BEAT_S = 5.0
EXPIRY_S = float(os.environ.get("HARNESS_LEASE_EXPIRY_S", "60"))
"""An owner that cannot be asked is dead after so long without a heartbeat."""


class LeaseHeldError(UserError):
    """The stage has a living owner."""


def this_host() -> str:
    """Name of this machine since its last boot; a rebooted host is another one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = ""
    return f"{os.environ.get('HARNESS_HOST') or socket.gethostname()}:{boot}"


def process_started(pid: int) -> str | None:
    """A text that differs when the pid is used again by another process; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:  # no /proc (macOS): the bare existence of the pid has to do
            os.kill(pid, 0)
        except OSError:
            return None
        return "unknown"
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def read_lease(path: Path) -> dict[str, Any] | None:
    """Content of a lease file; None if there is none."""
    try:
        return read_json(path)
    except UserError:
        # Only a file system that lost the content of a rename shows this: nobody owns such a lease.
        return {"token": "", "host": "", "pid": 0, "started": None, "beat": 0}


def owner_is_dead(lease: dict[str, Any]) -> bool | None:
    """True or False for an owner on this host, None where only the heartbeat can tell."""
    if not lease["token"]:
        return True
    if lease["host"] != this_host():
        return None
    return process_started(int(lease["pid"])) != lease["started"]


class Silence:
    """How long owners on other hosts have given no sign, by this process's own clock."""

    def __init__(self, expiry_s: float = EXPIRY_S) -> None:
        self.expiry_s = expiry_s
        self._seen: dict[str, tuple[Any, float]] = {}

    def is_over(self, stage_id: str, folder: StageFolder) -> bool:
        """True if the stage's owner cannot be asked and neither its heartbeat nor its status has
        changed for `expiry_s` of asking."""
        lease, status = read_lease(folder.lease), read_json(folder.status) or {}
        host = lease["host"] if lease else status.get("host")
        if host == this_host() or status.get("job"):
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
        self._checked = -float("inf")
        """When it was last seen to be ours; time.monotonic() goes on while we are stopped."""
        self._guard_seen: tuple[int, float] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(cls, path: Path, expiry_s: float = EXPIRY_S) -> Lease:
        """Takes the lease, waiting for a silent owner on another host to expire.

        Raises LeaseHeldError as soon as the owner is seen alive.
        """
        lease = cls(path, uuid.uuid4().hex)
        path.parent.mkdir(parents=True, exist_ok=True)
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
            if lease._take_over(held["token"]):
                return lease

    def _content(self) -> bytes:
        content = {
            "schema": 1,
            "token": self.token,
            "host": this_host(),
            "pid": os.getpid(),
            "started": process_started(os.getpid()),
            "beat": self._beat,
        }
        return (dump(content) + "\n").encode()

    def _create(self) -> bool:
        temporary = self.path.with_name(f".lease.{self.token}.tmp")
        write_bytes(temporary, self._content())
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)

    def _take_over(self, dead_token: str) -> bool:
        """Replaces a dead owner's lease. A second lock makes sure only one process does."""
        guard = self.path.with_name(f"{self.path.name}.takeover")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            self._wait_for(guard)
            return False
        try:
            held = read_lease(self.path)
            if held is None or held["token"] != dead_token:
                return False
            write_bytes(self.path, self._content())
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _wait_for(self, guard: Path) -> None:
        """A takeover lasts milliseconds: a guard that stays belongs to a process that was killed.

        Judged by this process's own clock: the file's time is another host's.
        """
        try:
            born = guard.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if self._guard_seen is None or self._guard_seen[0] != born:
            self._guard_seen = (born, time.monotonic())
        elif time.monotonic() - self._guard_seen[1] > min(10.0, EXPIRY_S):
            guard.unlink(missing_ok=True)
        time.sleep(0.05)

    def check(self, within_s: float = 0.0) -> None:
        """Raises LeaseLostError if another process owns the stage now.

        With `within_s`, a look that was taken so shortly before will do.
        """
        now = time.monotonic()
        if now - self._checked < within_s:
            return
        held = read_lease(self.path)
        if held is None or held["token"] != self.token:
            owner = f"process {held['pid']} on {held['host']}" if held else "nobody"
            raise LeaseLostError(f"{self.path}: this process lost the lease; owner now: {owner}")
        self._checked = now

    def guard(self) -> None:
        """`check`, cheap enough for every write: at most one look a second."""
        self.check(within_s=1.0)

    def start_beating(self, look: Callable[[], None] = lambda: None) -> None:
        """Keeps the heartbeat going in a thread until `release`; `look` is called with each."""
        self._look = look
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self.check()
                self._beat += 1
                # Stopped in here for long enough to lose the lease, we must not take it back.
                write_bytes(self.path, self._content(), before=lambda: self.check(EXPIRY_S / 4))
                self._look()
            except LeaseLostError:
                # `check` in the main thread raises the same before anything is written.
                return
            except UserError:
                # A full disk: the next beat may find room; if none does, others may take over.
                continue

    def release(self) -> None:
        """Gives the lease back if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        held = read_lease(self.path)
        if held is not None and held["token"] == self.token:
            self.path.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Only one process at a time, on any shared file system; the lock of a dead one is taken."""
    while True:
        try:
            lease = Lease.acquire(path)
            break
        except LeaseHeldError:
            time.sleep(0.1)
    lease.start_beating()
    try:
        yield
    finally:
        lease.release()
