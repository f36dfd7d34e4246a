"""Laws over model size and data: fits by init, forms compared, frontiers, what MAE is worth.

Rows are finished runs of the study's main setting: N model parameters, D distinct pretraining
images, C the FLOPs of pretraining with the MAE stage charged in full. Points before the end of a
schedule are never among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import gain
from analysis.approaches import ApproachesTable, approaches_table
from analysis.arms import arms
from analysis.costs import cost_of_rows
from analysis.envelope import fit_envelope
from analysis.fit import Fit, fit
from analysis.forms import CHINCHILLA, Array
from analysis.frontier import Frontier, frontier
from analysis.holdout import compare, held_out, largest_out
from analysis.isoflop import fit_isoflop
from analysis.laws import DELTA
from analysis.load import StudyData
from analysis.metrics import Metric
from analysis.optimum import OptimumFit
from analysis.which_parameter import WhichParameter, which_parameter
from analysis.worth import WorthTable, worth

TWO_AXES = ("chinchilla", "tied", "kaplan")
ONE_AXIS = ("power", "power_irreducible", "shifted", "m4", "broken")
ROW_ORDER = ("params", "data", "seed")
"""Of a fit's rows, which its bootstrap draws depend on."""
_NO_ENDS = 9
"""Points of a frontier between the cheapest and the dearest run."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """L(N, D) of one metric and init."""

    metric: Metric
    init: str
    rows: pd.DataFrame
    """params, data, y, cell, flops_pretrain of the rows used."""
    dropped: tuple[tuple[str, str], ...]
    fit: Fit
    inner_fit: Fit | None
    """Of the rows that `held_out` predicts the others from."""
    held_out: dict[str, Any]
    forms: list[dict[str, Any]]
    """Forms over two axes by held-out error."""
    size_forms: list[dict[str, Any]]
    """Forms over model size at the largest data, by held-out error."""
    optima: Mapping[str, OptimumFit | Frontier]
    approaches: ApproachesTable

    def to_json(self) -> dict[str, Any]:
        """As it stands in fits.json."""
        return {
            "y": self.metric.error_label,
            "task": self.metric.task,
            "metric": self.metric.name,
            "init": self.init,
            **self.fit.to_json(),
            "cells_used": list(self.rows["cell"]),
            "rows_dropped": [{"cell": c, "reason": r} for c, r in self.dropped],
            "heldout": self.held_out,
            "forms": self.forms,
            "forms_over_size": self.size_forms,
            "approaches": self.approaches.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class InitWorth:
    """What MAE is worth in one metric."""

    metric: Metric
    which: WhichParameter
    table: WorthTable


def surfaces(study: StudyData, metrics: list[Metric], bootstrap: int = 400) -> list[Surface]:
    """A surface per metric and init of the main setting; refused ones included.

    Of hundreds of rows fewer draws are refitted, 100 at least: an interval's end then wobbles by a
    tenth of its width, and the report stays a matter of seconds.
    """
    return [task.compute() for task in surface_tasks(study, metrics, bootstrap)]


class SurfaceTask(NamedTuple):
    """A surface to be computed, which takes seconds."""

    metric: Metric
    init: str
    compute: Callable[[], Surface]


def surface_tasks(
    study: StudyData, metrics: list[Metric], bootstrap: int = 400
) -> list[SurfaceTask]:
    """What `surfaces` computes, one by one."""
    tasks = []
    for metric in metrics:
        rows = _main_rows(study, metric)
        for init, group in rows.groupby("init", sort=False):
            draws = draws_for(len(group), bootstrap)
            compute = partial(_surface, metric, str(init), group, draws)
            tasks.append(SurfaceTask(metric, str(init), compute))
    return tasks


def draws_for(rows: int, bootstrap: int) -> int:
    """Bootstrap draws of a fit of so many rows, see `surfaces`."""
    return min(bootstrap, max(100, 40_000 // max(1, rows)))


def _main_rows(study: StudyData, metric: Metric) -> pd.DataFrame:
    """Rows of the metric in the study's main setting, with y and cost."""
    rows = metric.rows(study.grid_results)
    if not len(rows):
        return rows.assign(y=[])
    main = study.grid["variant"].iloc[0]
    rows = rows[rows["variant"] == main]
    return rows.assign(y=metric.error(rows["value"]))


