"""Fits of laws: truth recovery, true optima, bounds, refusals, bootstrap, held-out error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import least_squares

from analysis import resample
from analysis.fit import Fit, fit
from analysis.holdout import compare, held_out

X = np.geomspace(1e4, 1e6, 6)
EPOCH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
"""Besiroglu et al. 2024, arXiv 2404.10102, table 1."""


def grid(rng: np.random.Generator, num: int = 60) -> dict[str, np.ndarray]:
    return {
        "N": np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), num)),
        "D": np.exp(rng.uniform(np.log(1e9), np.log(3e11), num)),
    }


def surface(inputs: dict[str, np.ndarray], p: dict[str, float] = EPOCH) -> np.ndarray:
    return p["E"] + p["A"] / inputs["N"] ** p["alpha"] + p["B"] / inputs["D"] ** p["beta"]


def solve_m4(x: np.ndarray, p: dict[str, float]) -> np.ndarray:
    """y of (y - c) / (e0 - y)^g = a x^-b by bisection."""
    low, high = np.full(len(x), p["c"]), np.full(len(x), p["e0"])
    for _ in range(200):
        y = 0.5 * (low + high)
        above = (y - p["c"]) / (p["e0"] - y) ** p["g"] > p["a"] * x ** -p["b"]
        low, high = np.where(above, low, y), np.where(above, y, high)
    return 0.5 * (low + high)


ONE_AXIS: dict[str, tuple[dict[str, float], Callable[[np.ndarray, dict[str, float]], np.ndarray]]]
ONE_AXIS = {
    "power": ({"a": 2.0, "b": 0.3}, lambda x, p: p["a"] * x ** -p["b"]),
    "power_irreducible": (
        {"a": 300.0, "b": 0.5, "c": 1.7},
        lambda x, p: p["a"] * x ** -p["b"] + p["c"],
    ),
    "shifted": (
        {"a": 20.0, "b": 0.6, "c": 0.1, "d": 800.0},
        lambda x, p: p["a"] * (x + p["d"]) ** -p["b"] + p["c"],
    ),
    "broken": (
        {"a": 3.0, "b": 0.2, "c": 0.05, "d": 3000.0, "g": 0.4, "f": 0.5},
        lambda x, p: (
            p["c"]
            + p["a"] * x ** -p["b"] * (1 + (x / p["d"]) ** (1 / p["f"])) ** (-p["g"] * p["f"])
        ),
    ),
    "m4": ({"a": 150.0, "b": 0.5, "c": 0.1, "g": 1.3, "e0": 0.9}, solve_m4),
}


@pytest.mark.parametrize("law", ONE_AXIS)
def test_recovers_a_noise_free_law_over_one_axis(law: str) -> None:
    truth, function = ONE_AXIS[law]
    x = np.geomspace(1e2, 1e6, 16)
    found = fit(law, {"x": x}, function(x, truth), bootstrap=0)
    assert found.status == "converged"
    assert found.params == pytest.approx(truth, rel=1e-6)
    assert found.predict({"x": x}) == pytest.approx(function(x, truth), rel=1e-9)


@pytest.mark.parametrize("floor", [1.0, 0.05])
@pytest.mark.parametrize("exponent", [0.05, 0.35, 1.1])
def test_recovers_small_and_large_exponents(floor: float, exponent: float) -> None:
    y = floor + 40 * X**-exponent
    found = fit("power_irreducible", {"x": X}, y, bootstrap=0)
    assert found.params == pytest.approx({"a": 40.0, "b": exponent, "c": floor}, rel=1e-6)


def test_recovers_a_noise_free_surface() -> None:
    inputs = grid(np.random.default_rng(0))
    found = fit("chinchilla", inputs, surface(inputs), bootstrap=0)
    assert found.status == "converged"
    assert found.params == pytest.approx(EPOCH, rel=1e-6)
    assert found.starts_at_best > found.starts / 2


def test_recovers_one_exponent_for_both_axes() -> None:
    inputs = grid(np.random.default_rng(0))
    truth = {**EPOCH, "beta": EPOCH["alpha"]}
    found = fit("tied", inputs, surface(inputs, truth), bootstrap=0)
    assert found.params == pytest.approx({k: truth[k] for k in "E A B alpha".split()}, rel=1e-6)


def test_recovers_the_law_of_kaplan() -> None:
    inputs = grid(np.random.default_rng(0))
    truth = {"Nc": 8.8e13, "Dc": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}
    y = (
        (truth["Nc"] / inputs["N"]) ** (truth["alpha_N"] / truth["alpha_D"])
        + truth["Dc"] / inputs["D"]
    ) ** truth["alpha_D"]
    found = fit("kaplan", inputs, y, bootstrap=0)
    assert found.params == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_reaches_the_objective_of_a_general_optimiser(delta: float) -> None:
    rng = np.random.default_rng(3)
    inputs = grid(rng)
    y = surface(inputs) * np.exp(0.01 * rng.standard_t(3, len(inputs["N"])))
    u, v = (np.log(inputs[k]) for k in "ND")

    def residual(t: np.ndarray) -> np.ndarray:
        terms = np.stack([t[0] + 0 * u, t[1] - t[3] * u, t[2] - t[4] * v])
        return np.logaddexp.reduce(terms) - np.log(y)

    best = min(
        least_squares(
            residual,
            [np.log(1.5), a, b, alpha, beta],
            loss="huber",
            f_scale=delta,
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=4000,
        ).cost
        for a, alpha in ((5, 0.3), (10, 0.6))
        for b, beta in ((7, 0.35), (12, 0.5))
    )
    found = fit("chinchilla", inputs, y, delta=delta, bootstrap=0)
    assert found.objective is not None
    assert found.objective <= best * (1 + 1e-9)
    assert found.gradient_norm == pytest.approx(0.0, abs=1e-7)


def test_one_wild_row_does_not_move_the_law_far() -> None:
    x = np.repeat(X, 2)
    y = 0.5 + 50 * x**-0.4
    y[3] *= 1.5
    found = fit("power_irreducible", {"x": x}, y, bootstrap=0)
    assert found.params["b"] == pytest.approx(0.4, rel=1e-3)


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ([1e3, 1e4, 1e5, 1e6], "too few points (4); at least 5 needed"),
        ([1e3, 1e3, 1e3, 1e5, 1e5, 1e5], "2 distinct x"),
        ([1e3, 2e3, 4e3, 6e3, 8e3], "0.90 decades"),
        ([], "too few points"),
    ],
)
def test_refuses_rows_that_cannot_identify_a_law(x: list[float], reason: str) -> None:
    found = fit("power_irreducible", {"x": x}, [1.0] * len(x))
    assert found.status == "refused"
    assert reason in found.reason
    assert found.params == {} and found.ci95 == {} and found.objective is None


def test_refuses_fewer_distinct_x_than_parameters() -> None:
    x = np.repeat([1e3, 1e4, 1e5], 4)
    found = fit("shifted", {"x": x}, 20 * (x + 800) ** -0.6 + 0.1)
    assert found.status == "refused" and "3 distinct x; at least 4" in found.reason


@pytest.mark.parametrize(
    ("n", "d", "reason"),
    [
        (np.repeat([1e7, 1e9], 6), np.tile(np.geomspace(1e9, 1e11, 6), 2), "2 distinct N"),
        (np.tile(np.geomspace(1e7, 1e9, 6), 2), np.repeat([1e9, 1e11], 6), "2 distinct D"),
        (np.geomspace(1e7, 5e7, 12), np.geomspace(1e9, 1e11, 12)[::-1], "N spans 0.70 decades"),
        (np.geomspace(1e7, 1e9, 12), 20 * np.geomspace(1e7, 1e9, 12), "N and D move together"),
    ],
)
def test_refuses_axes_that_cannot_be_told_apart(n: np.ndarray, d: np.ndarray, reason: str) -> None:
    found = fit("chinchilla", {"N": n, "D": d}, surface({"N": n, "D": d}))
    assert found.status == "refused"
    assert reason in found.reason
    assert found.params == {}


def test_refuses_an_exponent_that_noise_alone_decides() -> None:
    x = np.repeat(np.geomspace(1e3, 1e6, 4), 2)
    noise = np.random.default_rng(0).normal(0, 0.02, len(x))
    found = fit("power_irreducible", {"x": x}, 0.5 * np.exp(noise), delta=0.02, bootstrap=200)
    assert found.status in ("refused", "at_bound")
    assert not found.is_number


def test_refuses_values_without_a_logarithm() -> None:
    assert fit("power", {"x": X}, [1.0, 0.5, 0.2, 0.1, 0.0, 0.1]).status == "refused"


@pytest.mark.parametrize(
    ("y", "bound"),
    [(5 * X**-0.3, "c at 0"), (np.linspace(1.0, 1.4, 6), "does not fall")],
)
def test_says_which_parameter_the_data_push_to_its_limit(y: np.ndarray, bound: str) -> None:
    found = fit("power_irreducible", {"x": X}, y, bootstrap=0)
    assert found.status == "at_bound"
    assert bound in found.reason


# -- bootstrap ------------------------------------------------------------------------------


def test_rows_of_one_run_are_drawn_together() -> None:
    x = np.repeat(X, 3)
    rng = np.random.default_rng(0)
    y = (0.5 + 50 * x**-0.4) * np.exp(rng.normal(0, 0.01, len(x)))
    found = fit("power_irreducible", {"x": x}, y, groups=list(x), bootstrap=300)
    # Six runs: some draws hold fewer than three distinct x, and are counted.
    assert found.bootstrap["unit"] == "runs"
    assert found.bootstrap["not_identified"] > 0
    assert found.bootstrap["used"] + found.bootstrap["not_identified"] == 300


def width(found: Fit, name: str) -> float:
    low, high = found.ci95[name]
    return high - low


def test_rows_that_share_the_luck_of_a_run_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    runs = np.repeat(np.arange(30), 8)
    x = np.exp(rng.uniform(np.log(1e3), np.log(1e6), 30))[runs]
    y = 50 * x**-0.4 * np.exp(0.02 * rng.normal(size=30)[runs])
    by_row = fit("power", {"x": x}, y, delta=0.1, bootstrap=400)
    by_run = fit("power", {"x": x}, y, groups=list(runs), delta=0.1, bootstrap=400)
    # Eight rows that say one thing: intervals of rows are sqrt(8) too narrow.
    assert width(by_run, "b") / width(by_row, "b") == pytest.approx(np.sqrt(8), rel=0.3)


def test_same_rows_same_interval() -> None:
    x = np.repeat(X, 3)
    y = (0.5 + 50 * x**-0.4) * np.exp(np.random.default_rng(1).normal(0, 0.01, len(x)))
    one, two = (fit("power_irreducible", {"x": x}, y, bootstrap=100, seed=7) for _ in range(2))
    assert one.ci95 == two.ci95 and one.ci95


def test_every_refitted_draw_is_an_optimum_of_its_rows() -> None:
    rng = np.random.default_rng(2)
    inputs = grid(rng)
    y = surface(inputs) * np.exp(0.01 * rng.normal(size=60))
    found = fit("chinchilla", inputs, y, bootstrap=100)
    assert found.bootstrap["not_converged"] <= 5


# -- held out -------------------------------------------------------------------------------


def test_the_largest_x_is_predicted_from_the_others() -> None:
    y = 0.5 + 50 * X**-0.4
    y_last = y[-1]
    y[-1] = 99.0  # must not be seen by the fit
    out = held_out("power_irreducible", {"x": X}, y, bootstrap=0)
    assert out["predicted"] == pytest.approx(y_last, rel=1e-6)
    assert out["relative_error"] == pytest.approx(y_last / 99.0 - 1, rel=1e-6)
    assert out["extrapolation_factor"] == pytest.approx(X[-1] / X[-2])
    assert out["baselines"]["last_value"] == pytest.approx(y[-2] / 99.0 - 1, rel=1e-6)


def test_a_held_out_surface_is_predicted_and_its_baselines_are_not() -> None:
    n = np.repeat(np.geomspace(1e7, 1e9, 5), 5)
    d = np.tile(np.geomspace(1e9, 1e11, 5), 5)
    out = held_out("chinchilla", {"N": n, "D": d}, surface({"N": n, "D": d}), bootstrap=0)
    assert out["rows_held_out"] == 5 and out["x"] == 1e9
    assert out["log_rmse"] < 1e-8
    assert min(out["baselines_log_rmse"].values()) > 1e-2


def test_held_out_is_refused_where_the_rest_is_too_short() -> None:
    x = np.repeat([1e3, 2e3, 5e3, 2e4], 2)
    out = held_out("power_irreducible", {"x": x}, 0.5 + 50 * x**-0.4)
    assert out["status"] == "refused"
    assert "decades" in out["reason"]
    assert "predicted" not in out


def test_the_form_that_made_the_rows_predicts_best() -> None:
    truth, function = ONE_AXIS["shifted"]
    x = np.geomspace(1e2, 1e6, 14)
    y = function(x, truth) * np.exp(np.random.default_rng(0).normal(0, 1e-3, len(x)))
    rows = compare(["power", "power_irreducible", "shifted"], {"x": x}, y, x < 5e4, bootstrap=50)
    assert next(row["law"] for row in rows) == "shifted"
    assert [row["parameters"] for row in rows] == [4, 3, 2]


def test_an_interval_whose_end_is_infinite_is_a_number_at_the_other() -> None:
    draws = np.stack([np.arange(1.0, 201.0), np.where(np.arange(200) < 150, 1.0, np.inf)], axis=1)
    low, high = resample.ends(draws)
    # Between the order statistics 5 and 6, and 195 and 196, of 200: numpy's own rule.
    assert (low[0], high[0]) == pytest.approx(np.percentile(draws[:, 0], [2.5, 97.5]))
    assert (low[1], high[1]) == (1.0, np.inf)
    assert resample.ends(np.full((50, 1), np.inf)) == (np.inf, np.inf)
