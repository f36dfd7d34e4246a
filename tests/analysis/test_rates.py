"""Rates over sizes: the fit against scipy and a known law, and the report's section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtree import Spec, write_json, write_tree
from scipy import stats

from analysis.report import build
from analysis.tuning import fit_rate, fits, load_tuning

SPEC = Spec(sizes=["xs", "s", "m"], data=[1_000, 4_000], seeds=[0], tasks=("probe",))
PARAMS = {"xs": 8_000, "s": 30_000, "m": 120_000}


def law(params: float, init: str) -> float:
    return (2.0 if init == "mae" else 1.0) * params**-0.4


def write_search(root: Path, sizes: list[str]) -> None:
    """Trials about the law: loss grows with the squared distance of the logarithms."""
    groups = []
    for size in sizes:
        for init in ("random", "mae"):
            best = law(PARAMS[size], init)
            trials: list[dict[str, Any]] = []
            for number, away in enumerate((-1.5, -0.5, 0.0, 1.0)):
                value = 3 + away**2
                row = {"outcome": "finished", "value": value, "points": {"8": value}}
                trials.append({"number": number, "set": {"wsp.lr": best * np.exp(away)}, **row})
            lost = {"outcome": "pruned", "value": None, "points": {"1": 6.0, "2": 5.5}}
            trials.append({"number": 4, "set": {"wsp.lr": best * 9}, **lost})
            nan = {"outcome": "diverged", "value": None, "points": {}}
            trials.append({"number": 5, "set": {"wsp.lr": best * 20}, **nan})
            groups.append(
                {
                    "label": f"size={size},init={init}",
                    "match": {"size": size, "init": init},
                    "params": PARAMS[size],
                    "trials": trials,
                    "counts": {"finished": 4, "pruned": 1, "diverged": 1},
                    "best": {"number": 2, "set": trials[2]["set"], "value": 3.0},
                    "at_edge": {},
                }
            )
    facts = {"schema": 1, "study": "made", "metric": "wsp.val_loss", "trials_per_group": 6}
    used = {arm: 6 * len(sizes) for arm in ("random", "mae")}
    write_json(
        root / "tune/made.json",
        {**facts, "at": {"data": 1000}, "budget_used": used, "groups": groups},
    )


def test_fit_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    params = np.array([1e4, 5e4, 3e5, 2e6, 9e6])
    rates = 3 * params**-0.3 * np.exp(0.2 * rng.standard_normal(5))
    own, other = fit_rate(params, rates), stats.linregress(np.log(params), np.log(rates))
    assert own.exponent == pytest.approx(other.slope)
    assert np.log(own.scale) == pytest.approx(other.intercept)
    half = stats.t.ppf(0.975, 3) * other.stderr
    assert own.ci95 == pytest.approx((other.slope - half, other.slope + half))
    # At x = 1 the line is the intercept, and its band that of the intercept.
    low, high = own.band(np.array([1.0]))
    width = stats.t.ppf(0.975, 3) * other.intercept_stderr
    assert (np.log(high) - np.log(low)) / 2 == pytest.approx(width)


def test_interval_holds_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    params, held = np.array([1e4, 1e5, 1e6, 1e7]), 0
    for _ in range(1000):
        low, high = fit_rate(params, params**-0.3 * np.exp(0.3 * rng.standard_normal(4))).ci95
        held += low <= -0.3 <= high
    assert 930 <= held <= 970


def test_two_sizes_are_refused() -> None:
    law_ = fit_rate([1e4, 1e5, 1e5], [1e-2, 1e-3, 2e-3])
    assert law_.reason == "2 sizes; at least 3 needed" and np.isnan(law_.exponent)


def test_report_shows_the_rates_of_both_arms(tmp_path: Path) -> None:
    write_tree(tmp_path / "runs", SPEC)
    write_search(tmp_path / "runs", ["xs", "s", "m"])
    tuning = load_tuning(tmp_path / "runs", "made")
    assert tuning is not None
    for (_, init), fit in fits(tuning).items():
        assert fit.exponent == pytest.approx(-0.4)
        assert fit.scale == pytest.approx(law(1.0, init))
    folder = build(tmp_path / "runs", "made", tmp_path / "out").index.parent
    assert (folder / "figures/learning-rates-wsp-lr.png").exists()
    page = (folder / "report.md").read_text()
    assert "## Learning rates: wsp.lr" in page and "exponent -0.40" in page
    assert "random init 18, MAE init 18" in page
    assert "| size=s,init=mae | wsp.lr = " in page


def test_two_sizes_are_drawn_without_a_line_and_no_search_is_no_section(tmp_path: Path) -> None:
    write_tree(tmp_path / "runs", SPEC)
    plain = build(tmp_path / "runs", "made", tmp_path / "plain").index.parent
    assert "Learning rates" not in (plain / "report.md").read_text()
    write_search(tmp_path / "runs", ["xs", "s"])
    folder = build(tmp_path / "runs", "made", tmp_path / "out").index.parent
    assert "no fit, 2 sizes; at least 3 needed" in (folder / "report.md").read_text()
