"""Kills a study at random and at chosen moments until it is done, and compares it with one that
nobody disturbed.

    python -m tests.chaos.kills --kills 200 --seed 0

One line a study with what was killed; any difference is an error and leaves the folders behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.ledger.files import read_json, read_jsonl

STUDY = """\
name: chaos
axes: {init: [random, mae]}
defaults: {data: 500, size: d16x2, dataset: scenes-2k, image_size: 24}
stages:
  mae: {duration: {steps: 250}, batch: 64, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
  wsp: {duration: {steps: 250}, batch: 64}
  transfer:
    tune: {protocol: fine_tune, duration: {steps: 120}, batch: 64, train_images: 500}
resources: {checkpoint_every: 0.05}
retry: {killed: 100000, node_fail: 100000, patience: 100000}
"""
TARGETS = ("rank", "driver", "pool", "session")
MOMENTS = ("any", "checkpoint", "row", "file")


def command(file: Path, root: Path) -> subprocess.Popen[str]:
    """`harness grid --submit` in a session of its own."""
    env = {**os.environ, "HARNESS_ROOT": str(root), "HARNESS_DEVICE": "cpu", "HARNESS_CORES": "2"}
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes(root: Path) -> dict[int, str]:
    """Every living process that belongs to a run root: pid -> its command line."""
    found, mark = {}, f"HARNESS_ROOT={root}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(path.name)] = words
    return found


def workers(root: Path) -> list[int]:
    """Ranks that run now, by what the stages' files say of them."""
    rows = (read_json(p) or {} for p in root.glob("stages/*/*/status.json"))
    pids = [int(r["pid"]) for r in rows if r.get("state") == "running" and r.get("pid")]
    return [p for p in pids if Path(f"/proc/{p}").exists()]


def await_moment(moment: str, root: Path, driver: subprocess.Popen[str], draw: Any) -> None:
    """Returns at a random time, or as soon as something is being written."""
    if moment == "any":
        end = time.monotonic() + draw.uniform(0.0, 12.0)
        while time.monotonic() < end and driver.poll() is None:
            time.sleep(0.01)
        return
    rows = {p: p.stat().st_size for p in root.glob("stages/*/*/metrics.jsonl")}
    while driver.poll() is None:
        if moment == "checkpoint" and any(root.glob("stages/*/*/checkpoints/*.partial")):
            time.sleep(draw.uniform(0.0, 0.02))
            return
        if moment == "file" and any(root.glob("stages/*/*/.*.tmp")):
            return
        if moment == "row":
            for path in root.glob("stages/*/*/metrics.jsonl"):
                if path.stat().st_size != rows.get(path):
                    return
        time.sleep(0.001)


def strike(target: str, root: Path, driver: subprocess.Popen[str]) -> bool:
    """Kills one thing; False if it is not there now."""
    pools = [p for p, words in processes(root).items() if "harness.launch.zygote" in words]
    running = workers(root)
    victims = {
        "rank": running[:1],
        "driver": [driver.pid],
        # Workers are forks of it: the oldest is the pool itself.
        "pool": sorted(set(pools) - set(running))[:1],
        "session": sorted(processes(root)),
    }[target]
    if driver.poll() is not None or not victims:
        return False
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def await_quiet(root: Path, seconds: float = 60) -> None:
    """Waits until no process of the run is left: they end by themselves, or are orphans."""
    deadline = time.monotonic() + seconds
    while found := processes(root):
        assert time.monotonic() < deadline, f"orphans: {found}"
        time.sleep(0.1)


def numbers(root: Path) -> dict[str, Any]:
    """Everything the study measured, wall times aside."""
    found: dict[str, Any] = {}
    for folder in sorted(root.glob("stages/*/*")):
        rows = read_jsonl(folder / "metrics.jsonl")
        found[folder.name] = [{k: v for k, v in r.items() if k != "wall_s"} for r in rows]
        found[folder.name].append((read_json(folder / "result.json") or {})["metrics"])
        for path in [*folder.glob("weights.safetensors"), *folder.glob("predictions.parquet")]:
            found[f"{folder.name}/{path.name}"] = path.read_bytes()
    return found


def check(root: Path, undisturbed: dict[str, Any]) -> None:
    """Raises AssertionError for anything that the kills changed or left behind."""
    now = numbers(root)
    assert now.keys() == undisturbed.keys()
    differs = [k for k in now if now[k] != undisturbed[k]]
    assert not differs, f"numbers differ: {differs}"
    for folder in root.glob("stages/*/*"):
        events = [e["event"] for e in read_jsonl(folder / "events.jsonl")]
        assert events.count("done") == 1, f"{folder.name}: {events}"
        left = [p.name for p in leftovers(folder)]
        assert not left, f"{folder.name}: left behind: {left}"
        for record in folder.glob("attempts/*"):
            about = read_json(record / "attempt.json") or {}
            assert about.get("end"), f"{record}: has no reason"


def leftovers(folder: Path) -> Iterator[Path]:
    """Locks and half-written files of a finished stage."""
    for name in ("lease", "claim", "*.takeover", "checkpoints/*.partial"):
        yield from folder.glob(name)


def torment(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Runs a study, with that many kills, in `folder`; what was killed when."""
    draw = random.Random(seed)
    file = folder / "chaos.yaml"
    file.write_text(STUDY)
    calm = command(file, folder / "calm")
    assert calm.wait() == 0, calm.communicate()[0]
    undisturbed = numbers(folder / "calm")
    shutil.rmtree(folder / "calm")
    done: Counter[str] = Counter()
    study = 0
    while done.total() < kills:
        root, study = folder / f"runs{study}", study + 1
        while True:
            driver = command(file, root)
            if done.total() < kills:
                # Every target in turn; one that was not there comes up again.
                target, moment = TARGETS[done.total() % len(TARGETS)], draw.choice(MOMENTS)
                await_moment(moment, root, driver, draw)
                if strike(target, root, driver):
                    done[f"{target} at {moment}"] += 1
            said, _ = driver.communicate()
            await_quiet(root)
            if driver.returncode == 0:
                break
            assert driver.returncode < 0 or "pool" in said, said
        check(root, undisturbed)
        again = command(file, root)
        assert again.wait() == 0
        assert "nothing to do" in again.communicate()[0]
        shutil.rmtree(root)
    return done


def main() -> None:
    """Prints what was killed; exit code 1 with the difference, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    done = torment(folder, given.kills, given.seed)
    print(f"{done.total()} kills, seed {given.seed}: {dict(done)}; same numbers every time")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
