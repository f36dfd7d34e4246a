"""What the report of a large study costs: 10,000 cells with 1,000 curve points each.

    python benchmarks/report.py [--root FOLDER] [--out FILE.json]

The run tree is made up, its files are as the worker writes them: a row of metrics.jsonl per logged
step, with a validation loss in each (more than a real run has). It is kept in FOLDER for the next
time. The report is a process of its own. Its wall time depends on who else uses the machine, so the
load average is kept beside it; `user_s` and `system_s` are the time that its threads were at work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from harness.metric_columns import write_columns
from harness.study.flops import encoder_params
from harness.study.recipes import Model
from harness.study.sizes import SIZES

BATCH = 64
SMALL = [name for name, size in SIZES.items() if size.patch == 4]
SHAPES = {
    "grid": {"sizes": 8, "data": 25, "seeds": 25, "rates": 1},
    "rates": {"sizes": 5, "data": 5, "seeds": 20, "rates": 10},
}
"""Two studies of 10,000 cells, 2 inits each: of size and data alone, and with a further axis."""
STUDY = """\
name: large
axes: {axes}
defaults: {{dataset: scenes-{images}, image_size: 24}}
stages:
  mae: {{data: full, duration: {{samples: {samples}}}, batch: {batch}}}
  wsp: {{duration: {{samples: {samples}}}, batch: {batch}}}
  transfer: {{probe: {{protocol: linear_probe}}}}
