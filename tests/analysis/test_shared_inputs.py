"""Rows that share their inputs (seeds of a grid point): computed by point, fitted all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import gain, solve
from analysis.fit import fit
from analysis.forms import CHINCHILLA
from analysis.joint import joint
from analysis.shapes import FORMS
from analysis.solve import Problem, minimise, objective, promising

POINTS, SEEDS = 8, 25


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D, y of a grid with many seeds, in no order."""
    rng = np.random.default_rng(seed)
    sizes, data = 8_000 * 1.8 ** np.arange(POINTS), 500 * 1.8 ** np.arange(POINTS)
    n, d = (g.ravel() for g in np.meshgrid(np.repeat(sizes, SEEDS), data))
    order = rng.permutation(len(n))
    n, d = n[order], d[order]
    y = (1.5 + 40 * n**-0.4 + 60 * d**-0.5) * np.exp(rng.normal(0, 0.01, len(n)))
    return n, d, y


@pytest.mark.parametrize("law", ["chinchilla", "tied", "kaplan", "shifted"])
def test_fit_by_point_is_the_fit_by_row(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, y = rows()
    one = d == d.max()
    inputs = {"N": n, "D": d} if FORMS[law].inputs == ("N", "D") else {"x": n[one]}
    y = y if "N" in inputs else y[one]
    found: list[Any] = []
    for least in (2, 10**9):
        monkeypatch.setattr(solve, "_WORTH_SORTING", least)
        found.append(fit(law, inputs, y, delta=0.02, bootstrap=0))
    assert found[0].status == found[1].status
    assert found[0].objective == pytest.approx(found[1].objective, rel=1e-8)
    assert found[0].params == pytest.approx(found[1].params, rel=1e-4)


def test_m4_of_equal_x_is_that_of_each_x() -> None:
    form, u = FORMS["m4"], np.linspace(-2.0, 2.0, 7)
    theta = np.array([[-1.0, 0.4, -1.0, 0.3, 0.5], [0.0, 0.8, -3.0, -0.2, 1.0]])
    place = np.array([3, 0, 0, 6, 3, 1])
    value, slopes = form.jacobian(theta, u[None])
    again, of_rows = form.jacobian(theta, u[None, place])
    np.testing.assert_array_equal(again, value[:, place])
    np.testing.assert_array_equal(of_rows, slopes[:, place])
    np.testing.assert_array_equal(form.value(theta, u[None, place]), again)


def test_marked_rows_are_points_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, y = rows()
    marked = (np.arange(len(n)) % 2).astype(float)
    y = np.where(marked > 0, 0.9 * y, y)
    logs = np.log(np.stack([n, d]))
    centre = logs.mean(axis=1)
    form = joint(CHINCHILLA, ("E", "A"), marked, centre)
    problem = Problem(form=form, u_IP=logs - centre[:, None], ln_y_P=np.log(y), delta=0.02)
    weight = np.random.default_rng(1).integers(0, 3, (3, len(n))).astype(float)
    starts = np.repeat(form.starts(problem.u_IP, y)[20:21], 3, axis=0)
    found = []
    for least in (2, 10**9):
        monkeypatch.setattr(solve, "_WORTH_SORTING", least)
        found.append(minimise(problem, starts, weight, reweighted=20, newton=60))
    np.testing.assert_allclose(found[0].theta_BK, found[1].theta_BK, rtol=1e-5, atol=1e-7)
    # The weights went with their rows.
    value = objective(problem, found[0].theta_BK, weight)
    np.testing.assert_allclose(found[0].objective_B, value, rtol=1e-12)


def test_promising_starts_reach_the_optimum_of_all_starts() -> None:
    n, d, y = rows()
    logs = np.log(np.stack([n, d]))
    u = logs - logs.mean(axis=1, keepdims=True)
    problem = Problem(form=CHINCHILLA, u_IP=u, ln_y_P=np.log(y), delta=0.02)
    starts = CHINCHILLA.starts(u, y)
    few = promising(problem, y)
    assert len(few) <= 4 < len(starts)
    best = [
        minimise(problem, s, np.ones((1, len(y))), reweighted=40, newton=100).objective_B.min()
        for s in (few, starts)
    ]
    assert best[0] == pytest.approx(best[1], rel=1e-9)
    short = Problem(form=CHINCHILLA, u_IP=u[:, :100], ln_y_P=np.log(y[:100]), delta=0.02)
    np.testing.assert_array_equal(promising(short, y[:100]), CHINCHILLA.starts(u[:, :100], y[:100]))


def test_gains_by_point_are_those_of_frames() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "variant": rng.choice(["", "wsp.lr = 0.1"], 200),
            "size": "s",
            "params": rng.choice([1e3, 1e4, np.nan], 200),
            "data": rng.choice([10.0, 100.0], 200),
            "gain": np.where(rng.random(200) < 0.3, np.nan, rng.normal(size=200)),
            "why": rng.choice(["", "mae: failed"], 200),
        }
    )
    found = gain.by_point(frame)
    groups = list(frame.groupby(gain.POINT, sort=False, dropna=False))
    assert len(found) == len(groups) == 12
    for row, (key, group) in zip(found.to_dict("records"), groups, strict=True):
        assert [row[k] for k in gain.POINT] == pytest.approx(list(key), nan_ok=True)
        assert row["mean"] == pytest.approx(group["gain"].mean(), rel=1e-14)
        assert (row["low"], row["high"]) == (group["gain"].min(), group["gain"].max())
        assert (row["seeds"], row["expected"]) == (group["gain"].count(), len(group))
        assert row["why"] == "; ".join(dict.fromkeys(w for w in group["why"] if w))
    assert list(gain.by_point(frame.iloc[:0])) == list(found)
