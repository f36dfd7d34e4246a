"""The finding: one paragraph whose every sentence is chosen by what the numbers say."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import gain
from analysis.laws import AXIS_LABELS, Law
from analysis.load import StudyData
from analysis.metrics import Metric

_TENFOLD = {"params": "parameters", "data": "pretraining images"}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Cells of the grid by how they ended."""

    expected: int
    done: int
    failed: int
    """Failed, lost or blocked."""
    diverged: int
    missing: int
    """Everything else: planned, waiting, running, stopped."""


def count(study: StudyData) -> Counts:
    """Counts over the study file's own cells."""
    states = Counter(study.grid["state"]) if len(study.grid) else Counter()
    done, diverged = states["done"], states["diverged"]
    failed = states["failed"] + states["lost"] + states["blocked"]
    total = sum(states.values())
    missing = total - done - failed - diverged
    return Counts(expected=total, done=done, failed=failed, diverged=diverged, missing=missing)


def paragraph(
    study: StudyData,
    metric: Metric | None,
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    charged_runs: pd.DataFrame,
    laws: list[Law],
) -> str:
    """The finding in plain words, intervals included."""
    return " ".join(sentences(study, metric, pairs, charged, charged_runs, laws))


def sentences(
    study: StudyData,
    metric: Metric | None,
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    charged_runs: pd.DataFrame,
    laws: list[Law],
) -> list[str]:
    """The finding, a sentence or two an item: progress, the effect, then what qualifies it."""
    found = [_progress(study)]
    inits = sorted(study.grid["init"].unique()) if len(study.grid) else []
    if metric is None:
        return [*found, "The study has no judged metric, so there is no finding."]
    if not {gain.WITH, gain.WITHOUT} <= set(inits):
        only = " and ".join(inits) or "none"
        found.append(f"It has one initialization ({only}), so it cannot say what MAE buys.")
        return found + _exponents(metric, laws)
    own = pairs[pairs["metric"] == metric.key]
    points = gain.by_point(own)
    good = points[np.isfinite(points["mean"])]
    if not len(good):
        found.append("No pair of a random and an MAE cell is finished, so there is no finding.")
        return found
    found += _effect(metric, good)
    found += _stability(metric, own)
    found += _by_size(metric, good)
    found += _trends(metric, own)
    found += _other_metrics(metric, pairs)
    found += _charged_runs(metric, charged_runs)
    found += _charged(charged)
    return found + _exponents(metric, laws)


def _progress(study: StudyData) -> str:
    c = count(study)
    if c.expected == 0:
        return "The study has no cells."
    if c.done == c.expected:
        seeds = study.grid["seed"].nunique()
        repeat = "one seed: no statement about chance" if seeds == 1 else f"{seeds} seeds"
        return f"All {c.expected} cells are finished ({repeat})."
    parts = [
        f"{number} {word}"
        for number, word in ((c.failed, "failed"), (c.diverged, "diverged"), (c.missing, "missing"))
        if number
    ]
    return f"Partial: {c.done} of {c.expected} cells are finished ({', '.join(parts)})."


def amount(value: float, metric: Metric, signed: bool = True) -> str:
    """A gain with its unit: '+4.2 points'."""
    digits = 1 if metric.is_accuracy else 3
    sign = "+" if signed else ""
    return f"{_rounded(value * metric.gain_scale, digits):{sign}.{digits}f} {metric.gain_unit}"


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # no minus before a zero


