"""Studies at a glance, read from the run tree: what `harness status` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from harness.ledger import attempts
from harness.ledger.index import Row, row_of
from harness.ledger.lease import stands_still_s
from harness.ledger.states import ACTIVE, Node, StageState, read_graph
from harness.ledger.study_graph import StudyGraph, read_study
from harness.ledger.tree import Tree
from harness.study.cell_states import cell_state

Read = Callable[[Tree, Mapping[str, Node]], dict[str, StageState]]


def summarise(
    tree: Tree, study: str | None = None, read: Read = read_graph, most: int | None = None
) -> dict[str, Any]:
    """All studies of a root, or one. Raises NotFoundError for a study that is not there.

    `read` may know more than the files, such as what a scheduler says of its jobs. `most`: no more
    `stages` of a kind and state, and no more submitted ones, are listed than that.
    """
    names = [study] if study else tree.studies()
    known = {name: read_study(tree, name) for name in names}
    # One graph of all: a scheduler is asked once.
    graph = {stage: node for found in known.values() for stage, node in found.nodes.items()}
    states = read(tree, graph)
    studies = [_study(tree, name, found, states, most) for name, found in known.items()]
    return {"schema": 1, "root": str(tree.root), "studies": studies}


def _study(
    tree: Tree,
    name: str,
    graph: StudyGraph,
    all_states: Mapping[str, StageState],
    most: int | None,
) -> dict[str, Any]:
    nodes = graph.nodes
    states: dict[str, StageState] = {}
    shown: dict[str, str] = {}
    by_kind: dict[str, dict[str, int]] = {}
    listed: list[str] = []
    running: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    active = submitted = 0
    # One plain loop: a study may have forty thousand stages.
    for stage, node in nodes.items():
        kind = node.kind
        value = states[stage] = all_states[stage]
        state = shown[stage] = value.state
        counts = by_kind.get(kind)
        if counts is None:
            counts = by_kind[kind] = {}
        number = counts[state] = counts.get(state, 0) + 1
        if most is None or number <= most:
            listed.append(stage)
        if state in ACTIVE:
            active += 1
            submitted += state == "submitted"
            if state != "submitted" or most is None or submitted <= most:
                running.append(_running(tree, stage, kind, value))
        elif state in ("failed", "diverged", "lost"):
            about = {"reason": value.reason, "message": value.message}
            about["attempt"] = value.status.get("attempt")
            failed.append({"id": stage, "state": state, **about})
    return {
        "name": name,
        "cells": _cell_states(graph.cells, shown),
        "kinds": by_kind,
        "stages": [_listed(s, nodes[s], states[s], shown) for s in listed],
        "running": running,
        "failed": failed,
        "active": bool(active),
        "harness_s": _overhead(states),
    }


def _cell_states(cells: list[tuple[str, ...]], shown: Mapping[str, str]) -> dict[str, int]:
    """Cells by state, in the order in which states come up."""
    alike = Counter([tuple([shown[s] for s in cell]) for cell in cells])
    found: dict[str, int] = {}
    for states, number in alike.items():
        state = cell_state(list(states))
        found[state] = found.get(state, 0) + number
    return found


def _listed(stage: str, node: Node, own: StageState, shown: Mapping[str, str]) -> dict[str, Any]:
    is_done = own.state == "done"
    return {
        "id": stage,
        "kind": node.kind,
        "state": own.state,
        "reason": own.reason,
        "message": own.message,
        "attempt": own.status.get("attempt"),
        "metrics": own.result.get("metrics") if is_done and own.result else None,
        "waits_for": [] if is_done else [u for u in node.upstream if shown.get(u) != "done"],
    }


def _running(tree: Tree, stage: str, kind: str, state: StageState) -> dict[str, Any]:
    status = state.status
    rate, seen = status.get("samples_per_s"), status.get("samples")
    step, steps = status.get("step"), status.get("steps")
    eta = None
    if rate and seen and step and steps:
        eta = seen * (steps / step - 1) / rate
    keys = ("step", "steps", "samples", "samples_per_s", "loss", "attempt", "host", "started")
    keys += ("job", "token", "pid", "memory_gib")
    found = {k: status.get(k) for k in keys}
    folder = tree.stage(kind, stage)
    last = attempts.last_failure(folder, int(status.get("attempt") or 1))
    still = stands_still_s(folder.lease) if state.state == "running" else None
    found |= {"eta_s": eta, "stands_still_s": still, "last_failure": last}
    found["queue_reason"] = state.message if state.state == "submitted" else None
    return {"id": stage, "state": state.state, **found}


def _overhead(states: dict[str, StageState]) -> dict[str, float] | None:
    """Mean seconds of a finished stage, and what of it was neither training nor evaluation."""
    kept = [s.kept for s in states.values() if s.state == "done"]
    rows = [r if isinstance(r, Row) else row_of(r) for r in kept if r]
    rows = [row for row in rows if row.total_s is not None]
    if not rows:
        return None
    total = sum([row.total_s for row in rows])
    harness = sum([row.harness_s or 0.0 for row in rows])
    return {
        "total": total / len(rows),
        "harness": harness / len(rows),
        "share": harness / total if total else 0.0,
    }
