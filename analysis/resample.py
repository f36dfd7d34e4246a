"""Bootstrap of a fit: rows, or whole runs where rows of a run share its luck.

Every draw is refitted from several starts (the optimum, the other local optima, a plain start), so
that a draw whose best optimum lies elsewhere finds it. Draws are then spread about the fit by
sqrt(n / (n - K)) and Student's t over the normal's quantile, for n resampled units: without it,
simulated studies with few units kept the truth too rarely (tests/analysis/test_coverage.py).

Shapes: B draws, P rows, K parameters, G units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.forms import Array
from analysis.solve import Problem, minimise


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Refitted draws and what became of the rest."""

    theta_BK: Array
    counts: dict[str, Any]


def units(num: int, groups: Sequence[Any] | None) -> tuple[Array, str]:
    """Unit of each row, (P,), and what a unit is.

    Runs where any has more than one row; they are the rows otherwise.
    """
    if groups is None:
        return np.arange(num), "rows"
    ids = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    unit_P = np.array([ids[name] for name in groups], dtype=int)
    return unit_P, "runs" if len(ids) < num else "rows"


def multiplicities(unit_P: Array, num: int, rng: np.random.Generator) -> Array:
    """How often each row is in each draw, (draws, P)."""
    many = int(unit_P.max()) + 1
    picks = rng.integers(0, many, size=(num, many))
    times = np.zeros((num, many))
    np.add.at(times, (np.arange(num)[:, None], picks), 1.0)
    return times[:, unit_P]


def refit(
    problem: Problem,
    theta_K: Array,
    others_BK: Array,
    weight_P: Array,
    groups: Sequence[Any] | None,
    num: int,
    seed: int,
) -> Drawn:
    """Draws units with replacement and fits each draw; draws with too few inputs are counted."""
    unit_P, unit = units(len(weight_P), groups)
    times_BP = multiplicities(unit_P, num, np.random.default_rng(seed))
    usable = times_BP[_is_identified(problem, times_BP)]
    many = int(unit_P.max()) + 1
    counts = {
        "unit": unit,
        "units": many,
        "draws": num,
        "used": len(usable),
        "not_identified": num - len(usable),
        "not_converged": 0,
        "seed": seed,
    }
    if not len(usable):
        return Drawn(theta_BK=np.zeros((0, problem.form.size)), counts=counts)
    weight_BP = usable * weight_P
    theta, converged = refit_draws(problem, theta_K, others_BK, weight_BP)
    counts["not_converged"] = int((~converged).sum())
    lower, upper = problem.form.limits(problem.u_IP, problem.ln_y_P)
    spread = theta_K + (theta - theta_K) * _widening(many, problem.form.size)
    return Drawn(theta_BK=np.clip(spread, lower, upper), counts=counts)


def _widening(many: int, size: int) -> float:
    free = max(1, many - size)
    return math.sqrt(many / free) * float(stats.t.ppf(0.975, free) / stats.norm.ppf(0.975))


def refit_draws(
    problem: Problem, theta_K: Array, others_BK: Array, weight_BP: Array
) -> tuple[Array, Array]:
    """The best of several starts for every draw, and whether it is an optimum."""
    starts = np.concatenate([theta_K[None], others_BK])
    num = len(weight_BP)
    if len(starts) > 1:
        tried = minimise(
            problem,
            np.repeat(starts, num, axis=0),
            np.tile(weight_BP, (len(starts), 1)),
            reweighted=4,
            newton=8,
        )
        best = tried.objective_B.reshape(len(starts), num).argmin(axis=0)
        begin = tried.theta_BK.reshape(len(starts), num, -1)[best, np.arange(num)]
    else:
        begin = np.repeat(starts, num, axis=0)
    solved = minimise(problem, begin, weight_BP, reweighted=4, newton=60)
    theta, converged = solved.theta_BK, solved.is_converged(problem.delta)
    if (~converged).any():
        again = minimise(
            problem, theta[~converged], weight_BP[~converged], reweighted=40, newton=150
        )
        theta[~converged] = again.theta_BK
        converged[~converged] = again.is_converged(problem.delta)
    return theta, converged


def _is_identified(problem: Problem, times_BP: Array) -> Array:
    """Draws with enough distinct rows and values of every input."""
    has = times_BP > 0
    good = has.sum(axis=1) >= problem.form.size
    for u_P in problem.u_IP:
        _, place = np.unique(u_P, return_inverse=True)
        seen = np.zeros((len(times_BP), int(place.max()) + 1), bool)
        rows, columns = np.nonzero(has)
        seen[rows, place[columns]] = True
        good &= seen.sum(axis=1) >= 3
    return good


def ends(draws: Array) -> tuple[Array, Array]:
    """95 % percentile interval over the first axis of (draws, ...); an end may be infinite.

    A scale such as exp(800) is, and numpy makes nan of two of them.
    """
    most = np.finfo(float).max / 4
    found = np.percentile(np.clip(draws, -most, most), [2.5, 97.5], axis=0)
    low, high = np.where(np.abs(found) > 1e290, np.copysign(math.inf, found), found)
    return low, high
