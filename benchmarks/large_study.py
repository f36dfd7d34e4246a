"""What a study of ten thousand cells costs: plans, status, and a driver that waits.

    python benchmarks/large_study.py --out benchmarks/results/large_study.json
    python benchmarks/large_study.py --check       # exit code 1 where a limit is missed

Whole commands are timed, start of Python included, best of a few: with an empty run tree, and with
one in which half of the stages are done, written by the functions that the worker uses. Then the
study is submitted on one core, and the driver's own CPU time is taken while its stage runs. Last,
a thousand stages stand in the queue of a Slurm of scripts that counts how often it is asked. Limits
are of CPU time: that of a command on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from harness.ledger import store
from harness.ledger.files import write_json
from harness.ledger.tree import Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study

STUDY = """\
name: large
axes:
  seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]
  size: [d16x2, d32x3, d64x4, ti]
  data: [500, 1k, 2k, 3k, 4k]
  init: [random, mae]
  wsp.lr: [0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0007, 0.0008, 0.0009, 0.001]
defaults: {dataset: scenes-4k, image_size: 24, patch: 4}
stages:
  mae: {duration: {samples: 1M}, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
  wsp: {duration: {samples: 1M}}
  transfer:
    probe: {protocol: linear_probe}
    few: {protocol: few_shot}
"""


LIMITS_S = {"grid": 2.0, "status": 1.0}
"""CPU seconds of a plan and of `status`."""
DRIVER_SHARE = 0.02
IN_QUEUE = 1000


def command(root: Path, *arguments: str) -> list[str]:
    """A verb of the command line on a run root."""
    return [sys.executable, "-m", "harness.cli.main", *arguments, "--root", str(root)]


def cost(root: Path, *arguments: str, repeats: int) -> dict[str, float]:
    """Least wall time and CPU time of a command, and its largest memory, over the repeats."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run(command(root, *arguments), check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append((wall, cpu))
    return {"wall_s": min(f[0] for f in found), "cpu_s": min(f[1] for f in found)}


def finish_half(tree: Tree, grid: Grid) -> int:
    """Every second cell's stages are done, by the functions that write them; how many."""
    chosen = {s for cell in grid.cells[::2] for s in cell.stages.values()}
    wanted = [s for s in grid.stages.values() if s.id in chosen][: len(grid.stages) // 2]
    for stage in wanted:
        folder = store.write_stage(tree, stage)
        wall = {"train": 2.0, "eval": 0.5, "total": 3.0, "harness": 0.5}
        about: dict[str, Any] = {
            "schema": 1,
            "uid": f"uid-{stage.id}",
            "stage": stage.id,
            "kind": stage.kind,
            "size": stage.config.size,
            "metrics": {"accuracy": 0.5, "loss": 1.25},
            "flops": stage.flops,
            "wall_s": wall,
            "device": "cpu",
            "processes": 1,
            "attempts": 1,
            "upstream_uids": {u: f"uid-{u}" for u in stage.config.upstream.values()},
        }
        write_json(folder.result, about)
        write_json(folder.status, {"schema": 1, "state": "done", "attempt": 1})
    return len(wanted)


def driver_share(root: Path, file: Path, settle_s: float, watch_s: float) -> float:
    """CPU time of a waiting driver, as a share of the time it waits; its workers left out."""
    env = {**os.environ, "HARNESS_DEVICE": "cpu", "HARNESS_CORES": "1"}
    driver = subprocess.Popen(
        command(root, "grid", str(file), "--submit"),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not any(b'"step"' in p.read_bytes() for p in root.glob("stages/*/*/status.json")):
            assert driver.poll() is None and time.monotonic() < deadline, "no stage began"
            time.sleep(1.0)
        time.sleep(settle_s)
        before, began = _cpu_s(driver.pid), time.monotonic()
        time.sleep(watch_s)
        return (_cpu_s(driver.pid) - before) / (time.monotonic() - began)
    finally:
        driver.send_signal(signal.SIGINT)
        driver.wait(120)


def _cpu_s(pid: int) -> float:
    """User and system time of one process, its children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measures, prints, and writes the numbers where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--watch-s", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="Compare with the limits.")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder) / "runs", Path(folder) / "large.yaml"
        file.write_text(STUDY)
        tree, grid = Tree(root), build_grid(load_study(file))
        results["start of Python, --help"] = cost(root, "status", "--help", repeats=given.repeats)
        store.register(tree, grid, [])
        for name in ("empty", "half done"):
            if name == "half done":
                finish_half(tree, grid)
            for verb in (["grid", str(file)], ["status", "large"]):
                for flags in ([], ["--json"]):
                    key = f"{name}: {verb[0]} {' '.join(flags)}".strip()
                    if name == "half done" and verb[0] == "status" and not flags:
                        (root / "index").exists() and _without_index(results, root, given.repeats)
                    results[key] = cost(root, *verb, *flags, repeats=given.repeats)
                    print(f"{key:<28}{results[key]['wall_s']:8.2f} s", flush=True)
        share = driver_share(root, file, settle_s=20.0, watch_s=given.watch_s)
        results["driver, waiting"] = {"cpu_share": share}
        print(f"driver, waiting             {share:8.2%} of a core")
        in_queue(tree, grid, Path(folder), results, given.repeats)
    found = {
        "cells": len(grid.cells),
        "stages": len(grid.stages),
        "repeats": given.repeats,
        "shown": "best of the repeats",
        "results": results,
        "machine": machine(),
    }
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    late = missed(results)
    print("\n".join(late) or "all limits are kept")
    if given.check and late:
        sys.exit(1)


def missed(results: dict[str, Any]) -> list[str]:
    """Limits that were not kept, a line each."""
    found = []
    for key, row in results.items():
        verb = key.partition(": ")[2].partition(" ")[0]
        if verb in LIMITS_S and "no index" not in key and row["cpu_s"] > LIMITS_S[verb]:
            found.append(f"{key}: {row['cpu_s']:.2f} s of CPU time, limit {LIMITS_S[verb]} s")
        if row.get("squeue", 1.0) > 1:
            found.append(f"{key}: asked squeue {row['squeue']:g} times, limit 1")
        if row.get("cpu_share", 0.0) > DRIVER_SHARE:
            found.append(f"{key}: {row['cpu_share']:.2%} of a core, limit {DRIVER_SHARE:.0%}")
    return found


def in_queue(tree: Tree, grid: Grid, folder: Path, results: dict[str, Any], repeats: int) -> None:
    """`status` and `cancel --dry-run` with jobs in the queue of a Slurm that counts questions."""
    bin_, calls, queue = folder / "bin", folder / "calls", folder / "queue"
    bin_.mkdir()
    for name, says in (("squeue", f"echo >>{calls}; cat {queue}"), ("scontrol", "exit 1")):
        (bin_ / name).write_text(f"#!/bin/sh\n{says}\n")
        (bin_ / name).chmod(0o755)
    idle = [s for s in grid.stages.values() if not tree.stage(s.kind, s.id).path.exists()]
    for number, stage in enumerate(idle[:IN_QUEUE]):
        about = {"schema": 1, "state": "submitted", "attempt": 1, "job": str(number)}
        write_json(store.write_stage(tree, stage).status, about)
    lines = ["\x1f".join((str(n), "PENDING", "token.0", "None")) for n in range(IN_QUEUE)]
    queue.write_text("\n".join(lines) + "\n")
    os.environ["PATH"] = f"{bin_}:{os.environ['PATH']}"
    for verb in (["status", "large"], ["cancel", "init=mae", "--dry-run"]):
        key = f"in the queue: {' '.join(verb)}"
        calls.write_text("")
        results[key] = cost(tree.root, *verb, repeats=repeats)
        results[key]["squeue"] = len(calls.read_text().splitlines()) / repeats
        print(f"{key:<28}{results[key]['wall_s']:8.2f} s, {results[key]['squeue']:g} x squeue")


def _without_index(results: dict[str, Any], root: Path, repeats: int) -> None:
    """The first look at a tree, before its results are in the index."""
    found = []
    for _ in range(repeats):
        for path in (root / "index").iterdir():
            path.unlink()
        found.append(cost(root, "status", "large", repeats=1))
    results["half done: status, no index"] = min(found, key=lambda f: f["wall_s"])


if __name__ == "__main__":
    main()
