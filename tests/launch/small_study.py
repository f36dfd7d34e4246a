"""A study of four cells that trains in seconds, and commands that run it, stop it and read it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.ledger.files import read_json, read_jsonl

TINY = """\
name: tiny
axes:
  data: [500, 2k]
  init: [random, mae]
defaults:
  size: d16x2
  dataset: scenes-2k
  image_size: 24
stages:
  mae:
    duration: {steps: 30}
    batch: 64
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
  wsp:
    duration: {steps: 40}
    batch: 64
  transfer:
    probe: {protocol: linear_probe, train_images: 500}
    tune: {protocol: fine_tune, duration: {steps: 10}, batch: 64, train_images: 500}
"""


def submit(
    root: Path, file: Path, *arguments: str, check: int | None = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit", *arguments],
        capture_output=True,
        text=True,
        env=environment(root),
        check=False,
    )
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "HARNESS_ROOT": str(root), "HARNESS_DEVICE": "cpu", "HARNESS_CORES": "2"}


def fresh(finished: tuple[Path, Path], folder: Path, text: str = TINY) -> tuple[Path, Path]:
    """Another run root and study file, with the images of the finished study."""
    root, file = folder / "runs", folder / "tiny.yaml"
    file.write_text(text)
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    return root, file


def stages(root: Path) -> dict[str, Path]:
    return {p.name: p for p in sorted(root.glob("stages/*/*"))}


def numbers(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Everything the study measured, wall times aside."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, folder in stages(root).items():
        found = read_jsonl(folder / "metrics.jsonl")
        rows[name] = [{k: v for k, v in r.items() if k != "wall_s"} for r in found]
        result = read_json(folder / "result.json")
        assert result is not None, f"{name} has no result"
        rows[name].append(result["metrics"])
    return rows


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 of the command, of the pool's process and of the workers, as a power cut would."""
    children = subprocess.run(
        ["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[1:]
    parents = {int(a): int(b) for a, b in (line.split() for line in children if line.strip())}

    def below(pid: int) -> list[int]:
        return [c for p, q in parents.items() if q == pid for c in (p, *below(p))]

    for pid in (process.pid, *below(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def start(root: Path, file: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(root),
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def num_attempts(root: Path) -> int:
    return len(list(root.glob("stages/*/*/attempts/*/attempt.json")))


CHECKPOINTING = TINY + "resources: {checkpoint_every: 0.2}\n"
