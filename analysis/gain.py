"""What the MAE stage buys: paired differences, at equal samples and at equal total FLOPs.

A pair is two cells that differ in `init` only. Gains are oriented: positive means that MAE helps.
The MAE stage is charged in full to every cell that uses it. Nothing is extrapolated: what would
need it is refused, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.curves import reaches, read_off, wsp_curves
from analysis.load import StudyData
from analysis.metrics import Metric

WITH, WITHOUT = "mae", "random"
_FLOATS = ("with_mae", "without", "gain", "mean", "low", "high", "share", "ratio", "multiplier")
POINT = ["variant", "size", "params", "data"]
"""What names a grid point: everything but init and seed."""


def paired(study: StudyData, metrics: list[Metric]) -> pd.DataFrame:
    """A row per pair x metric: with, without, gain; NaN and `why` where a side has no number.

    A cell whose partner the study never asked for is no pair.
    """
    results = study.grid_results
    results = results[results["pair"].isin(_asked_for(study))]
    keys = [*POINT, "seed", "pair"]
    out: list[dict[str, Any]] = []
    for metric in metrics:
        # Plain rows: a frame for each of thousands of pairs would take minutes.
        pairs: dict[str, dict[str, Any]] = {}
        sides: dict[str, dict[str, tuple[float, str]]] = {}
        rows = metric.rows(results)
        for row in rows[[*keys, "init", "value", "state"]].to_dict("records"):
            pair = str(row["pair"])
            pairs.setdefault(pair, {str(k): row[k] for k in keys})
            side = (float(row["value"]), str(row["state"]))
            sides.setdefault(pair, {}).setdefault(str(row["init"]), side)
        sign = 1.0 if metric.is_accuracy else -1.0
        for pair, about in pairs.items():
            values, why = {}, []
            for init in (WITH, WITHOUT):
                values[init], state = sides[pair].get(init, (math.nan, ""))
                if not state:
                    why.append(f"no {init} cell")
                elif not math.isfinite(values[init]):
                    why.append(f"{init}: {state}")
            numbers = {"with_mae": values[WITH], "without": values[WITHOUT]}
            numbers["gain"] = sign * (values[WITH] - values[WITHOUT])
            out.append({**about, "metric": metric.key, **numbers, "why": "; ".join(why)})
    columns = [*POINT, "seed", "pair", "metric", "with_mae", "without", "gain", "why"]
    return _frame(out, columns)


def _asked_for(study: StudyData) -> set[str]:
    inits = study.grid.groupby("pair", sort=False)["init"].agg(set)
    return {str(pair) for pair, found in inits.items() if {WITH, WITHOUT} <= found}


def by_point(rows: pd.DataFrame, value: str = "gain") -> pd.DataFrame:
    """Mean, smallest and largest over the seeds of each grid point; `why` of those without."""
    columns = [*POINT, "mean", "low", "high", "seeds", "expected", "why"]
    if not len(rows):
        return _frame([], columns)
    # Numbers of groups, not frames of them: thousands of points would take seconds.
    point_R = rows.groupby(POINT, sort=False, dropna=False).ngroup().to_numpy()
    order = np.argsort(point_R, kind="stable")
    starts = np.flatnonzero(np.diff(point_R[order], prepend=-1))
    numbers, words = rows[value].to_numpy(float), rows["why"].to_numpy()
    keys = rows[POINT].iloc[order[starts]].to_dict("records")
    out = []
    for key, own in zip(keys, np.split(order, starts[1:]), strict=True):
        good = numbers[own][~np.isnan(numbers[own])]
        out.append(
            {
                **key,
                "mean": float(good.mean()) if len(good) else math.nan,
                "low": float(good.min()) if len(good) else math.nan,
                "high": float(good.max()) if len(good) else math.nan,
                "seeds": len(good),
                "expected": len(own),
                "why": "; ".join(dict.fromkeys(w for w in words[own] if w)),
            }
        )
    return _frame(out, columns)


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """A frame whose numbers are floats also when it has no row."""
    frame = pd.DataFrame(rows, columns=columns)
    floats = [c for c in _FLOATS if c in columns]
    return frame.astype(dict.fromkeys(floats, float))


# -- summary over the grid ------------------------------------------------------------------


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % t-interval of the mean; None with fewer than 3 values."""
    if len(values) < 3:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def trend(points: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Change of the gain per tenfold of params and of data, with 95 % t-intervals.

    Least squares of the grid points' mean gains on log10(params) and log10(data), on those of the
    two that vary, and on the variants. Without enough points a slope carries only its `reason`.
    """
    good = points[np.isfinite(points["mean"])]
    columns = {}
    out: dict[str, dict[str, Any]] = {}
    for name in ("params", "data"):
        if good[name].nunique() > 1:
            columns[name] = np.log10(good[name].to_numpy(float))
        else:
            out[name] = {"reason": f"{good[name].nunique()} value of {name}"}
    if not columns:
        return out
    shifts = pd.get_dummies(good["variant"]).to_numpy(float)
    design = np.column_stack([shifts, *columns.values()])
    y = good["mean"].to_numpy(float)
    freedom = len(y) - np.linalg.matrix_rank(design)
    if freedom < 2 or np.linalg.matrix_rank(design) < design.shape[1]:
        why = f"{len(y)} grid points cannot tell the slopes apart"
        return out | {name: {"reason": why} for name in columns}
    solved = np.linalg.lstsq(design, y, rcond=None)[0]
    variance = float(((y - design @ solved) ** 2).sum() / freedom)
    spread = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
    half = stats.t.ppf(0.975, freedom) * spread
    for i, name in enumerate(columns, start=shifts.shape[1]):
        slope = float(solved[i])
        interval = (slope - float(half[i]), slope + float(half[i]))
        out[name] = {"slope": slope, "interval": interval, "points": len(y)}
    return out


# -- equal total FLOPs, along the convergence curves ------------------------------------------


def charged_curves(study: StudyData) -> pd.DataFrame:
    """A row per pair: val_loss at equal total FLOPs, and the FLOPs to equal val_loss.

    gain: at the random cell's total FLOPs, random's final val_loss minus the MAE cell's val_loss
    read off its curve where MAE stage + WSP so far cost as much. share: from which share of its
    WSP the MAE cell stays at or below random's final val_loss. ratio: total FLOPs it has spent
    by then, MAE stage in full, over random's; below 1, MAE is cheaper.

    Points before the end of a curve belong to a schedule that is not over, which speaks against
    the MAE cell: a run that was planned to end there would be better.
    """
    curves = _by_cell(wsp_curves(study))
    out = []
    grid = study.grid[study.grid["pair"].isin(_asked_for(study))]
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in grid.to_dict("records"):
        pairs.setdefault(str(cell["pair"]), {}).setdefault(
            str(cell["init"]), {str(k): v for k, v in cell.items()}
        )
    for pair, cells in pairs.items():
        first = next(iter(cells.values()))
        row: dict[str, Any] = {k: first[k] for k in [*POINT, "seed"]}
        row |= {"pair": pair, "gain": math.nan, "why": ""}
        row |= {"share": math.nan, "ratio": math.nan, "is_upper_bound": False, "why_ratio": ""}
        sides = {i: cells[i] for i in (WITH, WITHOUT)}
        missing = [i for i, c in sides.items() if str(c["cell"]) not in curves]
        if missing:
            row["why"] = row["why_ratio"] = f"no finished WSP curve: {', '.join(missing)}"
        else:
            row |= _compare(sides, {i: curves[str(c["cell"])] for i, c in sides.items()})
        out.append(row)
    columns = [*POINT, "seed", "pair", "gain", "why", "share", "ratio", "is_upper_bound"]
    columns += ["why_ratio", "flops_random", "flops_mae_stage", "flops_mae_total"]
    return _frame(out, columns)


def _by_cell(rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(samples, val_loss) of each cell; rows come by cell, then samples."""
    cells = rows["cell"].astype("category")
    codes = cells.cat.codes.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    ends = np.append(starts[1:], len(codes))[: len(starts)]
    samples, loss = (rows[k].to_numpy(float) for k in ("samples", "val_loss"))
    return {
        str(cells.cat.categories[codes[a]]): (samples[a:b], loss[a:b])
        for a, b in zip(starts, ends, strict=True)
    }


def _compare(
    cells: Mapping[str, Mapping[str, Any]], curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    stage, wsp = float(cells[WITH]["flops_mae"]), float(cells[WITH]["flops_wsp"])
    budget = float(cells[WITHOUT]["flops_wsp"])
    final = float(curves[WITHOUT][1][-1])
    samples, loss = curves[WITH]
    # FLOPs are proportional to samples within a stage; the cost model is the one authority.
    spent = stage + wsp * samples / samples[-1]
    row: dict[str, Any] = {
        "flops_random": budget,
        "flops_mae_stage": stage,
        "flops_mae_total": stage + wsp,
    }
    at_budget = read_off(spent, loss, budget)
    if at_budget is not None:
        row["gain"] = final - at_budget
    elif budget <= stage:
        row["why"] = "the MAE stage alone costs more than random's whole budget"
    elif budget > spent[-1]:
        row["why"] = "random's budget is beyond the MAE cell's whole run"
    else:
        row["why"] = "random's budget ends before the MAE cell's first evaluation"
    reached = reaches(samples, loss, final)
    if reached is None:
        row["why_ratio"] = "never reaches random's final loss"
        return row
    at, is_bound = reached
    share = at / samples[-1]
    return row | {
        "share": share,
        "ratio": (stage + wsp * share) / budget,
        "is_upper_bound": is_bound,
    }


# -- equal total FLOPs, among finished runs ---------------------------------------------------


def _without_duration(pair: str) -> str:
    axes = json.loads(pair)
    kept = {k: v for k, v in axes.items() if not k.startswith("wsp.duration")}
    return json.dumps(kept, sort_keys=True)


def charged_results(study: StudyData, metrics: list[Metric]) -> pd.DataFrame:
    """A row per MAE cell x metric: its value against random runs of as many total FLOPs.

    Only for studies with an axis `wsp.duration`: the random cells that differ in nothing else are
    finished runs of several lengths, and their values are interpolated over log FLOPs, never
    beyond the shortest or longest.
    """
    columns = [*POINT, "seed", "pair", "metric", "gain", "why", "flops"]
    if not any(name.startswith("wsp.duration") for name in study.varying):
        return _frame([], columns)
    results = study.grid_results
    results = results.assign(family=results["pair"].map(_without_duration))
    out = []
    for metric in metrics:
        rows = metric.rows(results)
        for family, group in rows.groupby("family", sort=False):
            if (group["init"] == WITHOUT).sum() < 2:
                continue  # the study asked for no second length here
            scratch = group[(group["init"] == WITHOUT) & np.isfinite(group["value"])]
            scratch = scratch.sort_values("flops_pretrain")
            x = np.log(scratch["flops_pretrain"].to_numpy(float))
            y = scratch["value"].to_numpy(float)
            for _, cell in group[group["init"] == WITH].iterrows():
                row: dict[str, Any] = {k: cell[k] for k in [*POINT, "seed"]}
                row |= {"pair": family, "metric": metric.key, "gain": math.nan, "why": ""}
                row["flops"] = cell["flops_pretrain"]
                at = read_off(x, y, math.log(cell["flops_pretrain"]))
                if not math.isfinite(cell["value"]):
                    row["why"] = f"{WITH}: {cell['state']}"
                elif at is None:
                    row["why"] = "no finished random runs on both sides of these FLOPs"
                else:
                    sign = 1.0 if metric.is_accuracy else -1.0
                    row["gain"] = sign * (float(cell["value"]) - at)
                out.append(row)
    return _frame(out, columns)


# -- effective data ---------------------------------------------------------------------------


def data_multiplier(pairs: pd.DataFrame, metrics: list[Metric]) -> pd.DataFrame:
    """A row per pair x metric: how many times the images random would need for MAE's value.

    `pairs` as from `paired`. Interpolates the random arm of the same size and seed over log
    images, within its range; refused beyond it, where the arm crosses the value more than once,
    and where more images do not help it.
    """
    sign = {m.key: 1.0 if m.is_accuracy else -1.0 for m in metrics}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in pairs.to_dict("records"):
        key = tuple(row[k] for k in ("metric", "variant", "size", "seed"))
        groups.setdefault(key, []).append({str(k): v for k, v in row.items()})
    rows = []
    for (metric, *_), group in groups.items():
        arm = sorted((r["data"], r["without"]) for r in group if math.isfinite(r["without"]))
        x = np.log(np.array([data for data, _ in arm], float))
        y = sign[metric] * np.array([value for _, value in arm], float)
        for row in group:
            wanted = sign[metric] * float(row["with_mae"])
            value, why = _effective(x, y, wanted, math.log(row["data"]))
            why = row["why"] or why if math.isnan(wanted) else why
            about = {k: row[k] for k in [*POINT, "seed", "metric"]}
            rows.append({**about, "multiplier": value, "why": why})
    return _frame(rows, [*POINT, "seed", "metric", "multiplier", "why"])


def _effective(x: np.ndarray, y: np.ndarray, wanted: float, here: float) -> tuple[float, str]:
    """exp(distance in x) from `here` to where y, higher being better, is `wanted`."""
    if not math.isfinite(wanted):
        return math.nan, "no MAE value"
    if len(x) < 2:
        return math.nan, "fewer than 2 data sizes with random init"
    if y[-1] <= y[0]:
        return math.nan, "more images do not help random init here: not identified"
    offset = y - wanted
    crossings = [
        x[i] - offset[i] * (x[i + 1] - x[i]) / (offset[i + 1] - offset[i])
        for i in range(len(x) - 1)
        if offset[i] * offset[i + 1] < 0
    ]
    crossings += [x[i] for i in range(len(x)) if offset[i] == 0]
    if len(crossings) == 1:
        return math.exp(float(crossings[0]) - here), ""
    if crossings:
        return math.nan, "random crosses the value more than once: not identified"
    if offset[-1] < 0:
        return math.nan, f"beyond random's range: more than {math.exp(x[-1] - here):.3g}x"
    return math.nan, f"below random's range: less than {math.exp(x[0] - here):.3g}x"
