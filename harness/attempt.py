"""What an attempt says while it lives: status.json."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harness.ledger.files import read_json, write_json
from harness.ledger.lease import process_started, this_host
from harness.ledger.tree import StageFolder
from harness.study.stages import StageFile

_STATUS_EVERY_S = 1.0


class Status:
    """status.json of the stage: written at changes of state, and now and then while running."""

    def __init__(
        self, folder: StageFolder, stage: StageFile, attempt: int, guard: Callable[[], None]
    ) -> None:
        self.folder, self.guard = folder, guard
        claimed = read_json(folder.status) or {}
        # The queue is asked by what the claim noted of this attempt.
        is_this = claimed.get("attempt") == attempt
        kept = ("cluster", "user", "site", "job", "token") if is_this else ()
        self.base: dict[str, Any] = {
            **{k: claimed[k] for k in kept if k in claimed},
            "schema": 1,
            "state": "running",
            "attempt": attempt,
            "steps": stage.config.steps,
            "host": this_host(),
            "pid": os.getpid(),
            "pid_started": process_started(os.getpid()),
            "started": time.time(),
        }
        self.last: dict[str, Any] = {}
        self.step: int | None = None
        """Of the last report, written or not."""
        self._written = 0.0
        self._first: tuple[float, int] | None = None

    def report(self, *, step: int, samples: int, **scalars: float | None) -> None:
        """Live progress; written at most once a second."""
        now = time.monotonic()
        self.step = step
        if self._first is None:
            self._first = (now, samples)
        if now - self._written < _STATUS_EVERY_S:
            return
        self._written = now
        since, seen = now - self._first[0], samples - self._first[1]
        self.last = {
            "step": step,
            "samples": samples,
            "samples_per_s": seen / since if since > 0 else None,
            "memory_gib": _memory_gib(),
            **{k: v for k, v in scalars.items() if v is None or is_finite(v)},
        }
        self.write("running")

    def write(self, state: str, reason: str | None = None, message: str | None = None) -> None:
        """Writes the file, with the last progress that was reported."""
        final = {} if state == "running" else {"ended": time.time()}
        about = {"state": state, "reason": reason, "message": message}
        row = {**self.base, **self.last, "updated": time.time(), **final, **about}
        self.guard()
        write_json(self.folder.status, row, self.guard)


_PACKAGES = ("torch", "deepspeed", "timm", "torchvision", "numpy", "safetensors", "transformers")


def versions() -> dict[str, str | None]:
    """Of what computes: packages, CUDA as torch was built with it, the GPU's driver."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        driver = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        driver = None
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return found | {
        **{"python": platform.python_version(), "os": platform.platform()},
        **{"cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn), "driver": driver},
    }


def _memory_gib() -> float:
    """The most that this rank has held so far: of its GPU, or of the host without one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_finite(value: Any) -> bool:
    """True for a number that JSON has."""
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")
