"""The run tree as tidy frames. A stage that is not done has its state and never a number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.ledger import store
from harness.ledger.files import read_json
from harness.ledger.states import FAILED, read_state
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import TUNE
from harness.study.expand import same
from harness.study.measures import MEASURES
from harness.study.plan import cell_state
from harness.units import format_count

CORE = ("size", "data", "init", "seed")
"""Axes every report knows; all others that vary make the `variant` of a cell."""

_CELL_COLUMNS = (
    *("cell", "name", "size", "params", "data", "init", "seed", "variant", "pair", "axes"),
    *("parent", "tag", "set", "state", "why", "flops", "flops_mae", "flops_wsp"),
    *("flops_pretrain", "wall_s", "attempts", "stages"),
)
_RESULT_COLUMNS = (
    *("cell", "name", "size", "params", "data", "init", "seed", "variant", "pair", "parent"),
    *("flops_mae", "flops_wsp", "flops_pretrain"),
    *("task", "kind", "metric", "value", "state", "stage"),
)


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What the files of one stage say."""

    id: str
    kind: str
    folder: StageFolder
    state: str
    reason: str | None = None
    message: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """One study as frames.

    cells: a row per cell: axes, state, costs. results: a row per cell x task metric (`value` is
    NaN unless the stage is done). curves: a row per metrics row x stage, with the cells it serves.
    """

    name: str
    root: Path
    question: str | None
    resolved: Mapping[str, Any]
    study_file: str
    cells: pd.DataFrame
    results: pd.DataFrame
    curves: pd.DataFrame
    stages: Mapping[str, StageFacts]
    varying: tuple[str, ...]
    """Axes beyond size, data, init and seed that take more than one value in the grid."""
    notes: tuple[str, ...]
    """Oddities met while reading: torn or broken lines, unreadable files."""

    @property
    def grid(self) -> pd.DataFrame:
        """Cells of the study file itself, ablations left out."""
        return self.cells[self.cells["parent"].isna()]

    @property
    def grid_results(self) -> pd.DataFrame:
        """Results of the study file's own cells."""
        return self.results[self.results["parent"].isna()]


def load(root: Path, study: str) -> StudyData:
    """Reads one study. Raises NotFoundError, naming the studies there are."""
    tree = Tree(root)
    # Trials of a search have a section of their own; see analysis.tuning.
    rows = [r for r in store.read_cells(tree, study) if r["tag"] != TUNE]
    folder = tree.study(study)
    resolved = read_json(folder / "resolved.json") or {}
    study_file = folder / "study.yaml"
    notes: list[str] = []
    stages = _read_stages(tree, rows, notes)
    varying = _varying([r for r in rows if not r.get("parent")])
    axes = resolved.get("axes") or {}
    defaults = (resolved.get("study") or {}).get("defaults") or {}
    defaults = {name: value for name, value in defaults.items() if name not in axes}
    cells = _cells_frame(rows, stages, varying, defaults)
    return StudyData(
        name=study,
        root=root,
        question=resolved.get("question"),
        resolved=resolved,
        study_file=study_file.read_text("utf-8", "replace") if study_file.is_file() else "",
        cells=cells,
        results=_results_frame(rows, cells, stages, resolved),
        curves=_curves_frame(rows, cells, stages, notes),
        stages=stages,
        varying=varying,
        notes=tuple(notes),
    )


# -- stages ---------------------------------------------------------------------------------


def _read_stages(
    tree: Tree, rows: Iterable[Mapping[str, Any]], notes: list[str]
) -> dict[str, StageFacts]:
    """Facts by stage id; a cell lists its stages in dependency order, so upstream comes first."""
    facts: dict[str, StageFacts] = {}
    for row in rows:
        for stage_id in row["stages"].values():
            if stage_id not in facts:
                own = _read_stage(tree, stage_id, row["kinds"][stage_id], notes)
                upstream = [facts[u] for u in _upstream(row, stage_id) if u in facts]
                facts[stage_id] = _in_chain(own, upstream, facts)
    return facts


def _upstream(row: Mapping[str, Any], stage_id: str) -> list[str]:
    """Stages that a stage of the cell starts from."""
    if "upstream" in row:
        return row["upstream"][stage_id]
    # Rows of before 0.5 do not say: every stage starts from those of pretraining.
    stages = row["stages"]
    before = [stages[role] for role in ("mae", "wsp") if role in stages]
    return before[: before.index(stage_id)] if stage_id in before else before


def _read_stage(tree: Tree, stage_id: str, kind: str, notes: list[str]) -> StageFacts:
    folder = tree.stage(kind, stage_id)
    try:
        own = read_state(folder)
    except UserError as error:
        notes.append(str(error))
        return StageFacts(
            id=stage_id, kind=kind, folder=folder, state="failed", reason="unreadable"
        )
    return StageFacts(
        id=stage_id,
        kind=kind,
        folder=folder,
        state=own.state,
        reason=own.reason,
        message=own.message,
        result=own.result or {},
        attempts=len(folder.attempt_numbers()) or int((own.result or {}).get("attempts", 0)),
    )


