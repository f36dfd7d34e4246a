"""Convergence curves: all stages read at once, WSP's for comparisons, values read off them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.metric_rows import read_many
from analysis.stages import StageFacts

if TYPE_CHECKING:
    from analysis.load import StudyData

_WORDS = ("stage", "kind", "task", "state", "cells", "size", "init", "variant")
_NUMBERS = ("step", "samples", "flops", "wall_s", "loss", "val_loss")
_JUDGED = ("samples", "flops", "val_loss")
_SHARED = ("size", "params", "data", "init", "seed", "variant")
COLUMNS = (
    *("stage", "kind", "task", "state", "cells", "size", "params", "data", "init", "seed"),
    *("variant", *_NUMBERS),
)
"""First columns of a curves frame; the other numbers of metrics.jsonl follow by alphabet."""


def curves_frame(
    rows: Sequence[Mapping[str, Any]],
    cells: pd.DataFrame,
    stages: Mapping[str, StageFacts],
    notes: list[str],
    *,
    fast: bool = True,
) -> pd.DataFrame:
    """A row per metrics row of every stage, stages in order. Words are categories, numbers floats.

    `cells` names the cells that a stage serves, by `;`. Adds a note for each file with broken
    lines. Ten million rows take about a gigabyte.
    """
    serves: dict[str, list[str]] = {}
    roles: dict[str, str] = {}
    for row in rows:
        for role, stage in row["stages"].items():
            serves.setdefault(stage, []).append(row["id"])
            roles[stage] = role
    found = read_many([stage.folder.metrics for stage in stages.values()], fast=fast)
    kept = []
    for stage, count, broken in zip(stages.values(), found.counts, found.broken, strict=True):
        if broken:
            notes.append(f"{stage.folder.metrics}: {broken} broken lines left out")
        if count:
            kept.append(stage)
    about = cells.drop_duplicates("cell").set_index("cell")[list(_SHARED)].to_dict("index")
    facts: dict[str, list[Any]] = {name: [] for name in COLUMNS if name not in _NUMBERS}
    for stage in kept:
        facts["stage"].append(stage.id)
        facts["kind"].append(stage.kind)
        facts["task"].append(roles[stage.id])
        facts["state"].append(stage.state)
        facts["cells"].append(";".join(serves[stage.id]))
        for name in _SHARED:
            # What the cells of a shared stage do not agree on is not a property of the stage.
            values = {about[cell][name] for cell in serves[stage.id]}
            facts[name].append(values.pop() if len(values) == 1 else None)
    counts = found.counts[found.counts > 0]
    numbers = {name: found.columns.pop(name, None) for name in _NUMBERS}
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        if name in _WORDS:
            columns[name] = _repeated(facts[name], counts)
        elif name in facts:
            columns[name] = np.repeat(np.array(facts[name], np.float64), counts)
        else:
            own = numbers[name]
            columns[name] = np.full(int(counts.sum()), math.nan) if own is None else own
    rest = {name: found.columns[name] for name in sorted(found.columns) if name not in columns}
    return pd.DataFrame(columns | rest, copy=False)


def _repeated(words: list[str | None], counts: np.ndarray) -> pd.Categorical:
    found = pd.Categorical(words, categories=list(dict.fromkeys(w for w in words if w is not None)))
    codes = np.repeat(found.codes, counts)
    return pd.Categorical.from_codes(codes, categories=found.categories)


def finished_wsp(curves: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss along WSP of the grid's finished runs; a row per evaluation, with its cell.

    A run that several cells share has its rows once for each. By cell, then samples.
    """
    if not len(curves):
        return curves.assign(cell=[], pair=[])
    chosen = (curves["kind"] == "wsp") & (curves["state"] == "done")
    chosen &= curves["val_loss"].notna() & curves["samples"].notna()
    chosen_R = np.flatnonzero(chosen.to_numpy())
    # Cells as numbers until the end: words of ten million rows take gigabytes and minutes.
    about = grid[["cell", "pair", *_SHARED]].sort_values("cell", ignore_index=True)
    place = {cell: i for i, cell in enumerate(about["cell"])}
    codes = curves["cells"].cat.codes.to_numpy()[chosen_R]
    # Rows of a stage stand together, so a cell's rows are a few runs of them.
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    ends = np.append(starts, len(codes))[1:]
    words = list(curves["cells"].cat.categories)
    pieces = sorted(
        (place[cell], int(start), int(end))
        for start, end in zip(starts, ends, strict=True)
        for cell in words[codes[start]].split(";")
        if cell in place
    )
    sizes = [end - start for _, start, end in pieces]
    cell_R = np.repeat(np.array([cell for cell, _, _ in pieces], np.int64), sizes)
    none = np.zeros(0, np.int64)
    row_R = np.concatenate([chosen_R[start:end] for _, start, end in pieces] or [none])
    samples = curves["samples"].to_numpy()[row_R]
    if np.any((np.diff(samples) < 0) & (np.diff(cell_R) == 0)):
        order = np.lexsort((samples, cell_R))
        row_R, cell_R = row_R[order], cell_R[order]
    columns: dict[str, Any] = {name: curves[name].to_numpy()[row_R] for name in _JUDGED}
    used = np.unique([cell for cell, _, _ in pieces]).astype(np.int64)
    for name in about:
        values = about[name].to_numpy()
        if values.dtype.kind == "f":
            columns[str(name)] = values[cell_R]
            continue
        # Only words in use: a category without rows would be a group of its own.
        words = list(dict.fromkeys(values[used]))
        number = {word: i for i, word in enumerate(words)}
        codes_C = np.array([number.get(value, -1) for value in values], np.int32)
        columns[str(name)] = pd.Categorical.from_codes(codes_C[cell_R], categories=pd.Index(words))
    return pd.DataFrame(columns, copy=False)


def wsp_curves(study: StudyData) -> pd.DataFrame:
    """`finished_wsp` of a study, made once.

    Curves of runs that did not finish stay in the curves files and out of every comparison.
    """
    return study.finished_wsp


def read_off(x: np.ndarray, y: np.ndarray, at: float) -> float | None:
    """y at `at` by linear interpolation; None outside the range of x. x ascending."""
    if len(x) == 0 or not x[0] <= at <= x[-1]:
        return None
    return float(np.interp(at, x, y))


def reaches(x: np.ndarray, y: np.ndarray, target: float) -> tuple[float, bool] | None:
    """From which x on y stays at or below `target`, and whether that is only an upper bound.

    "Stays": a dip below that is lost again does not count. Upper bound: the first point of the
    curve is below already, so the crossing lies somewhere before it. None if never.
    """
    if len(x) == 0 or y[-1] > target:
        return None
    above = np.flatnonzero(y > target)
    if len(above) == 0:
        return float(x[0]), True
    last = int(above[-1])
    share = (y[last] - target) / (y[last] - y[last + 1])
    return float(x[last] + share * (x[last + 1] - x[last])), False
