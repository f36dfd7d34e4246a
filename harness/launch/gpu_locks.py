"""GPUs of this host, held while a stage runs on them: two commands at a time share none.

A file per GPU in a folder of the user's, locked with flock: the system gives a lock back when its
last owner is gone. The pool's zygote and workers hold it too, so that a GPU whose command was
killed is free only when its workers are gone. Commands of other users are not seen.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

from harness.errors import UserError
from harness.launch.machine import Machine

FOLDER = "HARNESS_GPU_LOCKS"
"""Variable that names another folder than /tmp/harness-gpus-<uid>."""


class GpuLocks:
    """Locks of the GPUs of this host, by slot. Without GPUs there is nothing to lock."""

    def __init__(self, machine: Machine) -> None:
        is_here = machine.device == "cuda"
        slots = [s for h in machine.hosts if is_here and not h.remote for s in h.slots]
        names = _names(slots) if slots else {}
        folder = _folder() if slots else Path()
        self._files: dict[str, int] = {}
        for slot in slots:
            path = folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', names.get(slot, slot))}.lock"
            self._files[slot] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._held: set[str] = set()

    @property
    def fds(self) -> list[int]:
        """For processes that are to hold what this one holds."""
        return list(self._files.values())

    def take(self, slots: Iterable[str]) -> set[str]:
        """Locks all of these, or none: those that somebody else holds."""
        new, busy = [], set()
        for slot in slots:
            if slot in self._held or slot not in self._files:
                continue
            try:
                fcntl.flock(self._files[slot], fcntl.LOCK_EX | fcntl.LOCK_NB)
                new.append(slot)
            except BlockingIOError:
                busy.add(slot)
        self._held |= set(new)
        if busy:
            self.keep(self._held - set(new))
        return busy

    def keep(self, slots: Collection[str]) -> None:
        """Gives back all but these."""
        for slot in self._held - set(slots):
            fcntl.flock(self._files[slot], fcntl.LOCK_UN)
        self._held &= set(slots)

    def close(self) -> None:
        """Gives everything back, unless a worker is left that holds it too."""
        for fd in self._files.values():
            os.close(fd)
        self._files, self._held = {}, set()


def _folder() -> Path:
    named = os.environ.get(FOLDER)
    folder = Path(named) if named else Path("/tmp") / f"harness-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=bool(named), exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise UserError(f"{folder}: is not a folder of yours; remove it, or set {FOLDER} to one")
    return folder


def _names(slots: Iterable[str]) -> dict[str, str]:
    """Slot -> UUID. In a container or a job of Slurm, GPU 0 is not everybody's GPU 0."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    found = dict(re.findall(r"^GPU (\d+):.*\(UUID: (GPU-[^)]+)\)", done.stdout, re.MULTILINE))
    # A GPU may be named by the beginning of its UUID.
    whole = {
        s: u for s in slots for u in found.values() if s.startswith("GPU-") and u.startswith(s)
    }
    return found | whole