"""


def write_tree(root: Path, points: int, sizes: int, data: int, seeds: int, rates: int) -> int:
    """Writes study and stages; returns the number of cells."""
    params = {name: _params(name) for name in SMALL[:sizes]}
    axes = {
        "size": list(params),
        "data": [round(500 * 1.5**k) for k in range(data)],
        "init": ["random", "mae"],
        "seed": list(range(seeds)),
        "wsp.lr": [round(0.0005 * (k + 1), 4) for k in range(rates)],
    }
    rows = []
    for size, data, init, seed, lr in product(*axes.values()):
        values = (size, data, init, seed, lr)
        rows.append(_cell(root, dict(zip(axes, values, strict=True)), params[size], points))
    folder = root / "studies" / "large"
    folder.mkdir(parents=True, exist_ok=True)
    text = STUDY.format(
        axes=json.dumps(axes), images=axes["data"][-1], samples=points * BATCH, batch=BATCH
    )
    (folder / "study.yaml").write_text(text)
    _write(folder / "resolved.json", {"schema": 1, "name": "large", "question": None, "axes": axes})
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _params(name: str) -> int:
    size = SIZES[name]
    shape = {"width": size.width, "depth": size.depth, "heads": size.heads}
    return encoder_params(Model(**shape, patch=size.patch, image_size=24))


def _cell(root: Path, axes: dict[str, Any], params: int, points: int) -> dict[str, Any]:
    size, data, init, seed = axes["size"], axes["data"], axes["init"], axes["seed"]
    samples = points * BATCH
    name = f"{size}-{data}-{init}-lr{axes['wsp.lr']:g}-s{seed}"
    ends = np.random.default_rng(zlib.crc32(name.encode()))
    noise, tilt = float(ends.normal(0, 0.01)), math.log10(axes["wsp.lr"] / 0.002)
    floor = 1.5 + 40 * params**-0.4 + 60 * data**-0.5 + 0.1 * tilt**2 - 0.1 * (init == "mae")
    stages, kinds, flops, upstream = {}, {}, {}, {}
    if init == "mae":
        stages["mae"] = f"{size}-full-s{seed}"
        kinds[stages["mae"]], flops["mae"] = "mae", 2.0 * params * samples
        upstream[stages["mae"]] = []
    stages["wsp"] = name
    kinds[name], flops["wsp"] = "wsp", 6.0 * params * samples
    upstream[name] = [stages["mae"]] if init == "mae" else []
    probe = f"{name}-probe"
    stages["probe"], kinds[probe], flops["probe"] = probe, "linear_probe", 1.0 * params
    upstream[probe] = [name]
    for role, stage in stages.items():
        about = {"kind": kinds[stage], "size": size, "uid": f"uid-{stage}", "stage": stage}
        _stage(root, about, upstream[stage], flops[role], floor + noise, points)
    return {
        **{"schema": 1, "id": f"{name}-0123456789", "name": name, "axes": axes},
        **{"stages": stages, "kinds": kinds, "upstream": upstream, "params": params},
        **{"images": data, "flops": sum(flops.values()), "flops_by_role": flops},
        **{"tag": None, "parent": None, "set": {}},
    }


def _stage(
    root: Path, about: dict[str, str], upstream: list[str], flops: float, loss: float, points: int
) -> None:
    kind = about["kind"]
    folder = root / "stages" / kind / about["stage"]
    if folder.exists():
        return
    (folder / "attempts" / "1").mkdir(parents=True)
    versions = {"harness": "0.1.0", "torch": "2.15.0"}
    ended = {"schema": 1, "attempt": 1, "end": "done", "host": "made-up", "versions": versions}
    _write(folder / "attempts" / "1" / "attempt.json", ended)
    _write(folder / "attempts" / "1" / "git.json", {"schema": 1, "sha": "0" * 40, "dirty": False})
    status = {"schema": 1, "state": "done", "attempt": 1, "reason": None, "message": None}
    _write(folder / "status.json", status)
    if kind != "linear_probe":
        (folder / "metrics.jsonl").write_text(_curve(loss, flops, points))
        write_columns(folder / "metrics.jsonl")
    metrics = {"acc1": 1 - loss / 6} if kind == "linear_probe" else {"loss": loss, "val_loss": loss}
    result = {
        **{"schema": 1, **about, "metrics": metrics},
        **{"samples": points * BATCH, "steps": points, "flops": flops, "attempts": 1},
        **{"wall_s": {"total": 3.0}, "device": "cpu", "processes": 1, "harness_version": "0.1.0"},
        "upstream_uids": {u: f"uid-{u}" for u in upstream},
    }
    _write(folder / "result.json", result)


def _curve(loss: float, flops: float, points: int) -> str:
    part = np.arange(1, points + 1) / points
    jitter = np.random.default_rng(round(loss * 1e9)).normal(0, 0.02, (3, points))
    columns = (
        *(range(1, points + 1), range(BATCH, points * BATCH + 1, BATCH)),
        *(c.tolist() for c in (90 * part, loss * (1 + 0.5 * (1 - part) ** 2) + jitter[0])),
        *(c.tolist() for c in (0.004 * np.cos(part), 0.5 + jitter[1], flops * part)),
        (loss * (1 + 0.5 * (1 - part) ** 2) + jitter[2] * (1 - part)).tolist(),
    )
    row = (
        '{"step": %d, "samples": %d, "wall_s": %r, "loss": %r, "lr": %r, "grad_norm": %r,'
        ' "flops": %r, "val_loss": %r}\n'
    )
    return "".join([row % values for values in zip(*columns, strict=True)])


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def measure(root: Path, out: Path) -> dict[str, float]:
    """Seconds and memory of one report."""
    code = "import sys; from pathlib import Path; from analysis.report import build;"
    code += "build(Path(sys.argv[1]), 'large', Path(sys.argv[2]))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(root), str(out)], check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": round(wall, 1),
        "user_s": round(after.ru_utime - before.ru_utime, 1),
        "system_s": round(after.ru_stime - before.ru_stime, 1),
        "peak_gib": round(after.ru_maxrss / 2**20, 2),
    }


def shape_of(name: str, root: Path, points: int, part: float) -> dict[str, Any]:
    """Writes the tree if it is not there, makes the report, says what both are and what it took."""
    shape = dict(SHAPES[name])
    shape["seeds"] = max(1, round(shape["seeds"] * part))
    if not (root / "studies" / "large" / "cells.jsonl").is_file():
        write_tree(root, points, **shape)
    with open(root / "studies" / "large" / "cells.jsonl") as lines:
        cells = sum(1 for _ in lines)
    curves = [p.stat().st_size for p in root.glob("stages/*/*/metrics.jsonl")]
    with tempfile.TemporaryDirectory() as out:
        found = measure(root, Path(out))
        written = sorted(p for p in (Path(out) / "large").iterdir() if p.is_file())
        files = {p.name: p.stat().st_size for p in written}
    about = {"cells": cells, "curve_rows": len(curves) * points, "curve_bytes": sum(curves)}
    return {"shape": shape, **about, **found, "file_bytes": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--part", type=float, default=1.0, help="share of the seeds")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--root", type=Path, help="where the run trees are kept for the next time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/report.json"))
    arguments = parser.parse_args()
    results = {}
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.shapes:
            root = (arguments.root or Path(folder)) / name
            results[name] = shape_of(name, root, arguments.points, arguments.part)
    report = {
        "results": results,
        "machine": machine("numpy", "pandas", "pyarrow", "matplotlib"),
        "others": {"load_before": load, "load_after": round(os.getloadavg()[0], 1)},
    }
    text = json.dumps(report, indent=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