def _surface(metric: Metric, init: str, rows: pd.DataFrame, bootstrap: int) -> Surface:
    y = rows["y"].to_numpy(float)
    usable = np.isfinite(y) & (y > 0)
    dropped = tuple(
        (str(cell), "value is 0: no logarithm" if np.isfinite(value) else str(state))
        for cell, state, value, good in zip(rows["cell"], rows["state"], y, usable, strict=True)
        if not good
    )
    used = rows[usable].sort_values(list(ROW_ORDER))
    n, d, y = (used[k].to_numpy(float) for k in ("params", "data", "y"))
    inputs = {"N": n, "D": d}
    cells = tuple(map(str, used["cell"]))
    common: dict[str, Any] = {"groups": cells, "delta": DELTA, "bootstrap": bootstrap}
    fitted = fit(CHINCHILLA, inputs, y, **common)
    common["bootstrap"] = bootstrap // 2
    at_largest = d == d.max() if len(d) else np.zeros(0, bool)
    optima = _optima(fitted, n, d, y, used["flops_pretrain"].to_numpy(float), cells, bootstrap)
    inner, held = None, {}
    if len(y):
        inner = _inner_fit(inputs, y, cells, bootstrap)
        held = held_out(CHINCHILLA, inputs, y, fitted=inner)
    known = {CHINCHILLA.name: held}
    return Surface(
        metric=metric,
        init=init,
        rows=used,
        dropped=dropped,
        fit=fitted,
        inner_fit=inner,
        held_out=held,
        forms=compare(TWO_AXES, inputs, y, **common, known=known) if len(y) else [],
        size_forms=_size_forms(n[at_largest], y[at_largest], bootstrap) if len(y) else [],
        optima=optima,
        approaches=approaches_table(optima),
    )


def _inner_fit(
    inputs: dict[str, Array], y: Array, cells: tuple[str, ...], bootstrap: int
) -> Fit | None:
    kept = largest_out(CHINCHILLA, inputs)
    if not kept.any() or kept.all():
        return None
    inside = {name: column[kept] for name, column in inputs.items()}
    groups = [cell for cell, k in zip(cells, kept, strict=True) if k]
    return fit(CHINCHILLA, inside, y[kept], groups=groups, delta=DELTA, bootstrap=bootstrap)


def _size_forms(n: Array, y: Array, bootstrap: int) -> list[dict[str, Any]]:
    return compare(ONE_AXIS, {"x": n}, y, delta=DELTA, bootstrap=bootstrap // 2)


def _optima(
    fitted: Fit, n: Array, d: Array, y: Array, c: Array, cells: tuple[str, ...], bootstrap: int
) -> dict[str, OptimumFit | Frontier]:
    """Approaches 1 to 3 at the study's own cost."""
    good = np.isfinite(c) & (c > 0)
    n, d, y, c = n[good], d[good], y[good], c[good]
    runs = [cell for cell, g in zip(cells, good, strict=True) if g]
    out: dict[str, OptimumFit | Frontier] = {
        "envelope": fit_envelope(n, d, y, c, runs, bootstrap=bootstrap),
        "isoflop": fit_isoflop(n, d, y, c, runs, bootstrap=bootstrap),
    }
    if fitted.status != "converged":
        reason = f"L(N, D) {fitted.status.replace('_', ' ')}: {fitted.reason}"
        out["surface"] = Frontier(status="refused", reason=reason)
        return out
    cost = cost_of_rows(n, d, c)
    if isinstance(cost, str):
        out["surface"] = Frontier(status="refused", reason=f"cost over N and D: {cost}")
        return out
    between = np.geomspace(c.min(), c.max(), _NO_ENDS)
    out["surface"] = frontier(
        fitted.params,
        between,
        fitted.draws,
        cost=cost,
        cost_name="FLOPs of pretraining, fitted to the cells",
        fitted_c=(float(c.min()), float(c.max())),
    )
    return out


def init_worth(study: StudyData, metric: Metric, bootstrap: int = 400) -> InitWorth:
    """Which parameter MAE changes, and its data and compute multiplier at every grid point."""
    wanted = ["init", "params", "data", "y", "cell", "pair"]
    rows: Any = _main_rows(study, metric)[wanted].to_dict("records")
    bootstrap = draws_for(len(rows), bootstrap)
    random, mae = arms(rows, gain.WITH, gain.WITHOUT)
    flops, grid = {}, study.grid[study.grid["variant"] == study.grid["variant"].iloc[0]]
    for init in (gain.WITHOUT, gain.WITH):  # the MAE stage of a grid point is the MAE cell's
        own = grid.loc[grid["init"] == init, ["params", "data", "flops_wsp", "flops_mae"]]
        for n, d, wsp, mae_stage in own.to_numpy(float):
            flops[float(n), float(d)] = float(wsp), float(mae_stage)
    return InitWorth(
        metric=metric,
        which=which_parameter(random, mae, delta=DELTA, bootstrap=bootstrap // 2),
        table=worth(random, mae, flops, delta=DELTA, bootstrap=bootstrap),
    )