def _range(interval: tuple[float, float], metric: Metric) -> str:
    digits = 1 if metric.is_accuracy else 3
    low, high = (_rounded(v * metric.gain_scale, digits) for v in interval)
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def _point(row: pd.Series) -> str:
    from analysis.load import axis_label

    variant = f", {row['variant']}" if row["variant"] else ""
    return f"{row['size']} with {axis_label(int(row['data']))} images{variant}"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _effect(metric: Metric, good: pd.DataFrame) -> list[str]:
    values = good["mean"].to_numpy(float)
    mean, interval = float(values.mean()), gain.mean_interval(values)
    where = f"over {_plural(len(values), 'grid point')}"
    what = metric.label
    order = good.sort_values("mean", kind="stable")
    worst, best = order.iloc[0], order.iloc[-1]
    if interval is None:
        start = (
            f"At equal WSP samples, the MAE stage changed {what} by {amount(mean, metric)}"
            f" {where}; too few for an interval."
        )
    elif interval[0] > 0 or interval[1] < 0:
        better = "improved" if mean > 0 else "worsened"
        size = amount(abs(mean), metric, signed=False)
        start = (
            f"At equal WSP samples, the MAE stage {better} {what} by {size} on average {where}"
            f" (95 % interval of the gain {_range(interval, metric)})."
        )
    else:
        start = (
            f"At equal WSP samples, no effect of the MAE stage on {what} is resolved: {where} the"
            f" mean gain is {amount(mean, metric)} (95 % interval {_range(interval, metric)})."
        )
    if len(values) == 1:
        return [start]
    spread = (
        f"The gain runs from {amount(worst['mean'], metric)} ({_point(worst)}) to"
        f" {amount(best['mean'], metric)} ({_point(best)})."
    )
    return [start, spread]


def _stability(metric: Metric, own: pd.DataFrame) -> list[str]:
    good = own[np.isfinite(own["gain"])]
    groups = [g["gain"] for _, g in good.groupby(gain.POINT, dropna=False) if len(g) > 1]
    signs = [set(np.sign(g)) for g in groups]
    if not signs:
        return []
    same = sum(1 for s in signs if len(s) == 1)
    all_of = "all" if same == len(signs) else f"{same}"
    text = f"The seeds agree on its sign at {all_of} of the {len(signs)} repeated grid points"
    # Over the points that every seed has, or the means would differ by which points they hold.
    wide = good.pivot_table(index=gain.POINT, columns="seed", values="gain").dropna()
    if len(wide) > 1 and wide.shape[1] > 1:
        means = [f"{amount(float(wide[s].mean()), metric)} with seed {s}" for s in wide]
        text += f"; the mean gain over these is {', '.join(means[:-1])} and {means[-1]}"
    return [text + "."]


def _by_size(metric: Metric, good: pd.DataFrame) -> list[str]:
    means = good.groupby(["params", "size"])["mean"].mean()
    if len(means) < 2:
        return []
    unit = metric.gain_unit
    parts = [
        f"{size} {amount(value, metric).removesuffix(unit).strip()}"
        for size, value in zip(means.index.get_level_values("size"), means, strict=True)
    ]
    return [f"By model size the mean gain is, in {unit}: {', '.join(parts)}."]


def _trends(metric: Metric, own: pd.DataFrame) -> list[str]:
    found = gain.trend(gain.by_point(own))
    by_seed = {s: gain.trend(gain.by_point(rows)) for s, rows in own.groupby("seed")}
    out = []
    for name, word in _TENFOLD.items():
        slope = found.get(name, {})
        if "interval" not in slope:
            continue
        low, high = slope["interval"]
        per = f"per tenfold of {word}, 95 % interval"
        text = f"{amount(slope['slope'], metric)} {per} {_range((low, high), metric)}"
        single = {s: t[name]["slope"] for s, t in by_seed.items() if "slope" in t.get(name, {})}
        if len(single) > 1 and not low <= 0 <= high:
            each = [f"{amount(v, metric)} with seed {s}" for s, v in single.items()]
            text += f"; {', '.join(each[:-1])} and {each[-1]}, each alone"
        if low > 0:
            out.append(f"The gain grows with {AXIS_LABELS[name]} ({text}).")
        elif high < 0:
            out.append(f"The gain shrinks with {AXIS_LABELS[name]} ({text}).")
        else:
            out.append(f"No trend of the gain with {AXIS_LABELS[name]} is resolved ({text}).")
    return out


