"""The run tree as tidy frames. A stage that is not done has its state and never a number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.curves import curves_frame, finished_wsp
from analysis.stages import StageFacts, clean, read_stages
from harness.ledger import cell_rows
from harness.ledger.files import read_json
from harness.ledger.tree import Tree
from harness.study.cell_states import cell_state
from harness.study.cells import TUNE
from harness.study.expand import same
from harness.study.measures import MEASURES
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
class StudyData:
    """One study as frames.

    cells: a row per cell: axes, state, costs. results: a row per cell x task metric (`value` is
    NaN unless the stage is done). curves: a row per metrics row x stage, with the cells it serves
    (see `analysis.curves.curves_frame`).
    """

    name: str
    root: Path
    question: str | None
    resolved: Mapping[str, Any]
    study_file: str
    cells: pd.DataFrame
    results: pd.DataFrame
    read_curves: Callable[[list[str]], pd.DataFrame]
    """Reads them, and adds to a list what it met."""
    stages: Mapping[str, StageFacts]
    varying: tuple[str, ...]
    """Axes beyond size, data, init and seed that take more than one value in the grid."""
    early_notes: tuple[str, ...]
    """Oddities met while cells and results were read."""

    @cached_property
    def _curves(self) -> tuple[pd.DataFrame, tuple[str, ...]]:
        notes: list[str] = []
        return self.read_curves(notes), tuple(notes)

    @property
    def curves(self) -> pd.DataFrame:
        """Read when they are asked for first: of a large study they are gigabytes."""
        return self._curves[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """Oddities met while reading: torn or broken lines, unreadable files."""
        return self.early_notes + self._curves[1]

    @property
    def grid(self) -> pd.DataFrame:
        """Cells of the study file itself, ablations left out."""
        return self.cells[self.cells["parent"].isna()]

    @property
    def grid_results(self) -> pd.DataFrame:
        """Results of the study file's own cells."""
        return self.results[self.results["parent"].isna()]

    @cached_property
    def finished_wsp(self) -> pd.DataFrame:
        """Curves of the grid's finished WSP runs, a row per evaluation and cell."""
        return finished_wsp(self.curves, self.grid)


def load(root: Path, study: str) -> StudyData:
    """Reads one study. Raises NotFoundError, naming the studies there are."""
    tree = Tree(root)
    # Trials of a search have a section of their own; see analysis.tuning.
    rows = [_clean(r) for r in cell_rows.read_cells(tree, study) if r["tag"] != TUNE]
    folder = tree.study(study)
    resolved = read_json(folder / "resolved.json") or {}
    study_file = folder / "study.yaml"
    notes: list[str] = []
    stages = read_stages(tree, rows, notes)
    varying = _varying([r for r in rows if not r.get("parent")])
    axes = resolved.get("axes") or {}
    defaults = (resolved.get("study") or {}).get("defaults") or {}
    defaults = {name: value for name, value in defaults.items() if name not in axes}
    cells = _cells_frame(rows, stages, varying, defaults)
    return StudyData(
        name=study,
        root=root,
        question=clean(str(resolved["question"])) if resolved.get("question") else None,
        resolved=resolved,
        study_file=study_file.read_text("utf-8", "replace") if study_file.is_file() else "",
        cells=cells,
        results=_results_frame(rows, cells, stages, resolved),
        read_curves=partial(curves_frame, rows, cells, stages),
        stages=stages,
        varying=varying,
        early_notes=tuple(notes),
    )


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.loads(clean(json.dumps(row, ensure_ascii=False)))
    return row


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
    keep = _RESULT_COLUMNS[1 : _RESULT_COLUMNS.index("task")]
    # Columns as lists: ten thousand cells have some hundred thousand results.
    about = cells.drop_duplicates("cell").set_index("cell")[list(keep)].to_dict("index")
    out: dict[str, list[Any]] = {name: [] for name in _RESULT_COLUMNS}
    for row in rows:
        base = {"cell": row["id"], **about[row["id"]]}
        for role, stage_id in row["stages"].items():
            stage = stages[stage_id]
            numbers = _numbers(stage)
            for metric in names[role]:
                value = numbers.get(metric, math.nan)
                state = stage.state
                if state == "done" and not math.isfinite(value):
                    state = "absent"
                facts = {"task": role, "kind": stage.kind, "metric": metric, "value": value}
                for name, fact in (base | facts | {"state": state, "stage": stage_id}).items():
                    out[name].append(fact)
    return pd.DataFrame(out)


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
