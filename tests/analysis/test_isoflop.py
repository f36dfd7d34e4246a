"""Approach 2: exact exponents, the bias of parabolas, each refusal, coverage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from surfaces import (
    BESIROGLU,
    EVEN,
    HOFFMANN,
    STEEP_D,
    STEEP_N,
    Study,
    Surface,
    best_n,
    exponent,
    loss_at,
    valleys,
)

from analysis import optimum
from analysis.isoflop import fit_isoflop
from analysis.optimum import OptimumFit
from harness.errors import UserError

DATA = Path(__file__).parent / "data" / "hoffmann_epoch.csv"
BUDGETS = np.geomspace(6e18, 3e21, 6)
SURFACES = [HOFFMANN, BESIROGLU, STEEP_N, STEEP_D]


def fit(study: Study, **kwargs: object) -> OptimumFit:
    kwargs = {"bootstrap": 0, **kwargs}
    return fit_isoflop(study.n, study.d, study.loss, study.c, **kwargs)  # type: ignore[arg-type]


def used(result: OptimumFit, what: str) -> np.ndarray:
    return np.array([p[what] for p in result.points if p["used"]])


# -- what is exact --------------------------------------------------------------------------


def test_minima_are_exact_where_the_valley_is_symmetric() -> None:
    result = fit(valleys(BUDGETS, EVEN, half=2.0))
    assert result.status == "converged"
    assert used(result, "n") == pytest.approx(best_n(BUDGETS, EVEN), rel=1e-9)
    assert used(result, "d") == pytest.approx(BUDGETS / 6 / best_n(BUDGETS, EVEN), rel=1e-9)
    assert result.params["a"] == pytest.approx(0.5, abs=1e-10)
    assert result.params["b"] == pytest.approx(0.5, abs=1e-10)
    assert result.objective == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("half", "offset"), [(1.0, 0.0), (2.0, 0.8), (2.5, -1.2)])
def test_exponents_are_exact_where_all_classes_are_sampled_alike(
    surface: Surface, half: float, offset: float
) -> None:
    """Whatever alpha and beta: only the minima are moved, all by the same factor."""
    result = fit(valleys(BUDGETS, surface, half=half, offset=offset))
    assert result.params["a"] == pytest.approx(exponent(surface), abs=1e-9)
    assert result.params["b"] == pytest.approx(1 - exponent(surface), abs=1e-9)
    shift = used(result, "n") / best_n(BUDGETS, surface)
    assert np.ptp(shift) < 1e-9
    assert abs(shift[0] - 1) > 1e-4


def test_a_parabola_of_ln_loss_would_not_be_exact() -> None:
    """Why the loss itself is fitted: the irreducible loss changes the shape in ln L."""
    study = valleys(BUDGETS, HOFFMANN, half=2.5, offset=-1.2)
    lines = []
    for loss in (study.loss, np.log(study.loss)):
        found = [np.polyfit(np.log(study.n[study.c == c]), loss[study.c == c], 2) for c in BUDGETS]
        minima = [-p[1] / (2 * p[0]) for p in found]
        lines.append(np.polyfit(np.log(BUDGETS), minima, 1)[0])
    assert lines[0] == pytest.approx(exponent(HOFFMANN), abs=1e-9)
    assert abs(lines[1] - exponent(HOFFMANN)) > 1e-3
    assert fit(study).params["a"] == pytest.approx(lines[0], abs=1e-9)


def test_data_is_read_off_the_rows_not_off_a_rule() -> None:
    study = valleys(BUDGETS, EVEN)
    hours = study._replace(c=study.c / 7e16)
    one = fit(hours)
    assert used(one, "d") == pytest.approx(BUDGETS / 6 / best_n(BUDGETS, EVEN), rel=1e-9)
    assert one.params["a"] == pytest.approx(0.5, abs=1e-10)
    # C = 6 N^1.1 D: rows of equal cost have less D for large N.
    d = study.c / 6 / study.n**1.1
    other = study._replace(d=d, loss=loss_at(study.n, d, EVEN))
    result = fit(other)
    product = used(result, "n") ** 1.1 * used(result, "d")
    assert 6 * product == pytest.approx(used(result, "c"), rel=1e-9)


def test_compute_that_scatters_inside_its_class_is_read_off_too() -> None:
    study = valleys(BUDGETS, EVEN)
    c = study.c * (1 + 0.02 * np.sin(np.arange(len(study.c))))
    d = c / 6 / study.n
    result = fit(study._replace(c=c, d=d))
    assert len(used(result, "c")) == len(BUDGETS)
    assert 6 * used(result, "n") * used(result, "d") == pytest.approx(used(result, "c"), rel=1e-9)
    assert result.params["a"] + result.params["b"] == pytest.approx(1.0, abs=1e-9)


# -- the bias of parabolas ------------------------------------------------------------------


def shift_of(surface: Surface, half: float, offset: float) -> float:
    """ln of the found N* over the true one."""
    result = fit(valleys(BUDGETS, surface, half=half, offset=offset, sizes=201))
    return float(np.log(used(result, "n") / best_n(BUDGETS, surface))[0])


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("off", [-0.8, -0.4, 0.0, 0.4, 0.8])
def test_minimum_moves_by_the_stated_formula(
    surface: Surface, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimum, "SAME_SIZE", 0.0)
    alpha, beta = surface[3:]
    even, odd = off**2 / 2 - 1 / 10, off * (off**2 / 3 - 1 / 35)
    leading = (beta - alpha) * even
    # From the fourth derivative of the valley, and the square of the third.
    following = (alpha**2 - alpha * beta + beta**2) * odd - (beta - alpha) ** 2 * off * even
    for half in (0.2, 0.5):
        expected = leading * half**2 + following * half**3
        # Half^4 comes next, and 201 points are not a continuum.
        found = shift_of(surface, half, off * half)
        assert found == pytest.approx(expected, rel=0.03, abs=1e-3 * half**2)


def test_minimum_is_moved_by_what_the_fit_says_it_may_be() -> None:
    for surface in (STEEP_N, STEEP_D):
        result = fit(valleys(BUDGETS, surface, half=2.0))
        off = np.abs(np.log(used(result, "n") / best_n(BUDGETS, surface))).max()
        said = result.settings["at_alpha_beta_0.2_apart"]["n_off"]
        assert said == pytest.approx(np.expm1(off), rel=0.15)


@pytest.mark.parametrize("offset", [-0.8, -0.4, 0.4, 0.8])
def test_exponent_from_one_grid_for_all_budgets_is_off_by_what_the_fit_says(offset: float) -> None:
    """The larger of the two skews is told, so no more than that, and not far less for one."""
    budgets = np.geomspace(3e19, 3e20, 5)
    shares = []
    for surface in (STEEP_N, STEEP_D):
        study = valleys(budgets, surface, half=2.5, offset=offset, sizes=9, one_grid=True)
        result = fit(study)
        assert len(used(result, "n")) == 5
        off = abs(result.params["a"] - exponent(surface))
        shares.append(off / result.settings["at_alpha_beta_0.2_apart"]["a_off"])
    assert max(shares) == pytest.approx(1.0, abs=0.35)


def test_exponents_of_published_surfaces_are_sound_where_no_warning_is_given() -> None:
    told = {True: 0, False: 0}
    for surface in (HOFFMANN, BESIROGLU):
        for half in (0.7, 1.5, 2.5):
            for offset in (-1.0, -0.5, 0.0, 0.5, 1.0):
                study = valleys(
                    np.geomspace(3e19, 3e20, 5), surface, half=half, offset=offset, one_grid=True
                )
                result = fit(study)
                if result.status == "refused":
                    continue
                warned = any("for parabolas" in w for w in result.warnings)
                told[warned] += 1
                if not warned:
                    assert abs(result.params["a"] - exponent(surface)) < 0.02
    assert min(told.values()) >= 4


def test_warns_of_wide_and_of_off_centre_sampling() -> None:
    assert fit(valleys(BUDGETS, BESIROGLU, half=1.8)).warnings == ()
    for half, offset in ((2.6, 0.0), (2.0, 1.7)):
        wide = fit(valleys(BUDGETS, BESIROGLU, half=half, offset=offset))
        assert ["N* would be off by up to" in w for w in wide.warnings] == [True]


def test_warns_of_three_sizes_and_of_three_classes() -> None:
    result = fit(valleys(BUDGETS[::2], BESIROGLU, sizes=3))
    assert ["3 distinct N" in w or "only 3 classes" in w for w in result.warnings] == [True, True]


# -- classes and refusals -------------------------------------------------------------------


def test_a_class_without_a_minimum_is_left_out_with_its_reason() -> None:
    study = valleys(BUDGETS, BESIROGLU)
    loss = study.loss.copy()
    one, two, three = (study.c == BUDGETS[i] for i in (0, 2, 5))
    loss[one] = 5 - 0.1 * np.log(study.n[one]) ** 2 / 20
    loss[two] = 1 + np.linspace(0, 2, two.sum()) ** 2
    keep = ~three | (np.cumsum(three) <= 2)
    result = fit_isoflop(study.n[keep], study.d[keep], loss[keep], study.c[keep], bootstrap=0)
    assert result.status == "converged"
    reasons = {r["reason"].split(": ", 1)[1] for r in result.rows_dropped}
    assert reasons == {
        "the losses do not bend up, no minimum",
        "the minimum is below the smallest N of its class",
        "2 distinct N; at least 3 needed",
    }
    assert len(result.rows_dropped) == 7 + 7 + 2 and result.rows_used == 21
    assert [p["used"] for p in result.points] == [False, True, False, True, True, False]


def test_classes_of_three_are_left_out_where_enough_have_more() -> None:
    study = valleys(BUDGETS, BESIROGLU)
    thin = (study.c == BUDGETS[1]) & (np.arange(len(study.c)) % 7 % 3 != 0)
    keep = ~thin
    result = fit_isoflop(study.n[keep], study.d[keep], study.loss[keep], study.c[keep], bootstrap=0)
    assert [p["used"] for p in result.points] == [True, False, True, True, True, True]
    assert "3 distinct N, which a parabola always meets" in result.points[1]["reason"]


def test_sizes_that_hardly_differ_are_one() -> None:
    study = valleys(BUDGETS, BESIROGLU, sizes=2)
    twice = Study(*(np.concatenate([v, v]) for v in study))
    n = twice.n * np.repeat([1.0, 1.003], len(study.n))
    result = fit_isoflop(n, twice.d, twice.loss, twice.c, bootstrap=0)
    assert result.status == "refused"
    assert "2 distinct N; at least 3 needed" in result.reason


def test_rows_of_no_plan_show_the_exponent_too() -> None:
    """Any N and D: enough rows are of equal compute by chance."""
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7.5, 10, 300), 10 ** rng.uniform(9, 11.5, 300)
    result = fit_isoflop(n, d, loss_at(n, d, BESIROGLU), bootstrap=0)
    assert result.status == "converged"
    assert result.params["a"] == pytest.approx(exponent(BESIROGLU), abs=0.02)


def test_a_class_is_the_fullest_window_of_compute() -> None:
    study = valleys(BUDGETS, BESIROGLU)
    stray = [BUDGETS * 1.12, BUDGETS / 1.12]
    c = np.concatenate([study.c, *stray])
    n = np.concatenate([study.n, *[best_n(s, BESIROGLU) * 3 for s in stray]])
    d = c / 6 / n
    result = fit_isoflop(n, d, loss_at(n, d, BESIROGLU), c, bootstrap=0)
    assert used(result, "n") == pytest.approx(used(fit(study), "n"), rel=1e-9)
    assert len(result.rows_dropped) == 2 * len(BUDGETS)


def test_tolerance_says_what_is_equal() -> None:
    study = valleys(BUDGETS, BESIROGLU)
    wide = study._replace(c=study.c * np.tile(np.linspace(1.0, 1.2, 7), len(BUDGETS)))
    assert [p["sizes"] for p in fit(wide, tolerance=0.1).points] == [7] * 6
    assert [p["sizes"] for p in fit(wide).points] == [4, 3] * 6
    assert fit(wide, tolerance=0.1).settings["tolerance"] == 0.1
    with pytest.raises(UserError, match="tolerance 0: expected a share between 0 and 1"):
        fit(study, tolerance=0.0)


@pytest.mark.skipif(not DATA.is_file(), reason="comes with the published data")
def test_published_exponents_of_the_published_runs() -> None:
    """Hoffmann et al. table 2, approach 2: a 0.49 (0.462, 0.534), b 0.51 (0.483, 0.529).

    The rows are read off a figure (Besiroglu et al. 2024), runs of other plans among them.
    """
    table = pd.read_csv(DATA)
    n, d, c = (table[k] for k in ("Model Size", "Training Tokens", "Training FLOP"))
    result = fit_isoflop(n, d, table["loss"], c, bootstrap=1000)
    assert result.status == "converged"
    assert result.params["a"] == pytest.approx(0.49, abs=0.02)
    assert result.params["b"] == pytest.approx(0.51, abs=0.02)
    low, high = result.ci95["a"]
    assert low < 0.49 < high and high - low < 0.1


@pytest.mark.parametrize(
    ("study", "reason"),
    [
        (valleys(BUDGETS[:2], BESIROGLU), "2 of 2 classes of equal compute have a minimum"),
        (valleys(np.geomspace(1e19, 9e19, 5), BESIROGLU), "0.95 decades of C; at least 1 needed"),
        (valleys(BUDGETS, BESIROGLU, sizes=2), "0 of 6 classes of equal compute have a minimum"),
        (valleys(BUDGETS, BESIROGLU, offset=2.0), "the minimum is below the smallest N"),
        (Study(*(np.zeros(0) for _ in range(5))), "no row has a finite, positive"),
        (valleys(BUDGETS, BESIROGLU, sizes=2, half=0.0), "0 of 6 classes"),
    ],
)
def test_refuses_what_shows_no_minima(study: Study, reason: str) -> None:
    result = fit(study)
    assert result.status == "refused"
    assert reason in result.reason
    assert result.params == {} and result.ci95 == {} and result.draws is None
    with pytest.raises(UserError, match="there is no law to predict with"):
        result.predict(np.array([1e20]), "n")


def test_refuses_two_sizes() -> None:
    n = np.tile([1e8, 1e9], 4)
    c = np.repeat(np.geomspace(1e18, 1e20, 4), 2)
    result = fit_isoflop(n, c / 6 / n, np.full(8, 2.0), c)
    assert result.reason == "2 distinct N; at least 3 needed"


def test_integers_whose_product_needs_more_than_64_bits() -> None:
    study = valleys(BUDGETS, BESIROGLU)
    n, d = np.round(study.n).astype(np.int64), np.round(study.d).astype(np.int64)
    assert 6 * int(n.max()) * int(d[n.argmax()]) > 2**63
    result = fit_isoflop(n, d, study.loss, bootstrap=0)
    assert result.params["a"] == pytest.approx(exponent(BESIROGLU), abs=1e-6)
    assert "C = 6 N D" in result.warnings[0]


# -- bootstrap ------------------------------------------------------------------------------


def test_a_draw_is_the_fit_to_the_rows_drawn() -> None:
    """Against numpy's polyfit on the rows themselves, repeated as drawn."""
    study = valleys(BUDGETS, BESIROGLU, noise=0.003)
    result = fit(study, bootstrap=5, seed=3)
    rng = np.random.default_rng(3)
    picks = [rng.integers(0, 7, size=(5, 7)) for _ in BUDGETS]
    assert result.draws is not None
    for b in range(5):
        minima = []
        for k, c in enumerate(BUDGETS):
            rows = np.flatnonzero(study.c == c)[picks[k][b]]
            p = np.polyfit(np.log(study.n[rows]), study.loss[rows], 2)
            minima.append(-p[1] / (2 * p[0]))
        slope, offset = np.polyfit(np.log(BUDGETS), minima, 1)
        assert result.draws[b, :2] == pytest.approx([offset, slope], rel=1e-6)