def _in_chain(
    own: StageFacts, upstream: list[StageFacts], facts: Mapping[str, StageFacts]
) -> StageFacts:
    """The stage's state given its upstream: a result of an upstream run that is gone is stale."""
    uids = own.result.get("upstream_uids") or {}
    known = {u: facts[u] for u in uids if u in facts}
    fresh = all(u.state == "done" for u in upstream)
    fresh &= all(f.state == "done" and f.result.get("uid") == uids[u] for u, f in known.items())
    state, reason, message = own.state, own.reason, own.message
    if state == "done" and not fresh:
        state, reason, message = "planned", "stale", "its upstream stage was run again since"
    failed = [u for u in upstream if u.state in FAILED]
    if failed and state in ("planned", "waiting", "blocked"):
        state, reason = "blocked", "upstream"
        message = f"{failed[0].id} {failed[0].state}"
    if (state, reason) == (own.state, own.reason):
        return own
    return StageFacts(
        id=own.id,
        kind=own.kind,
        folder=own.folder,
        state=state,
        reason=reason,
        message=message,
        attempts=own.attempts,
    )


# -- cells ----------------------------------------------------------------------------------


def _varying(rows: list[Mapping[str, Any]]) -> tuple[str, ...]:
    values: dict[str, set[str]] = {}
    names = {name for row in rows for name in row["axes"] if name not in CORE}
    for name in names:
        values[name] = {json.dumps(row["axes"].get(name), sort_keys=True) for row in rows}
    return tuple(sorted(name for name, found in values.items() if len(found) > 1))


def axis_label(value: Any) -> str:
    """An axis value as a person reads it."""
    if isinstance(value, Mapping):
        return " ".join(f"{axis_label(v)} {k}" for k, v in value.items())
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return format_count(value) if value > 0 else str(value)


def _variant(axes: Mapping[str, Any], names: Iterable[str], defaults: Mapping[str, Any]) -> str:
    """What sets a cell apart from the study's main grid; empty for the main grid.

    `defaults` has no key that is an axis of the grid: those have no main value.
    """
    odd = [n for n in names if n in axes and not (n in defaults and same(axes[n], defaults[n]))]
    return ", ".join(f"{n} = {axis_label(axes[n])}" for n in odd)


def _variant_order(axes: Mapping[str, Any], names: Iterable[str]) -> list[tuple[float, str]]:
    """Absent first, then numbers by size, then words by alphabet."""
    values = [axes.get(n, -math.inf) for n in names]
    return [(float(v), "") if isinstance(v, (int, float)) else (math.inf, str(v)) for v in values]


def _cells_frame(
    rows: list[dict[str, Any]],
    stages: Mapping[str, StageFacts],
    varying: tuple[str, ...],
    defaults: Mapping[str, Any],
) -> pd.DataFrame:
    out = []
    for row in sorted(rows, key=lambda r: _variant_order(r["axes"], varying)):
        axes, flops = row["axes"], row.get("flops_by_role", {})
        chain = [stages[s] for s in row["stages"].values()]
        wrong = next((s for s in chain if s.state not in ("done", "planned", "waiting")), None)
        wall = [float(s.result.get("wall_s", {}).get("total", math.nan)) for s in chain]
        out.append(
            {
                "cell": row["id"],
                "name": row["name"],
                "size": str(axes.get("size")),
                "params": float(row["params"]),
                "data": float(row["images"]),
                "init": str(axes.get("init")),
                "seed": axes.get("seed", 0),
                "variant": _variant(axes, varying, defaults),
                # All axes but init: two cells with the same key are a pair.
                "pair": json.dumps({k: v for k, v in axes.items() if k != "init"}, sort_keys=True),
                "axes": axes,
                "parent": row.get("parent"),
                "tag": row.get("tag"),
                "set": row.get("set") or {},
                "state": cell_state([s.state for s in chain]),
                "why": _why(wrong),
                "flops": float(row["flops"]),
                "flops_mae": float(flops.get("mae", 0.0)),
                "flops_wsp": float(flops.get("wsp", 0.0)),
                "flops_pretrain": float(flops.get("mae", 0.0)) + float(flops.get("wsp", 0.0)),
                "wall_s": sum(w for w in wall if math.isfinite(w)),
                "attempts": sum(s.attempts for s in chain),
                "stages": row["stages"],
            }
        )
    frame = pd.DataFrame(out, columns=None if out else list(_CELL_COLUMNS))
    rank = {name: i for i, name in enumerate(dict.fromkeys(frame["variant"]))}
    order = ["variant", "params", "data", "init", "seed"]
    return frame.sort_values(
        order, key=lambda c: c.map(rank) if c.name == "variant" else c, ignore_index=True
    )


