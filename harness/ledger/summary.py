"""Studies at a glance, read from the run tree: what `harness status` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from harness.ledger import cell_rows
from harness.ledger.files import read_json
from harness.ledger.states import ACTIVE, Node, StageState, graph_of_rows, read_graph
from harness.ledger.tree import Tree
from harness.study.cell_states import cell_state

Read = Callable[[Tree, Mapping[str, Node]], dict[str, StageState]]


def summarise(
    tree: Tree, study: str | None = None, read: Read = read_graph, most: int | None = None
) -> dict[str, Any]:
    """All studies of a root, or one. Raises NotFoundError for a study that is not there.

    `read` may know more than the files, such as what a scheduler says of its jobs. `most`: no more
    `stages` of a kind and state are listed than that.
    """
    names = [study] if study else tree.studies()
    rows = {name: cell_rows.read_cells(tree, name) for name in names}
    # One graph of all: a scheduler is asked once.
    graph = graph_of_rows(row for found in rows.values() for row in found)
    states = read(tree, graph)
    studies = [_study(tree, name, found, graph, states, most) for name, found in rows.items()]
    return {"schema": 1, "root": str(tree.root), "studies": studies}


def _study(
    tree: Tree,
    name: str,
    cells: list[dict[str, Any]],
    graph: Mapping[str, Node],
    all_states: Mapping[str, StageState],
    most: int | None,
) -> dict[str, Any]:
    kinds = {s: graph[s].kind for c in cells for s in c["stages"].values()}
    states: dict[str, StageState] = {}
    shown: dict[str, str] = {}
    by_kind: dict[str, dict[str, int]] = {}
    listed: list[str] = []
    running: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    # One plain loop: a study may have forty thousand stages.
    for stage, kind in kinds.items():
        value = states[stage] = all_states[stage]
        state = shown[stage] = value.state
        counts = by_kind.get(kind)
        if counts is None:
            counts = by_kind[kind] = {}
        number = counts[state] = counts.get(state, 0) + 1
        if most is None or number <= most:
            listed.append(stage)
        if state in ACTIVE:
            running.append(_running(tree, stage, kind, value))
        elif state in ("failed", "diverged", "lost"):
            about = {"reason": value.reason, "message": value.message}
            failed.append({"id": stage, "state": state, **about})
    return {
        "name": name,
        "cells": _cell_states(cells, shown),
        "kinds": by_kind,
        "stages": [
            {
                **{"id": s, "kind": kinds[s], "state": shown[s], **_details(states[s])},
                "waits_for": [
                    u for u in graph[s].upstream if shown[s] != "done" and shown.get(u) != "done"
                ],
            }
            for s in listed
        ],
        "running": running,
        "failed": failed,
        "active": bool(running),
        "harness_s": _overhead(states),
    }


def _cell_states(cells: list[dict[str, Any]], shown: Mapping[str, str]) -> dict[str, int]:
    """Cells by state, in the order in which states come up."""
    alike = Counter(tuple([shown[s] for s in cell["stages"].values()]) for cell in cells)
    found: dict[str, int] = {}
    for states, number in alike.items():
        state = cell_state(list(states))
        found[state] = found.get(state, 0) + number
    return found


def _details(state: StageState) -> dict[str, Any]:
    return {
        "reason": state.reason,
        "message": state.message,
        "attempt": state.status.get("attempt"),
        "metrics": (state.result or {}).get("metrics") if state.state == "done" else None,
    }


def _running(tree: Tree, stage: str, kind: str, state: StageState) -> dict[str, Any]:
    status = state.status
    rate, seen = status.get("samples_per_s"), status.get("samples")
    step, steps = status.get("step"), status.get("steps")
    eta = None
    if rate and seen and step and steps:
        eta = seen * (steps / step - 1) / rate
    keys = ("step", "steps", "samples", "samples_per_s", "loss", "attempt", "host", "started")
    keys += ("job", "memory_gib")
    found = {k: status.get(k) for k in keys}
    # What ended the attempt before this one.
    last = None
    attempt = int(status.get("attempt") or 1)
    before = read_json(tree.stage(kind, stage).attempt(attempt - 1) / "attempt.json")
    if before is not None and before.get("end"):
        last = {"reason": before["end"], "message": before.get("message")}
    return {"id": stage, "state": state.state, **found, "eta_s": eta, "last_failure": last}


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
