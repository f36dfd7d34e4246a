"""Where stages can run: hosts with CPU cores or GPUs. Asks the system, imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from harness.errors import UserError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine and its slots: core numbers on CPU, CUDA_VISIBLE_DEVICES entries on CUDA."""

    name: str = "localhost"
    slots: tuple[str, ...]
    remote: bool = False
    """Reached over ssh, under `name`."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hosts that stages are placed on; all have the same kind of device."""

    device: Device
    hosts: tuple[Host, ...]

    @property
    def name(self) -> str:
        """What a stage's record says of where it ran."""
        return "hosts" if any(h.remote for h in self.hosts) else "local"

    @property
    def slots(self) -> tuple[str, ...]:
        """Every slot of every host; those of remote hosts with the host's name before."""
        return tuple(f"{h.name}:{s}" if h.remote else s for h in self.hosts for s in h.slots)

    def most_ranks(self, threads: int = 1) -> int:
        """The largest stage that could ever run: no rank is cut in two between hosts."""
        per_rank = slots_per_rank(self.device, threads)
        return sum(len(h.slots) // per_rank for h in self.hosts)


def slots_per_rank(device: Device, threads: int) -> int:
    """Slots of one process: a GPU, or a core for each of its threads."""
    return 1 if device == "cuda" else threads


def this_machine(device: Device, slots: int | tuple[str, ...]) -> Machine:
    """A machine of one host, this one, with named or so many slots."""
    named = tuple(map(str, range(slots))) if isinstance(slots, int) else slots
    return Machine(device=device, hosts=(Host(slots=named),))


def detect() -> Machine:
    """GPUs if there are any (CUDA_VISIBLE_DEVICES honoured), else the CPU cores we may use.

    HARNESS_DEVICE=cpu ignores GPUs; HARNESS_CORES=N uses N cores.
    """
    wanted = os.environ.get("HARNESS_DEVICE", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"HARNESS_DEVICE={wanted!r}: expected cpu, cuda or auto")
    gpus = [] if wanted == "cpu" else _gpus()
    if gpus:
        return this_machine("cuda", tuple(gpus))
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
    return this_machine("cpu", cores)


# --- GPUs ---------------------------------------------------------------------------------


def _gpus() -> list[str]:
    """What CUDA would see: entries for CUDA_VISIBLE_DEVICES, one a slot."""
    visible, installed = os.environ.get("CUDA_VISIBLE_DEVICES"), _installed()
    if visible is not None:
        return _visible(visible, installed)
    return installed or []


def _visible(text: str, installed: list[str] | None) -> list[str]:
    """The devices a CUDA_VISIBLE_DEVICES names, as the CUDA driver and torch read it.

    The list ends at the first entry that is no device ("-1", Slurm's "NoDevFiles", an index too
    many); a device named twice makes all of it void. All are indexes, or all GPU-, or all MIG-.
    Without nvidia-smi (None) indexes are believed.
    """
    found: list[str] = []
    style: str | None = None
    for entry in (e.strip() for e in text.split(",")):
        match = re.match(r"(GPU-|MIG-)|\d+$", entry)
        if match is None or style not in (None, match[1] or "index"):
            break
        style = match[1] or "index"
        # With MIG devices listed by name, an index still counts whole GPUs: it is believed.
        counted = installed is not None and not any(g.startswith("MIG-") for g in installed)
        if style == "index" and counted and int(entry) >= len(installed or []):
            break
        if entry in found:
            return []
        found.append(entry)
    return found


def _installed() -> list[str] | None:
    """Indexes of this host's GPUs, names of the instances of one cut by MIG; None: cannot say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    if listed.returncode != 0:
        return None
    found: list[str] = []
    for line in listed.stdout.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            found.append(gpu[1])
        elif instance := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            # The first instance replaces the GPU's own entry: whole, it cannot be used.
            if found and not found[-1].startswith("MIG-"):
                found.pop()
            found.append(instance[1])
    return found