def _other_metrics(metric: Metric, pairs: pd.DataFrame) -> list[str]:
    better = worse = unclear = 0
    for key, rows in pairs.groupby("metric", sort=False):
        if key == metric.key:
            continue
        interval = gain.mean_interval(gain.by_point(rows)["mean"].dropna().to_numpy(float))
        if interval is None:
            continue
        better += interval[0] > 0
        worse += interval[1] < 0
        unclear += interval[0] <= 0 <= interval[1]
    total = better + worse + unclear
    if not total:
        return []
    parts = [
        f"{n} {word}"
        for n, word in ((better, "better with MAE"), (worse, "worse"), (unclear, "unresolved"))
        if n
    ]
    return [f"Of the other {_plural(total, 'metric')}: {', '.join(parts)}."]


def _charged_runs(metric: Metric, rows: pd.DataFrame) -> list[str]:
    own = gain.by_point(rows[rows["metric"] == metric.key]) if len(rows) else rows
    values = own["mean"].dropna().to_numpy(float) if len(own) else np.array([])
    if not len(values):
        return []
    interval = gain.mean_interval(values)
    band = f", 95 % interval {_range(interval, metric)}" if interval else ""
    return [
        f"Among finished runs of equal total training FLOPs, MAE stage charged in full, the gain in"
        f" {metric.label} is {amount(float(values.mean()), metric)}"
        f" ({_plural(len(values), 'grid point')}{band})."
    ]


def _charged(charged: pd.DataFrame) -> list[str]:
    compared = charged[~charged["why_ratio"].str.startswith("no finished")]
    if not len(compared):
        return []
    reached = compared[np.isfinite(compared["ratio"])]
    total = len(compared)
    out = []
    if len(reached):
        cheaper = int((reached["ratio"] < 1).sum())
        middle = math.exp(float(np.log(reached["ratio"]).mean()))
        out.append(
            f"With the MAE stage charged in full to each cell, MAE cells come down to their random"
            f" partner's final WSP validation loss in {len(reached)} of {_plural(total, 'pair')};"
            f" where they do, they have spent {middle:.2f} times its total training FLOPs by then"
            f" (geometric mean, range {reached['ratio'].min():.2f} to"
            f" {reached['ratio'].max():.2f}), cheaper in {cheaper or 'none'}."
        )
    else:
        out.append(
            f"In none of {_plural(total, 'pair')} does the MAE cell come down to its random"
            " partner's final WSP validation loss."
        )
    equal = compared[np.isfinite(compared["gain"])]
    if len(equal):
        better = int((equal["gain"] > 0).sum())
        out.append(
            f"At the random cell's total FLOPs the MAE cell has the lower loss in {better} of"
            f" {_plural(len(equal), 'comparable pair')}."
        )
    alone = int(compared["why"].str.startswith("the MAE stage alone").sum())
    if alone:
        out.append(
            f"In {_plural(alone, 'pair')} the MAE stage alone costs more than the random cell's"
            " whole budget, so equal FLOPs cannot be compared there."
        )
    return out


def _name(law: Law) -> str:
    return "MAE" if law.init == gain.WITH else law.init


def _exponents(metric: Metric, laws: list[Law]) -> list[str]:
    """What the power laws of the headline metric can and cannot say."""
    out = []
    for axis in ("params", "data"):
        own = [w for w in laws if w.metric.key == metric.key and w.axis == axis and not w.variant]
        fitted = [w for w in own if w.fit.is_identified]
        if not own:
            continue
        if len(fitted) < len(own):
            names = " and ".join(_name(w) for w in own if w not in fitted)
            out.append(f"A power law over {AXIS_LABELS[axis]} is not identified for {names} init.")
        if not fitted:
            continue
        parts = [
            f"{_name(w)} {w.fit.params['alpha']:.2f} ({w.fit.ci95['alpha'][0]:.2f} to"
            f" {w.fit.ci95['alpha'][1]:.2f})"
            for w in fitted
        ]
        text = f"Exponents of {metric.error_label} over {AXIS_LABELS[axis]}: {', '.join(parts)}"
        if len(fitted) == 2:
            a, b = (w.fit.ci95["alpha"] for w in fitted)
            apart = a[1] < b[0] or b[1] < a[0]
            text += "; the intervals do not overlap" if apart else "; the intervals overlap"
        out.append(text + ".")
    return out
