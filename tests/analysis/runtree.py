"""Writes run trees from a known law, without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"xs": 8_000, "s": 30_000, "m": 120_000, "l": 500_000, "xl": 2_000_000}
TASKS = ("probe", "few_shot", "fine_tune")
KINDS = {"probe": "linear_probe", "few_shot": "few_shot", "fine_tune": "fine_tune"}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Loss and error are E + A N^-a + B D^-b, scaled for MAE; noise is lognormal."""

    floor: float = 1.5
    params_scale: float = 40.0
    params_exponent: float = 0.4
    data_scale: float = 60.0
    data_exponent: float = 0.5
    mae_factor: float = 0.8
    noise: float = 0.0

    def loss(self, params: float, images: float, init: str) -> float:
        factor = self.mae_factor if init == "mae" else 1.0
        tail = self.params_scale * params**-self.params_exponent
        tail += self.data_scale * images**-self.data_exponent
        return self.floor + factor * tail

    def accuracy(self, params: float, images: float, init: str) -> float:
        return 1.0 - (self.loss(params, images, init) - self.floor) / 6.0 - 0.1


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a made study has."""

    name: str = "made"
    question: str | None = "Does it work?"
    sizes: Sequence[str] = ("xs", "s", "m", "l")
    data: Sequence[int] = (1_000, 4_000, 16_000, 64_000)
    inits: Sequence[str] = ("random", "mae")
    seeds: Sequence[int] = (0, 1)
    tasks: Sequence[str] = TASKS
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    include: Sequence[Mapping[str, Any]] = ()
    """Whole cells beside the grid: their size, data, init, seed and other axes."""
    truth: Truth = Truth()
    mae_samples: int = 16_000
    wsp_samples: int = 16_000
    evals: int = 8
    state_of: Callable[[dict[str, Any], str], str] = lambda axes, role: "done"
    """(axes of the cell, role) -> state of that stage."""


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_tree(root: Path, spec: Spec) -> list[dict[str, Any]]:
    """Writes the study and its stages; returns the rows of cells.jsonl."""
    rows = []
    combos: list[dict[str, Any]] = [{}]
    for name, values in spec.extra.items():
        combos = [{**c, name: v} for c in combos for v in values]
    for extra in combos:
        for size in spec.sizes:
            for images in spec.data:
                for init in spec.inits:
                    for seed in spec.seeds:
                        axes = {"size": size, "data": images, "init": init, "seed": seed}
                        axes |= {"dataset": "scenes", "image_size": 24, **extra}
                        rows.append(_cell(root, spec, axes))
    for cell in spec.include:
        rows.append(_cell(root, spec, {"dataset": "scenes", "image_size": 24, **cell}))
    folder = root / "studies" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(f"name: {spec.name}\naxes: {{}}\n", encoding="utf-8")
    (folder / "cells.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    axes_lists = {"size": list(spec.sizes), "data": list(spec.data), "init": list(spec.inits)}
    write_json(
        folder / "resolved.json",
        {
            "schema": 1,
            "name": spec.name,
            "question": spec.question,
            "dataset": {"name": "scenes", "classes": ["a", "b"]},
            "axes": axes_lists | {"seed": list(spec.seeds), **spec.extra},
            "study": {"stages": {"transfer": {"few_shot": {"shots": [1, 5, 10]}}}},
        },
    )
    return rows


def _cell(root: Path, spec: Spec, axes: dict[str, Any]) -> dict[str, Any]:
    size, images, init, seed = axes["size"], axes["data"], axes["init"], axes["seed"]
    params = SIZES[size]
    samples = int(axes.get("wsp.duration.samples", spec.wsp_samples))
    extra = "".join(f"-{v}" for k, v in axes.items() if "." in k).replace("/", "_")
    name = f"{size}-{images}-{init}-s{seed}{extra}"
    stages, kinds, flops = {}, {}, {}
    if init == "mae":
        stages["mae"], kinds[f"{size}-full-s{seed}"] = f"{size}-full-s{seed}", "mae"
        flops["mae"] = 2.0 * params * spec.mae_samples
    stages["wsp"], kinds[f"{name}-w"] = f"{name}-w", "wsp"
    flops["wsp"] = 6.0 * params * samples
    for task in spec.tasks:
        stages[task], kinds[f"{name}-{task}"] = f"{name}-{task}", KINDS[task]
        flops[task] = 1.0 * params
    for role, stage in stages.items():
        _stage(root, spec, axes, role, stage, kinds[stage], flops[role], samples)
    return {
        "schema": 1,
        "id": f"{name}-0123456789",
        "name": name,
        "axes": axes,
        "stages": stages,
        "kinds": kinds,
        "params": params,
        "images": images,
        "flops": sum(flops.values()),
        "flops_by_role": flops,
        "tag": None,
        "parent": None,
        "set": {},
    }


def _stage(
    root: Path,
    spec: Spec,
    axes: dict[str, Any],
    role: str,
    stage: str,
    kind: str,
    flops: float,
    samples: int,
) -> None:
    folder = root / "stages" / kind / stage
    state = spec.state_of(axes, role)
    if folder.exists() or state == "planned":
        return
    folder.mkdir(parents=True)
    write_json(folder / "stage.json", {"schema": 1, "id": stage, "kind": kind, "name": stage})
    message = None if state == "done" else "as the test wants"
    reason = {"failed": "data", "diverged": "diverged"}.get(state)
    write_json(
        folder / "status.json",
        {"schema": 1, "state": state, "reason": reason, "message": message, "attempt": 1},
    )
    metrics, rows = _numbers(spec, axes, kind, stage, flops, samples)
    if state != "done":
        rows = rows[: len(rows) // 2]
    if rows:
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / "metrics.jsonl").write_text(text)
    if state == "done":
        write_json(
            folder / "result.json",
            {
                "schema": 1,
                "uid": f"uid-{stage}",
                "stage": stage,
                "kind": kind,
                "metrics": metrics,
                "samples": samples,
                "steps": samples // 128,
                "flops": flops,
                "wall_s": {"setup": 0.1, "train": 2.0, "eval": 0.2, "total": 2.5, "harness": 0.3},
                "attempts": 1,
                "upstream_uids": {},
                "harness_version": "0.1.0",
            },
        )
        if kind == "mae":
            write_pictures(folder / "reconstructions.npz")


def _numbers(
    spec: Spec,
    axes: dict[str, Any],
    kind: str,
    stage: str,
    flops: float,
    samples: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    params, images, init = SIZES[axes["size"]], axes["data"], axes["init"]
    rng = np.random.default_rng(abs(hash_of(stage)))
    noise = math.exp(spec.truth.noise * rng.standard_normal())
    loss = spec.truth.loss(params, images, init)
    if "wsp.duration.samples" in axes:
        loss += 200.0 / samples
    loss *= noise
    rows = []
    if kind in ("mae", "wsp"):
        if kind == "mae":
            loss = 0.5
        for i in range(1, spec.evals + 1):
            part = i / spec.evals
            row = {
                "step": int(samples * part) // 128,
                "samples": int(samples * part),
                "flops": flops * part,
                "wall_s": part,
                "loss": loss * (1 + 0.5 * (1 - part)),
                "lr": 1e-3,
                "grad_norm": 1.0,
            }
            # The true law at the end, half as much above it at the start.
            row["val_loss"] = loss * (1 + 0.5 * (1 - part) ** 2)
            rows.append(row)
        return {"loss": loss, "val_loss": loss, "val_floor": 0.3}, rows
    error = (1.0 - spec.truth.accuracy(params, images, init)) * noise
    accuracy = min(0.999, max(0.0, 1.0 - error))
    if kind == "few_shot":
        values = {f"acc1_{k}shot": accuracy * (0.5 + 0.05 * k) for k in (1, 5, 10)}
        return values | {f"{k}_std": 0.01 for k in values} | {"n_test": 2000}, []
    return {"acc1": accuracy, "n_test": 2000}, []


def hash_of(text: str) -> int:
    """A stable number from a name."""
    value = 0
    for char in text:
        value = (value * 131 + ord(char)) % 2**61
    return value


def write_pictures(path: Path, num: int = 8, side: int = 24) -> None:
    """Images with structure, so that a person can see that they are in the right places."""
    y, x = np.mgrid[0:side, 0:side]
    original = np.stack(
        [
            np.stack([(x * (i + 2) * 9) % 256, (y * (i + 3) * 7) % 256, (x + y) * 5 % 256], axis=-1)
            for i in range(num)
        ]
    ).astype(np.uint8)
    masked = original.copy()
    masked[:, (y // 6 + x // 6) % 4 != 0] = 127
    blurred = (masked // 2 + original // 2).astype(np.uint8)
    np.savez_compressed(path, original=original, masked=masked, reconstructed=blurred)