def test_draws_without_minima_are_counted() -> None:
    study = valleys(BUDGETS[::2], BESIROGLU, sizes=4, noise=0.004, seed=3)
    result = fit(study, bootstrap=400)
    assert result.bootstrap["not_identified"] > 40
    assert result.bootstrap["used"] + result.bootstrap["not_identified"] == 400
    assert any("a minimum in fewer than 3 classes" in w for w in result.warnings)


def test_runs_that_cross_several_budgets_are_drawn_whole() -> None:
    n = np.repeat(np.geomspace(3e7, 3e10, 14), len(BUDGETS))
    c = np.tile(BUDGETS, 14)
    factor = np.exp(0.005 * np.random.default_rng(0).normal(size=14))
    loss = loss_at(n, c / 6 / n, BESIROGLU) * np.repeat(factor, len(BUDGETS))
    runs = [f"run {i}" for i in np.repeat(np.arange(14), len(BUDGETS))]
    by_run = fit_isoflop(n, c / 6 / n, loss, c, runs, bootstrap=400)
    by_row = fit_isoflop(n, c / 6 / n, loss, c, bootstrap=400)
    assert by_run.bootstrap["unit"] == "runs" and by_row.bootstrap["unit"] == "rows"
    assert by_run.ci95["a"] != by_row.ci95["a"]


def test_same_seed_same_interval_and_json_holds_it_all() -> None:
    study = valleys(BUDGETS, BESIROGLU, noise=0.003)
    one, two, other = (fit(study, bootstrap=200, seed=s) for s in (5, 5, 6))
    assert one.ci95 == two.ci95 and one.ci95 != other.ci95
    out = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert "draws" not in out and out["law"] == "isoflop"
    assert out["settings"]["parabola_of"] == "loss"
    assert out["params"]["a"] == one.params["a"]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.002, 0.005])
def test_truth_is_inside_the_interval_at_the_nominal_rate(noise: float) -> None:
    truth, inside = exponent(BESIROGLU), 0
    for seed in range(100):
        study = valleys(BUDGETS, BESIROGLU, noise=noise, seed=seed)
        low, high = fit(study, bootstrap=300, seed=seed).ci95["a"]
        inside += low <= truth <= high
    assert binom.ppf(0.005, 100, 0.95) <= inside <= 100
