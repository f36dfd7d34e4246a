"""Convergence curves of the WSP stage, and reading a value off one without leaving its range."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.load import StudyData


def wsp_curves(study: StudyData) -> pd.DataFrame:
    """Held-out loss along WSP of the grid's finished runs; a row per evaluation, with its cell.

    Curves of runs that did not finish stay in curves.csv and out of every comparison.
    """
    frame = study.curves
    rows = frame[(frame["kind"] == "wsp") & (frame["state"] == "done")]
    rows = rows.dropna(subset=["val_loss", "samples"])
    rows = rows.drop(columns=["size", "params", "data", "init", "seed", "variant"])
    rows = rows.assign(cell=rows["cells"].str.split(";")).explode("cell")
    about = study.grid[["cell", "pair", "size", "params", "data", "init", "seed", "variant"]]
    merged = rows.merge(about, on="cell", how="inner")
    return merged.sort_values(["cell", "samples"], kind="stable", ignore_index=True)


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