def _why(stage: StageFacts | None) -> str:
    if stage is None:
        return ""
    reason = f" ({stage.reason})" if stage.reason and stage.reason != stage.state else ""
    message = f": {stage.message}" if stage.message else ""
    return f"{stage.kind} {stage.state}{reason}{message}"


# -- results --------------------------------------------------------------------------------


def _results_frame(
    rows: list[dict[str, Any]],
    cells: pd.DataFrame,
    stages: Mapping[str, StageFacts],
    resolved: Mapping[str, Any],
) -> pd.DataFrame:
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        for role, stage_id in row["stages"].items():
            found = names.setdefault(role, dict.fromkeys(_expected(role, row, stage_id, resolved)))
            found.update(dict.fromkeys(_numbers(stages[stage_id])))
    about = cells.set_index("cell")
    keep = _RESULT_COLUMNS[1 : _RESULT_COLUMNS.index("task")]
    out = []
    for row in rows:
        base = {"cell": row["id"], **{k: about.at[row["id"], k] for k in keep}}
        for role, stage_id in row["stages"].items():
            stage = stages[stage_id]
            numbers = _numbers(stage)
            for metric in names[role]:
                value = numbers.get(metric, math.nan)
                state = stage.state
                if state == "done" and not math.isfinite(value):
                    state = "absent"
                facts = {"task": role, "kind": stage.kind, "metric": metric, "value": value}
                out.append({**base, **facts, "state": state, "stage": stage_id})
    return pd.DataFrame(out, columns=list(_RESULT_COLUMNS))


def _expected(
    role: str, row: Mapping[str, Any], stage_id: str, resolved: Mapping[str, Any]
) -> list[str]:
    """Metrics a stage will have, so that a study with nothing done still shows what is missing."""
    kind = row["kinds"][stage_id]
    if kind in ("few_shot", "prompt_tuning"):
        transfer = resolved.get("study", {}).get("stages", {}).get("transfer", {})
        shots = transfer.get(role, {}).get("shots", (1, 5, 10))
        return [f"acc1_{k}shot" for k in shots]
    return [measure.name for measure in MEASURES.get(kind, ())]


def _numbers(stage: StageFacts) -> dict[str, float]:
    if stage.state != "done":
        return {}
    return {
        name: float(value)
        for name, value in stage.result.get("metrics", {}).items()
        if isinstance(value, (int, float)) and math.isfinite(value) and name != "wall_s"
    }


# -- curves ---------------------------------------------------------------------------------


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole rows of a JSONL file and the number of broken ones.

    A last line without its newline was torn by a kill; it is left out and not counted.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    rows, broken = [], 0
    for line in raw[: raw.rfind(b"\n") + 1].splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def _curves_frame(
    rows: list[dict[str, Any]],
    cells: pd.DataFrame,
    stages: Mapping[str, StageFacts],
    notes: list[str],
) -> pd.DataFrame:
    serves: dict[str, list[str]] = {}
    roles: dict[str, str] = {}
    for row in rows:
        for role, stage_id in row["stages"].items():
            serves.setdefault(stage_id, []).append(row["id"])
            roles[stage_id] = role
    about = cells.set_index("cell")
    frames = []
    for stage_id, stage in stages.items():
        found, broken = read_rows(stage.folder.metrics)
        if broken:
            notes.append(f"{stage.folder.metrics}: {broken} broken lines left out")
        if not found:
            continue
        frame = pd.DataFrame(found)
        served = about.loc[serves[stage_id]]
        shared: dict[str, Any] = {
            "stage": stage_id,
            "kind": stage.kind,
            "task": roles[stage_id],
            "state": stage.state,
            "cells": ";".join(serves[stage_id]),
        }
        # What the cells of a shared stage do not agree on is not a property of the stage.
        for name in ("size", "params", "data", "init", "seed", "variant"):
            values = served[name].unique()
            shared[name] = values[0] if len(values) == 1 else None
        frames.append(frame.assign(**shared))
    columns = ["stage", "kind", "task", "state", "cells", "size", "params", "data", "init", "seed"]
    columns += ["variant", "step", "samples", "flops", "wall_s", "loss", "val_loss"]
    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    for name in columns:
        if name not in whole:
            whole[name] = math.nan
    for name in ("step", "samples", "flops", "loss", "val_loss"):
        numbers = pd.to_numeric(whole[name], errors="coerce").astype(float)
        whole[name] = numbers.where(numbers.abs() < math.inf)
    rest = [c for c in whole.columns if c not in columns]
    return whole[columns + rest]
