"""Intervals hold the truth at the rate they say, over 200 simulated studies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from analysis.fit import fit

STUDIES = 200
TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}

Simulated = tuple[str, dict[str, np.ndarray], np.ndarray, list[int] | None, float, float]


def surface(rng: np.random.Generator, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    n = np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), rows))
    d = np.exp(rng.uniform(np.log(1e9), np.log(3e11), rows))
    p = TRUTH
    return {"N": n, "D": d}, p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


def independent_rows(rng: np.random.Generator) -> Simulated:
    inputs, y = surface(rng, 60)
    y = y * np.exp(0.01 * rng.normal(size=60))
    return "chinchilla", inputs, y, None, 1e-3, TRUTH["alpha"]


def rows_of_runs(rng: np.random.Generator) -> Simulated:
    inputs, y = surface(rng, 90)
    run = np.repeat(np.arange(30), 3)
    inputs["N"] = inputs["N"][run]
    p = TRUTH
    y = p["E"] + p["A"] / inputs["N"] ** p["alpha"] + p["B"] / inputs["D"] ** p["beta"]
    y = y * np.exp(0.008 * rng.normal(size=30)[run] + 0.004 * rng.normal(size=90))
    return "chinchilla", inputs, y, list(run), 0.02, TRUTH["alpha"]


def a_grid_with_two_seeds(rng: np.random.Generator) -> Simulated:
    x = np.repeat(np.geomspace(1e3, 1e6, 6), 2)
    y = (5 * x**-0.35 + 0.2) * np.exp(0.01 * rng.normal(size=12))
    return "power_irreducible", {"x": x}, y, None, 0.02, 0.35


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "name"),
    [(independent_rows, "alpha"), (rows_of_runs, "alpha"), (a_grid_with_two_seeds, "b")],
)
def test_the_truth_is_inside_at_the_nominal_rate(
    make: Callable[[np.random.Generator], Simulated], name: str
) -> None:
    inside = 0
    for seed in range(STUDIES):
        law, inputs, y, groups, delta, truth = make(np.random.default_rng(seed))
        found = fit(law, inputs, y, groups=groups, delta=delta, bootstrap=200, seed=seed)
        # A refused study has no interval to be wrong; it may not be the usual end.
        low, high = found.ci95.get(name, (np.nan, np.nan))
        inside += low <= truth <= high
    # Not fewer than a binomial of 200 at 0.95 gives once in a thousand times. Intervals may be
    # wider than they need be (the bootstrap of a median is), not by so much that none misses.
    assert stats.binom.ppf(0.001, STUDIES, 0.95) <= inside < STUDIES
