"""What this machine offers: CPU cores or GPUs. Asks the system, imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from harness.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Slots that stages are placed on: core numbers on CPU, device numbers on CUDA."""

    device: Literal["cpu", "cuda"]
    slots: tuple[str, ...]


def detect() -> Machine:
    """GPUs if there are any (CUDA_VISIBLE_DEVICES honoured), else the CPU cores we may use.

    HARNESS_DEVICE=cpu ignores GPUs; HARNESS_CORES=N uses N cores.
    """
    wanted = os.environ.get("HARNESS_DEVICE", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"HARNESS_DEVICE={wanted!r}: expected cpu, cuda or auto")
    gpus = [] if wanted == "cpu" else _gpus()
    if gpus:
        return Machine(device="cuda", slots=tuple(gpus))
    if wanted == "cuda":
        raise UserError("HARNESS_DEVICE=cuda, but no NVIDIA GPU is visible here")
    # sched_getaffinity honours taskset and containers; macOS does not have it.
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    limit = os.environ.get("HARNESS_CORES")
    if limit is not None:
        if not limit.isdigit() or int(limit) < 1:
            raise UserError(f"HARNESS_CORES={limit!r}: expected a number of at least 1")
        cores = int(limit)
    return Machine(device="cpu", slots=tuple(map(str, range(cores))))


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [g.strip() for g in visible.split(",") if g.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run(
        [tool, "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return listed.stdout.split() if listed.returncode == 0 else []
