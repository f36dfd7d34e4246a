"""What a result was measured on, for the file it is kept in."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def machine(*packages: str) -> dict[str, str | int]:
    """Processor, cores, day, and versions of Python and of these packages."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    """Its name; and its numbers, since a virtual machine's name may say no more than the maker."""
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    numbers = [f"{word} {told[key]}" for word, key in _NUMBERS.items() if key in told]
    return ", ".join([told.get("model name") or platform.machine(), *numbers])


_NUMBERS = {"family": "cpu family", "model": "model", "stepping": "stepping"}
