"""The power law: truth recovery, coverage, each refusal, evidence."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from analysis.fit import DELTA, fit_power, held_out

X = np.geomspace(1e4, 1e6, 6)


@pytest.mark.parametrize(
    ("floor", "scale", "alpha"),
    [(1.7, 300.0, 0.5), (0.2, 5.0, 0.2), (0.05, 40.0, 0.35), (3.0, 1e4, 1.1), (1.0, 1.0, 0.05)],
)
def test_recovers_a_noise_free_law(floor: float, scale: float, alpha: float) -> None:
    fit = fit_power(X, floor + scale * X**-alpha, bootstrap=0)
    assert fit.status == "converged"
    assert fit.params == pytest.approx({"E": floor, "A": scale, "alpha": alpha}, rel=1e-6)
    assert fit.starts_at_best > fit.starts / 2
    assert fit.gradient_norm == pytest.approx(0.0, abs=1e-9)


def test_reaches_the_objective_of_a_general_optimiser() -> None:
    rng = np.random.default_rng(3)
    y = (0.4 + 30 * X**-0.4) * np.exp(rng.normal(0, 0.03, len(X)))
    fit = fit_power(X, y, bootstrap=0)

    def objective(t: np.ndarray) -> float:
        r = np.logaddexp(t[0], t[1] - t[2] * np.log(X)) - np.log(y)
        return float(np.where(abs(r) <= DELTA, r * r / 2, DELTA * (abs(r) - DELTA / 2)).sum())

    best = min(
        minimize(
            objective, start, method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-14}
        ).fun
        for start in ([-1, 3, 0.4], [-3, 2, 0.3], [-0.5, 6, 0.8], [-8, 1, 0.2])
    )
    assert fit.objective is not None
    assert fit.objective <= best * (1 + 1e-6)


def test_noisy_law_is_inside_its_interval_at_the_nominal_rate() -> None:
    x = np.repeat(np.geomspace(1e3, 1e5, 5), 2)
    inside = 0
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 0.01, len(x))
        fit = fit_power(x, (0.3 + 5 * x**-0.3) * np.exp(noise), bootstrap=200, seed=seed)
        low, high = fit.ci95["alpha"]
        inside += low <= 0.3 <= high
    # 38 expected; a binomial of 40 at 0.95 is below 33 once in 500 times.
    assert inside >= 33


def test_one_wild_point_does_not_move_the_law_far() -> None:
    x = np.repeat(X, 2)
    y = 0.5 + 50 * x**-0.4
    y[3] *= 1.5
    fit = fit_power(x, y, bootstrap=0)
    assert fit.params["alpha"] == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ([1e3, 1e4, 1e5, 1e6], "too few points"),
        ([1e3, 1e3, 1e3, 1e5, 1e5, 1e5], "2 distinct x"),
        ([1e3, 2e3, 4e3, 6e3, 8e3], "decades"),
        ([], "too few points"),
    ],
)
def test_refuses_what_cannot_identify_the_law(x: list[float], reason: str) -> None:
    fit = fit_power(x, [1.0] * len(x))
    assert fit.status == "refused"
    assert reason in fit.reason
    assert fit.params == {} and fit.ci95 == {}


def test_refuses_values_without_a_logarithm() -> None:
    assert fit_power(X, [1.0, 0.5, 0.2, 0.1, 0.0, 0.1]).status == "refused"


@pytest.mark.parametrize(
    ("y", "bound"),
    [(5 * X**-0.3, "E at 0"), (np.linspace(1.0, 1.4, 6), "does not fall")],
)
def test_says_which_parameter_the_data_push_to_its_limit(y: np.ndarray, bound: str) -> None:
    fit = fit_power(X, y, bootstrap=0)
    assert fit.status == "at_bound"
    assert bound in fit.reason


def test_rows_of_one_group_are_drawn_together() -> None:
    x = np.repeat(X, 3)
    rng = np.random.default_rng(0)
    y = (0.5 + 50 * x**-0.4) * np.exp(rng.normal(0, 0.01, len(x)))
    fit = fit_power(x, y, groups=list(x), bootstrap=300)
    # Six groups: some draws hold fewer than three distinct x, and are counted.
    assert fit.bootstrap["not_identified"] > 0
    assert fit.bootstrap["used"] + fit.bootstrap["not_identified"] == 300


def test_held_out_point_is_predicted_from_the_others() -> None:
    y = 0.5 + 50 * X**-0.4
    y_last = y[-1]
    y[-1] = 99.0  # must not be seen by the fit
    out = held_out(X, y)
    assert out["predicted"] == pytest.approx(y_last, rel=1e-6)
    assert out["relative_error"] == pytest.approx(y_last / 99.0 - 1, rel=1e-6)
    assert set(out["baselines"]) == {"last_value", "log_log_line"}


def test_held_out_is_refused_where_the_rest_is_too_short() -> None:
    x = np.repeat([1e3, 2e3, 5e3, 2e4], 2)
    out = held_out(x, 0.5 + 50 * x**-0.4)
    assert out["status"] == "refused"
    assert "decades" in out["reason"]
    assert "predicted" not in out


def test_same_data_same_interval() -> None:
    y = (0.5 + 50 * X**-0.4) * np.exp(np.random.default_rng(1).normal(0, 0.01, len(X)))
    assert fit_power(X, y).ci95 == fit_power(X, y).ci95
