"""Approach 2: the compute-optimal model and data size from the valleys of equal compute.

Hoffmann et al. 2022 (arXiv 2203.15556, sec. 3.2): rows of equal C, a parabola in ln N through
their losses, its minimum N*; then lines in log-log through the minima.

The parabola is of the loss and not of its logarithm: on L = E + A N^-alpha + B D^-beta the valleys
of all C then have one shape, exp(-alpha u) / alpha + exp(beta u) / beta with u = ln N - ln N*, so
N that lie alike around every minimum give the exponent exactly, whatever alpha and beta; in ln L
the irreducible loss changes the shape with C. The minima are moved all the same, for with
alpha != beta the shape is no parabola: N even in ln N over a half-range W, their middle delta from
the minimum, move ln N* by (beta - alpha) (delta^2 / 2 - W^2 / 10) to leading order, and one grid of
N for all C, where delta falls with C, moves the exponent. What that may be is worked out for the
rows at hand: the same fit to valleys of this shape with alpha - beta = 0.2 and -0.2, three times
the 0.06 of Hoffmann et al., around the minima found. More than 10 % of N* or 0.02 of a is warned
of.

D* is read at N* off the rows' own D, never from a rule such as C / 6 N: the same least squares
through ln D and ln C interpolate both, so C = k N D of the rows holds at the optimum too.

Over 100 simulated studies of 6 classes with 7 sizes the 95 % interval held the truth in 97 with
0.2 % of noise, in 98 with 0.5 %.

Shapes: P rows, R units (runs or rows), K classes of equal C, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.optimum import (
    MIN_DECADES,
    MIN_SIZES,
    Array,
    Ints,
    OptimumFit,
    Rows,
    bootstrap_laws,
    intervals,
    named,
    power_laws,
    read_rows,
    sizes_of,
    span_decades,
)
from harness.errors import UserError

TOLERANCE = 0.05
MIN_CLASSES = 3
SKEWED = ((0.45, 0.25), (0.25, 0.45))
"""alpha and beta of the valleys that the sampling is tried on."""
MAX_OFF_N = 0.1
MAX_OFF_A = 0.02


def fit_isoflop(
    n: Sequence[float] | Array,
    d: Sequence[float] | Array,
    loss: Sequence[float] | Array,
    c: Sequence[float] | Array | None = None,
    runs: Sequence[Any] | None = None,
    *,
    tolerance: float = TOLERANCE,
    bootstrap: int = 4000,
    seed: int = 0,
) -> OptimumFit:
    """N* = G C^a, D* = H C^b, L* = K C^-gamma through the minima of parabolas of equal compute.

    n parameters, d samples, c in FLOPs (or any unit of cost; 6 n d when None). Rows are of one
    class that lie within `tolerance` of its middle C, the fullest class first. A class counts if
    it has four distinct N (three, where fewer than three classes have four) and its parabola a
    minimum between the smallest and the largest of them; `points` says of the others why not, and
    their rows are among those dropped. Bootstrap: rows within their class, every parabola fitted
    again; runs, over all classes at once, where `runs` names one for several rows.
    Refused, with the reason: fewer than three classes that count, less than a decade of C.
    Raises UserError for columns that do not fit together or a tolerance that is not above 0.
    """
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance {tolerance:g}: expected a share between 0 and 1, such as 0.05")
    rows = read_rows(n, d, loss, c, runs)
    settings: dict[str, Any] = {
        "tolerance": tolerance,
        "parabola_of": "loss",
        "parabola_in": "ln N",
    }
    classes = [_Class(rows, members) for members in _group(rows.c, tolerance)]
    valleys = _prefer_tested([_check(one) for one in classes])
    good = [one for one, valley in zip(classes, valleys, strict=True) if valley["used"]]
    out = [
        {"row": int(rows.row[p]), "reason": valley["reason"]}
        for one, valley in zip(classes, valleys, strict=True)
        if not valley["used"]
        for p in one.members
    ]
    facts: dict[str, Any] = {
        "law": "isoflop",
        "rows_used": sum(len(one.members) for one in good),
        "rows_dropped": tuple(sorted([*rows.dropped, *out], key=lambda r: r["row"])),
        "settings": settings,
        "points": tuple(valleys),
    }
    refusal = _too_few(rows, valleys)
    if refusal:
        return OptimumFit(status="refused", reason=refusal, warnings=rows.warnings, **facts)

    def laws_of(times_BR: Array) -> Array:
        values_K = [one.minimum(times_BR[:, one.unit]) for one in good]
        c_BK, *others = (np.stack(values, axis=1) for values in zip(*values_K, strict=True))
        draw, column = np.nonzero(np.isfinite(c_BK))
        y_Q3 = np.stack([values[draw, column] for values in others], axis=1)
        theta = power_laws(draw, c_BK[draw, column], y_Q3, len(c_BK))
        enough = np.bincount(draw, minlength=len(c_BK)) >= MIN_CLASSES
        return np.where(enough[:, None], theta, np.nan)

    theta = laws_of(np.ones((1, rows.num_units)))[0]
    strata = [one.unit for one in good]
    if rows.unit_kind == "runs":
        strata = [np.unique(np.concatenate(strata))]
    draws, ci95, counts, more = intervals(
        bootstrap_laws(laws_of, strata, rows.num_units, bootstrap, seed, len(rows.n)),
        rows.unit_kind,
        sum(map(len, strata)),
        f"had a minimum in fewer than {MIN_CLASSES} classes",
    )
    used = [valley for valley in valleys if valley["used"]]
    log_c, log_n = (np.log([valley[key] for valley in used]) for key in "cn")
    off_n, off_a = _moved_by_shape(good, log_c, log_n)
    settings["at_alpha_beta_0.2_apart"] = {"n_off": off_n, "a_off": off_a}
    return OptimumFit(
        status="converged",
        params=named(theta),
        ci95=ci95,
        objective=float(((log_n - theta[0] - theta[1] * log_c) ** 2).sum()),
        warnings=(*rows.warnings, *_about_sampling(used, off_n, off_a), *more),
        bootstrap=counts,
        c_range=(min(v["c"] for v in used), max(v["c"] for v in used)),
        draws=draws,
        **facts,
    )


# -- classes of equal compute ---------------------------------------------------------------


def _group(c: Array, tolerance: float) -> list[Ints]:
    """Rows by class, by C: the window of C with the most rows is one, and again with the rest.

    A window reaches `tolerance` to both sides of its middle; of equally full ones the lowest goes
    first.
    """
    left = np.argsort(c, kind="stable")
    classes = []
    while len(left):
        x = np.log(c[left])
        ends = np.searchsorted(x, x + 2 * np.log1p(tolerance) + 1e-12, side="right")
        start = int(np.argmax(ends - np.arange(len(x))))
        inside = slice(start, ends[start])
        classes.append(left[inside])
        left = np.delete(left, inside)
    return sorted(classes, key=lambda members: c[members[0]])


class _Class:
    """Rows of equal C."""

    def __init__(self, rows: Rows, members: Ints) -> None:
        self.members = members
        self.unit = rows.unit[members]
        self.n, self.d = rows.n[members], rows.d[members]
        self.c, self.loss = rows.c[members], rows.loss[members]
        self.sizes, self.size = sizes_of(self.n)
        ends = np.log([self.n.min(), self.n.max()])
        self.centre = float(ends.mean())
        self.half = float(np.diff(ends)[0] / 2) or 1.0
        # ln N from -1 to 1: the normal equations are as well conditioned as they can be.
        self.u = (np.log(self.n) - self.centre) / self.half
        self.u_sizes = (np.log(self.sizes) - self.centre) / self.half

    def fit(self, times_BP: Array) -> tuple[Array, Array]:
        """Coefficients [B, 3, 4] of parabolas in u: loss, ln C, ln D; and u of the minimum.

        NaN with fewer than three distinct N; the place is NaN where it is no minimum inside.
        """
        powers_P3 = self.u[:, None] ** np.arange(3)
        values_P3 = np.stack([self.loss, np.log(self.c), np.log(self.d)], axis=1)
        products = np.einsum("pi,pj->pij", powers_P3, powers_P3).reshape(len(self.u), 9)
        left = (times_BP @ products).reshape(-1, 3, 3)
        right = times_BP @ np.einsum("pi,pj->pij", powers_P3, values_P3).reshape(len(self.u), 9)
        present_BS = times_BP @ (self.size[:, None] == np.arange(len(self.sizes))) > 0
        enough = present_BS.sum(axis=1) >= MIN_SIZES
        coefficients = np.full((len(times_BP), 3, 3), np.nan)
        coefficients[enough] = np.linalg.solve(left[enough], right[enough].reshape(-1, 3, 3))
        _, slope, bend = coefficients[:, :, 0].T
        with np.errstate(divide="ignore", invalid="ignore"):
            u = -slope / (2 * bend)
            low = self.u_sizes[present_BS.argmax(axis=1)]
            high = self.u_sizes[-1 - present_BS[:, ::-1].argmax(axis=1)]
            return coefficients, np.where((bend > 0) & (u > low) & (u < high), u, np.nan)

    def minimum(self, times_BP: Array) -> tuple[Array, Array, Array, Array]:
        """ln C, ln N*, ln D*, ln L* of each draw; NaN where its parabola has no minimum inside."""
        coefficients, u = self.fit(times_BP)
        loss, log_c, log_d = np.einsum("bij,bi->jb", coefficients, u[:, None] ** np.arange(3))
        with np.errstate(invalid="ignore"):
            log_loss = np.log(np.where(loss > 0, loss, np.nan))
        found = np.isfinite(log_loss)
        log_n = self.centre + self.half * u
        return tuple(np.where(found, v, np.nan) for v in (log_c, log_n, log_d, log_loss))  # type: ignore[return-value]


def _check(one: _Class) -> dict[str, Any]:
    """The valley of a class: its minimum, or why there is none."""
    about: dict[str, Any] = {
        "c": float(np.exp(np.log(one.c).mean())),
        "rows": [int(p) for p in one.members],
        "sizes": len(one.sizes),
        "n_range": [float(one.n.min()), float(one.n.max())],
        "used": False,
    }
    if len(one.sizes) < MIN_SIZES:
        reason = f"C = {about['c']:.4g}: {len(one.sizes)} distinct N; at least {MIN_SIZES} needed"
        return {**about, "reason": reason}
    whole = np.ones((1, len(one.members)))
    coefficients, u = one.fit(whole)
    # In ln N - centre, so that a figure can draw it.
    scale = one.half ** -np.arange(3)
    about["parabola"] = {"centre": one.centre, "coefficients": list(coefficients[0, :, 0] * scale)}
    if not coefficients[0, 2, 0] > 0:
        return {**about, "reason": f"C = {about['c']:.4g}: the losses do not bend up, no minimum"}
    if np.isnan(u[0]):
        lowest = -coefficients[0, 1, 0] / (2 * coefficients[0, 2, 0])
        side = "below the smallest" if lowest < 0 else "above the largest"
        return {**about, "reason": f"C = {about['c']:.4g}: the minimum is {side} N of its class"}
    log_c, log_n, log_d, log_loss = (float(v[0]) for v in one.minimum(whole))
    return {
        **about,
        "used": True,
        "reason": "",
        "c": float(np.exp(log_c)),
        "n": float(np.exp(log_n)),
        "d": float(np.exp(log_d)),
        "loss": float(np.exp(log_loss)),
    }


def _prefer_tested(valleys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the classes of three sizes, where enough others have more.

    A parabola meets three points whatever they are; classes that come about by chance, from rows
    that were not planned for equal compute, are mostly of this kind.
    """
    more = [v for v in valleys if v["used"] and v["sizes"] > MIN_SIZES]
    if len(more) < MIN_CLASSES:
        return valleys
    reason = f"{MIN_SIZES} distinct N, which a parabola always meets; other classes have more"
    exact = {"used": False, "reason": reason}
    return [
        {**v, **exact, "reason": f"C = {v['c']:.4g}: {reason}"}
        if v["used"] and v["sizes"] == MIN_SIZES
        else v
        for v in valleys
    ]


