"""Approach 1: the compute-optimal model and data size from the envelope of many training curves.

Hoffmann et al. 2022 (arXiv 2203.15556, sec. 3.1). Two rules pick the envelope: the lower convex
hull of (ln C, ln L) where it falls (as McLeish et al. 2025, Gemstones, arXiv 2502.06857), or the
smallest loss in each of a number of log-spaced bins of C.

What the published rule takes as an optimum often is none. Left of its first crossing the smallest
model is on the envelope because nothing smaller was trained, so is the largest at the right, and
a run that ends on the envelope might have stayed there. On noise-free surfaces of Chinchilla's
kind such points made the exponent a too small by 0.03 to 0.14, with 20 sizes as with 5; without
them the hull gives it to 0.003 from seven sizes on, 0.015 with five. So only sizes count that were
beaten from both sides (points="interior"), and each counts once, at the geometric mean of its
points: between optima N stands still while C grows, and m such equal steps, a vote per point,
make a slope too small by 1/m^2. points="all" is the published rule.

Intervals are wide: a draw of runs lacks a third of the sizes. Over simulated studies of 12 runs
with 0.1 to 0.5 % of noise the 95 % interval held the truth in all that had one. Noise bends a
itself, too small by 0.012 at 0.5 %, for the envelope takes runs of good luck.

Shapes: P points of the curves, R units (runs or rows), S sizes, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from analysis.hull import Curves
from analysis.optimum import (
    MIN_DECADES,
    MIN_SIZES,
    Array,
    Bools,
    Ints,
    OptimumFit,
    Rows,
    bootstrap_laws,
    intervals,
    named,
    read_rows,
    sizes_of,
    span_decades,
)
from harness.errors import UserError

MIN_POINTS = 4
BINS_PER_DECADE = 10
Rule = Literal["hull", "bins"]
Points = Literal["interior", "all"]


def fit_envelope(
    n: Sequence[float] | Array,
    d: Sequence[float] | Array,
    loss: Sequence[float] | Array,
    c: Sequence[float] | Array | None = None,
    runs: Sequence[Any] | None = None,
    finished: Sequence[bool] | Bools | None = None,
    *,
    rule: Rule = "hull",
    points: Points = "interior",
    bins: int | None = None,
    bootstrap: int = 4000,
    seed: int = 0,
) -> OptimumFit:
    """N* = G C^a, D* = H C^b, L* = K C^-gamma through the envelope of all rows.

    n parameters, d samples, c in FLOPs (or any unit of cost; 6 n d when None), a row per point of
    a curve. `runs` names the run of each row; runs, not rows, are resampled where one has several.
    `finished` says of each row whether its schedule had ended there: both kinds together are
    refused, for a loss in mid-schedule is higher than a finished run of that length would have,
    which bends the envelope. `bins` counts over the whole range of C (default: 10 a decade).
    Refused, with the reason: too few points or sizes, less than a decade of C.
    Raises UserError for columns that do not fit together and for a run with two sizes.
    """
    rows = read_rows(n, d, loss, c, runs)
    if finished is not None and len(finished) != len(n):
        raise UserError(f"finished has {len(finished)} values for {len(n)} rows; give one per row")
    settings: dict[str, Any] = {"rule": rule, "points": points}
    warnings = list(rows.warnings)
    facts: dict[str, Any] = {
        "law": "envelope",
        "rows_used": len(rows.n),
        "rows_dropped": rows.dropped,
        "settings": settings,
    }
    done = None if finished is None else np.asarray(finished, bool)[rows.row]
    refusal = _why_not(rows, done)
    if refusal:
        return OptimumFit(status="refused", reason=refusal, warnings=tuple(warnings), **facts)
    warnings += _about_schedules(rows, done)
    if rule == "bins":
        settings["bins"] = _num_bins(rows.c) if bins is None else bins
    curves = Curves(rows, settings.get("bins", 0))
    per_size = points == "interior"
    whole = np.ones((1, rows.num_units))
    none, on = curves.envelope(whole)
    used = on[curves.interior(none, on, whole)] if per_size else on
    refusal = _too_few(curves, on, used)
    table = _table(curves, on, used)
    if refusal:
        return OptimumFit(
            status="refused", reason=refusal, warnings=tuple(warnings), points=table, **facts
        )

    def laws_of(times_BR: Array) -> Array:
        draw_Q, point_Q = curves.envelope(times_BR)
        if per_size:
            inner = curves.interior(draw_Q, point_Q, times_BR)
            draw_Q, point_Q = draw_Q[inner], point_Q[inner]
        return curves.laws(draw_Q, point_Q, len(times_BR), per_size)

    theta = curves.laws(np.zeros_like(used), used, 1, per_size)[0]
    warnings += _about_shape(curves, on, used, rule)
    strata = [np.arange(rows.num_units)]
    draws, ci95, counts, more = intervals(
        bootstrap_laws(laws_of, strata, rows.num_units, bootstrap, seed, len(curves.x)),
        rows.unit_kind,
        rows.num_units,
        f"had fewer than {MIN_SIZES} sizes on the envelope that count",
    )
    params = named(theta)
    c_used = np.exp(curves.x[used])
    return OptimumFit(
        status="converged",
        params=params,
        ci95=ci95,
        objective=_squares(curves, used, per_size, theta),
        warnings=(*warnings, *more),
        bootstrap=counts,
        points=table,
        c_range=(float(c_used.min()), float(c_used.max())),
        draws=draws,
        **facts,
    )


def _num_bins(c: Array) -> int:
    return max(5, round(BINS_PER_DECADE * span_decades(c)))


def _squares(curves: Curves, used: Ints, per_size: bool, theta: Array) -> float:
    _, x, y = curves.optima(np.zeros_like(used), used, per_size)
    return float(((y[:, 0] - theta[0] - theta[1] * x) ** 2).sum())


# -- refusals and warnings ------------------------------------------------------------------


def _why_not(rows: Rows, done: Bools | None) -> str | None:
    if not len(rows.n):
        return "no row has a finite, positive N, D, C and loss"
    if done is not None and done.any() and not done.all():
        return (
            f"mixed schedules: {int(done.sum())} rows of finished runs and"
            f" {int((~done).sum())} from before the end of a schedule; give one kind"
        )
    sizes = len(sizes_of(rows.n)[0])
    if sizes < MIN_SIZES:
        return f"{sizes} distinct N; at least {MIN_SIZES} needed"
    return None


def _about_schedules(rows: Rows, done: Bools | None) -> list[str]:
    if done is not None and not done.any():
        return [
            "all rows are from before the end of a schedule: the envelope of such rows has another"
            " slope than that of finished runs"
        ]
    if done is None and rows.unit_kind == "runs":
        return [
            "not known which rows are from finished schedules; rows from before the end of a"
            " decaying schedule bend the envelope"
        ]
    return []


def _too_few(curves: Curves, on: Ints, used: Ints) -> str | None:
    sizes = curves.sizes_of(on)
    if len(sizes) == 1:
        return f"all {len(on)} points of the envelope are of one size, N = {sizes[0]:.6g}"
    if len(on) < MIN_POINTS:
        return f"too few points on the envelope ({len(on)}); at least {MIN_POINTS} needed"
    counted = curves.sizes_of(used)
    if len(counted) < MIN_SIZES:
        return (
            f"{len(counted)} of the {len(sizes)} sizes on the envelope were beaten from both sides;"
            f" at least {MIN_SIZES} needed: smaller and larger models around them, and runs of each"
            " that go on until they leave the envelope"
        )
    if len(used) < MIN_POINTS:
        return f"too few optima on the envelope ({len(used)}); at least {MIN_POINTS} needed"
    span = span_decades(np.exp(curves.x[used]))
    if span < MIN_DECADES - 1e-9:
        return f"the optima span {span:.2f} decades of C; at least {MIN_DECADES:g} needed"
    return None


def _about_shape(curves: Curves, on: Ints, used: Ints, rule: Rule) -> list[str]:
    found = []
    between = curves.sizes[1:-1]
    absent = len(between) - len(np.intersect1d(between, curves.sizes_of(on)))
    if 3 * absent > len(between):
        found.append(
            f"{absent} of the {len(between)} sizes between the smallest and the largest are nowhere"
            " on the envelope: noise between runs chooses the optima, and makes a too small"
        )
    inner = np.intersect1d(curves.sizes_of(on), between)
    ended = np.setdiff1d(inner, curves.sizes_of(used))
    if len(ended):
        names = ", ".join(f"{size:.4g}" for size in ended[:6])
        found.append(
            f"runs of {len(ended)} sizes start or end on the envelope (N = {names}"
            f"{', ...' if len(ended) > 6 else ''}): how long they would stay there is not known"
        )
    if np.array_equal(on, used):
        ends = int(np.isin(curves.size[on], [0, len(curves.sizes) - 1]).sum())
        found.append(
            "every point of the envelope counts, also where no smaller or larger model, no shorter"
            " or longer run was there to win: a is usually too small"
            if ends or len(ended)
            else "every point of the envelope has one vote"
        )
    if len(curves.sizes_of(used)) == MIN_SIZES:
        found.append(f"only {MIN_SIZES} sizes carry the lines; read with care")
    if rule == "bins" and curves.bins_skipped:
        found.append(f"{curves.bins_skipped} bins of C hold one size only and are left out")
    return found


def _table(curves: Curves, on: Ints, used: Ints) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "row": int(curves.row[p]),
            "c": float(np.exp(curves.x[p])),
            "n": float(curves.n[p]),
            "d": float(curves.d[p]),
            "loss": float(np.exp(curves.y[p])),
            "used": bool(p in used),
        }
        for p in on[np.argsort(curves.x[on], kind="stable")]
    )
