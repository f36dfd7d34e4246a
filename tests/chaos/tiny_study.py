"""A study of a few seconds, run by the real command, and what is true of it once it is done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.ledger.files import read_json, read_jsonl

STUDY = """\
name: tiny
axes:
  init: [random, mae]
defaults:
  size: d16x2
  data: 500
  dataset: scenes-2k
  image_size: 24
stages:
  mae:
    duration: {steps: 300}
    batch: 32
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
  wsp:
    duration: {steps: 300}
    batch: 32
  transfer:
    probe: {protocol: linear_probe, train_images: 200}
    tune: {protocol: fine_tune, duration: {steps: 60}, batch: 32, train_images: 200}
resources: {checkpoint_every: 0.15}
retry: {killed: 1000, node_fail: 1000, patience: 1000}
"""
TWO_RANKS = STUDY.replace("resources: {", "resources: {ranks: 2, ")


def environment(root: Path, **more: str) -> dict[str, str]:
    """Of the command."""
    own = {"HARNESS_ROOT": str(root), "HARNESS_DEVICE": "cpu", "HARNESS_CORES": "2"}
    return {**os.environ, **own, **more}


def start(root: Path, file: Path, **env: str) -> subprocess.Popen[bytes]:
    """`grid FILE --submit`, in a session of its own; its words go to output.log."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root.parent / "output.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment(root, **env),
        )


def undisturbed(folder: Path, text: str = STUDY) -> tuple[Path, Path]:
    """(root, study file) of the study, run to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.yaml"
    file.write_text(text)
    code = start(folder / "runs", file).wait(600)
    assert code == 0, (folder / "output.log").read_text()
    return folder / "runs", file


def with_its_images(root: Path, other: Path) -> Path:
    """Another root that need not draw the images again."""
    other.mkdir(parents=True)
    shutil.copytree(root / "datasets", other / "datasets")
    return other


def processes(root: Path) -> dict[int, str]:
    """Living processes of this root, and their command lines; workers are of it too."""
    found, needle = {}, f"HARNESS_ROOT={root}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "environ").read_bytes() + b"\0":
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if line:  # a zombie has none
                    found[int(folder.name)] = line
        except OSError:
            continue
    return found


def kill_all(root: Path) -> None:
    """kill -9 of everything that belongs to the root, as a power cut would."""
    while left := processes(root):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def numbers(root: Path) -> dict[str, Any]:
    """Everything the study measured, wall times aside: rows, results, bytes of predictions."""
    found: dict[str, Any] = {}
    for folder in sorted(root.glob("stages/*/*")):
        rows = read_jsonl(folder / "metrics.jsonl")
        found[folder.name] = {
            "rows": [{k: v for k, v in row.items() if k != "wall_s"} for row in rows],
            "metrics": (read_json(folder / "result.json") or {}).get("metrics"),
            **{p.name: p.read_bytes() for p in folder.glob("*.parquet")},
            **{p.name: p.read_bytes() for p in folder.glob("weights.safetensors")},
        }
    return found


def flaws(root: Path) -> list[str]:
    """What is not as a finished study must be, a line each."""
    found = [f"process {pid} is left: {line}" for pid, line in processes(root).items()]
    for folder in sorted(root.glob("stages/*/*")):
        name = folder.name
        result = read_json(folder / "result.json")
        if result is None:
            found.append(f"{name}: no result")
        for upstream, uid in ((result or {}).get("upstream_uids") or {}).items():
            (path,) = root.glob(f"stages/*/{upstream}/result.json")
            if (read_json(path) or {}).get("uid") != uid:
                found.append(f"{name}: made from another run of {upstream}")
        state = (read_json(folder / "status.json") or {}).get("state")
        if state != "done":
            found.append(f"{name}: status says {state}")
        done = [e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "done"]
        if len(done) != 1:
            found.append(f"{name}: {len(done)} done events")
        left = [p for n in ("lease", "claim") for p in folder.glob(f"{n}*")]
        left += [p for p in folder.rglob("*") if ".tmp" in p.name or ".partial" in p.name]
        found += [f"{path.relative_to(root)} is left" for path in left]
        for attempt in sorted((folder / "attempts").iterdir()):
            if (read_json(attempt / "attempt.json") or {}).get("end") is None:
                found.append(f"{name}: attempt {attempt.name} has no end")
    return found