def _too_few(rows: Rows, valleys: list[dict[str, Any]]) -> str | None:
    if not len(rows.n):
        return "no row has a finite, positive N, D, C and loss"
    sizes = len(sizes_of(rows.n)[0])
    if sizes < MIN_SIZES:
        return f"{sizes} distinct N; at least {MIN_SIZES} needed"
    used = [valley for valley in valleys if valley["used"]]
    if len(used) < MIN_CLASSES:
        lost = [valley["reason"] for valley in valleys if not valley["used"]]
        more = f" ({'; '.join(lost[:3])}{'; ...' if len(lost) > 3 else ''})" if lost else ""
        return (
            f"{len(used)} of {len(valleys)} classes of equal compute have a minimum; at least"
            f" {MIN_CLASSES} needed{more}"
        )
    span = span_decades(np.array([valley["c"] for valley in used]))
    if span < MIN_DECADES - 1e-9:
        return f"the minima span {span:.2f} decades of C; at least {MIN_DECADES:g} needed"
    return None


def _moved_by_shape(good: list[_Class], log_c: Array, log_n: Array) -> tuple[float, float]:
    """How far skewed valleys, sampled as the rows are, would move N* (a share) and a."""
    off_n, off_a = [], []
    for alpha, beta in SKEWED:
        moved = []
        for one, at in zip(good, log_n, strict=True):
            u = np.log(one.n) - at
            bend, slope, _ = np.polyfit(u, np.exp(-alpha * u) / alpha + np.exp(beta * u) / beta, 2)
            moved.append(-slope / (2 * bend))
        off_n.append(float(np.expm1(np.abs(moved).max())))
        off_a.append(float(abs(np.polyfit(log_c, moved, 1)[0])))
    return max(off_n), max(off_a)


def _about_sampling(used: list[dict[str, Any]], off_n: float, off_a: float) -> list[str]:
    found = []
    if off_n > MAX_OFF_N or off_a > MAX_OFF_A:
        found.append(
            "N lie too far from the minima, or not alike around them, for parabolas: with alpha and"
            f" beta 0.2 apart N* would be off by up to {off_n:.0%} and a by up to {off_a:.3f}"
        )
    exact = sum(valley["sizes"] == MIN_SIZES for valley in used)
    if exact:
        found.append(
            f"{exact} of {len(used)} classes have {MIN_SIZES} distinct N: the parabola meets them"
            " whatever the valley's shape"
        )
    if len(used) == MIN_CLASSES:
        found.append(f"only {MIN_CLASSES} classes carry the lines; read with care")
    return found
