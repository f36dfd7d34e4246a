"""Studies at a glance, read from the run tree: what `harness status` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from harness.ledger import store
from harness.ledger.states import ACTIVE, StageState, read_states
from harness.ledger.tree import Tree
from harness.study.plan import cell_state
from harness.study.stages import StageFile

ReadStates = Callable[[Tree, Mapping[str, StageFile]], dict[str, StageState]]


def summarise(
    tree: Tree, study: str | None = None, read: ReadStates = read_states
) -> dict[str, Any]:
    """All studies of a root, or one. Raises NotFoundError for a study that is not there.

    `read` may know more than the files, such as what a scheduler says of its jobs.
    """
    names = [study] if study else tree.studies()
    found = [_study(tree, n, read) for n in names]
    return {"schema": 1, "root": str(tree.root), "studies": found}


def _study(tree: Tree, name: str, read: ReadStates) -> dict[str, Any]:
    cells = store.read_cells(tree, name)
    kinds = {s: k for c in cells for s, k in c["kinds"].items()}
    stages: dict[str, StageFile] = {}
    for stage, kind in kinds.items():
        folder = tree.stage(kind, stage)
        if folder.stage.exists():
            stages[stage] = store.read_stage(folder)
    # Folders may be listed in any order; upstream stages have to be read before their dependants.
    ordered = {k: stages[k] for k in sorted(stages, key=lambda s: _depth(s, stages))}
    states = read(tree, ordered)
    shown = {s: states[s].state if s in states else "planned" for s in kinds}
    by_kind: dict[str, Counter[str]] = {}
    for stage, kind in kinds.items():
        by_kind.setdefault(kind, Counter())[shown[stage]] += 1
    return {
        "name": name,
        "cells": dict(Counter(cell_state([shown[s] for s in c["stages"].values()]) for c in cells)),
        "kinds": {k: dict(v) for k, v in by_kind.items()},
        "stages": [
            {"id": s, "kind": kinds[s], "state": shown[s], **_details(states.get(s))} for s in kinds
        ],
        "running": [_running(s, states[s]) for s in states if states[s].state in ACTIVE],
        "failed": [
            {"id": s, "state": v.state, "reason": v.reason, "message": v.message}
            for s, v in states.items()
            if v.state in ("failed", "diverged", "lost")
        ],
        "active": any(v.state in ACTIVE for v in states.values()),
        "harness_s": _overhead(states),
    }


def _depth(stage: str, stages: dict[str, StageFile]) -> int:
    upstream = [u for u in stages[stage].config.upstream.values() if u in stages]
    return 1 + max((_depth(u, stages) for u in upstream), default=-1)


def _details(state: StageState | None) -> dict[str, Any]:
    if state is None:
        return {}
    return {
        "reason": state.reason,
        "message": state.message,
        "attempt": state.status.get("attempt"),
        "metrics": (state.result or {}).get("metrics") if state.state == "done" else None,
    }


def _running(stage: str, state: StageState) -> dict[str, Any]:
    status = state.status
    rate, seen = status.get("samples_per_s"), status.get("samples")
    step, steps = status.get("step"), status.get("steps")
    eta = None
    if rate and seen and step and steps:
        eta = seen * (steps / step - 1) / rate
    keys = ("step", "steps", "samples", "samples_per_s", "loss", "attempt", "host", "started")
    keys += ("job", "memory_gib")
    return {"id": stage, **{k: status.get(k) for k in keys}, "eta_s": eta}


def _overhead(states: dict[str, StageState]) -> dict[str, float] | None:
    """Mean seconds of a finished stage, and what of it was neither training nor evaluation."""
    walls = [s.result["wall_s"] for s in states.values() if s.state == "done" and s.result]
    if not walls:
        return None
    total = sum(w["total"] for w in walls)
    harness = sum(w["harness"] for w in walls)
    return {
        "total": total / len(walls),
        "harness": harness / len(walls),
        "share": harness / total if total else 0.0,
    }
