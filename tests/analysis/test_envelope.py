"""Approach 1: the hull against scipy's, exponents of known surfaces, each refusal, coverage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.stats import binom
from surfaces import BESIROGLU, HOFFMANN, STEEP_N, Surface, curves, exponent, loss_at

from analysis import hull
from analysis.envelope import fit_envelope
from analysis.hull import Curves, falling_hull
from analysis.optimum import OptimumFit, read_rows
from harness.errors import UserError

SIZES = np.geomspace(4e7, 4e9, 10)


def falling_part(x: np.ndarray, y: np.ndarray) -> list[int]:
    """The lower hull's vertices from the leftmost to the lowest point, by scipy."""
    vertices = ConvexHull(np.stack([x, y], axis=1)).vertices
    left, low = vertices[np.lexsort((y[vertices], x[vertices]))[0]], vertices[y[vertices].argmin()]
    # Counter-clockwise, the lower hull runs from left to right.
    order = np.roll(vertices, -int(np.flatnonzero(vertices == left)[0]))
    return list(order[: int(np.flatnonzero(order == low)[0]) + 1])


def test_hull_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.normal(size=(50, 40)), axis=1)
    y = rng.normal(size=(50, 40)) - 0.7 * x
    b, p = falling_hull(x, y, np.ones((40, 50), bool))
    for i in range(50):
        assert list(p[b == i]) == falling_part(x[i], y[i])


def test_hull_of_a_resample_sees_its_points_only() -> None:
    rng = np.random.default_rng(1)
    x = np.sort(rng.normal(size=30))
    y = rng.normal(size=30)
    inside = rng.random((30, 200)) < 0.6
    shape = (200, 30)
    b, p = falling_hull(np.broadcast_to(x, shape), np.broadcast_to(y, shape), inside)
    for i in range(200):
        own = np.flatnonzero(inside[:, i])
        assert list(p[b == i]) == [own[k] for k in falling_part(x[own], y[own])]


@pytest.mark.parametrize("rule", ["hull", "bins"])
def test_points_that_can_never_win_may_go(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = curves(np.repeat(SIZES, 15), BESIROGLU, noise=0.004, points=20)
    rows = read_rows(study.n, study.d, study.loss, None, list(study.run))
    bins = 25 if rule == "bins" else 0
    few = Curves(rows, bins)
    monkeypatch.setattr(hull, "_BEATEN_BY", 10_000)
    many = Curves(rows, bins)
    assert len(few.x) < len(many.x)
    times = np.random.default_rng(2).poisson(1.0, size=(100, rows.num_units)).astype(float)
    found = []
    for one in (few, many):
        draw, point = one.envelope(times)
        found.append(list(zip(draw, one.row[point], strict=True)))
    assert found[0] == found[1]


@pytest.mark.parametrize("surface", [HOFFMANN, BESIROGLU])
@pytest.mark.parametrize(("sizes", "tolerance"), [(5, 0.015), (7, 0.004), (10, 0.003), (20, 0.003)])
@pytest.mark.parametrize("ratio", [(2.0, 100.0), (2.0, 400.0), (0.5, 150.0)])
def test_hull_recovers_the_exponents_of_a_noise_free_surface(
    surface: Surface, sizes: int, tolerance: float, ratio: tuple[float, float]
) -> None:
    study = curves(np.geomspace(4e7, 4e9, sizes), surface, ratio=ratio, points=100)
    fit = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=0)
    assert fit.status == "converged"
    assert fit.params["a"] == pytest.approx(exponent(surface), abs=tolerance)
    assert fit.params["a"] + fit.params["b"] == pytest.approx(1.0, abs=1e-9)
    middle = np.array([np.sqrt(fit.c_range[0] * fit.c_range[1])]) if fit.c_range else np.zeros(1)
    n, d = fit.predict(middle, "n"), fit.predict(middle, "d")
    assert 6 * n * d == pytest.approx(middle, rel=1e-9)
    # On the power law, which does not level off as the surface does.
    assert fit.predict(middle, "loss") == pytest.approx(loss_at(n, d, surface), rel=0.03)


def test_bins_recover_the_exponent_less_well() -> None:
    study = curves(np.geomspace(4e7, 4e9, 20), HOFFMANN, points=100)
    fit = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), rule="bins", bootstrap=0)
    assert fit.settings["bins"] == 57
    assert fit.params["a"] == pytest.approx(exponent(HOFFMANN), abs=0.015)


@pytest.mark.parametrize("rule", ["hull", "bins"])
def test_points_without_a_rival_make_the_exponent_too_small(rule: str) -> None:
    """Why the published rule is not the default."""
    study = curves(np.geomspace(4e7, 4e9, 20), BESIROGLU, points=100)
    fit = fit_envelope(
        study.n, study.d, study.loss, runs=list(study.run), rule=rule, points="all", bootstrap=0
    )  # type: ignore[arg-type]
    assert fit.params["a"] < exponent(BESIROGLU) - 0.03
    assert any("usually too small" in w for w in fit.warnings)


def test_a_size_counts_once_however_many_points_it_has() -> None:
    study = curves(SIZES, BESIROGLU, points=100)
    dense = (study.run == 4) | (np.arange(len(study.n)) % 3 == 0)
    one = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=0)
    two = fit_envelope(
        study.n[dense], study.d[dense], study.loss[dense], runs=list(study.run[dense]), bootstrap=0
    )
    assert two.params["a"] == pytest.approx(one.params["a"], abs=0.004)


def test_any_unit_of_cost_will_do() -> None:
    study = curves(SIZES, BESIROGLU)
    hours = study.c / 3e17
    one = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=0)
    two = fit_envelope(study.n, study.d, study.loss, hours, list(study.run), bootstrap=0)
    assert two.params["a"] == pytest.approx(one.params["a"], abs=1e-9)
    assert [p["row"] for p in two.points] == [p["row"] for p in one.points]
    assert not any("6 N D" in w for w in two.warnings) and "C = 6 N D" in one.warnings[0]


def fit(sizes: np.ndarray, surface: Surface = BESIROGLU, **kwargs: object) -> OptimumFit:
    ratio = kwargs.pop("ratio", (2.0, 100.0))
    study = curves(sizes, surface, ratio=ratio, points=40)  # type: ignore[arg-type]
    finished = kwargs.pop("finished", None)
    done = None if finished is None else study.run < finished
    return fit_envelope(
        study.n, study.d, study.loss, None, list(study.run), done, bootstrap=0, **kwargs
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (fit(np.array([1e8, 1e9])), "2 distinct N; at least 3 needed"),
        (fit(np.geomspace(4e7, 4e9, 4)), "2 of the 4 sizes on the envelope were beaten"),
        (fit(np.geomspace(1e8, 2e8, 8)), "decades of C; at least 1 needed"),
        (fit(SIZES, finished=4), "mixed schedules: 160 rows of finished runs and 240"),
        # Every run stops long before its optimum: the ends of runs are no optima.
        (fit(SIZES, STEEP_N, ratio=(0.1, 3.0)), "were beaten from both sides"),
    ],
)
def test_refuses_what_shows_no_optima(result: OptimumFit, reason: str) -> None:
    assert result.status == "refused"
    assert reason in result.reason
    assert result.params == {} and result.ci95 == {} and result.draws is None


def test_refuses_an_envelope_of_one_size() -> None:
    study = curves(SIZES[3:], BESIROGLU)
    loss = np.where(study.run == 0, 0.1 * study.loss, study.loss)
    out = fit_envelope(study.n, study.d, loss, runs=list(study.run))
    assert out.status == "refused"
    assert out.reason == "all 60 points of the envelope are of one size, N = 1.85664e+08"


def test_refuses_too_few_points_on_the_envelope() -> None:
    n = np.geomspace(1e7, 1e10, 6)
    out = fit_envelope(n, 20 * n, [3.0, 2.0, 5.0, 5.0, 5.0, 5.0])
    assert out.status == "refused"
    assert "too few points on the envelope (2); at least 4 needed" in out.reason


@pytest.mark.parametrize("empty", [[], [np.nan] * 5, [-1.0] * 5])
def test_refuses_when_no_row_is_usable(empty: list[float]) -> None:
    out = fit_envelope([1e8] * len(empty), [1e9] * len(empty), empty)
    assert out.status == "refused"
    assert "no row has a finite, positive N, D, C and loss" in out.reason


def test_names_every_row_it_cannot_use() -> None:
    study = curves(SIZES, BESIROGLU)
    loss, runs, d = study.loss.copy(), list(map(str, study.run)), study.d.copy()
    loss[3], d[5], d[7], loss[7], runs[11] = np.nan, 0.0, -1.0, np.inf, ""
    out = fit_envelope(study.n, d, loss, runs=runs, bootstrap=0)
    assert out.status == "converged"
    assert out.rows_used == len(loss) - 4
    assert out.rows_dropped == (
        {"row": 3, "reason": "loss not finite and positive"},
        {"row": 5, "reason": "D not finite and positive; C not finite and positive"},
        {
            "row": 7,
            "reason": "D not finite and positive; loss not finite and positive;"
            " C not finite and positive",
        },
        {"row": 11, "reason": "run not named"},
    )


def test_all_rows_in_mid_schedule_are_taken_with_a_warning() -> None:
    study = curves(SIZES, BESIROGLU)
    runs = list(study.run)
    out = fit_envelope(
        study.n, study.d, study.loss, None, runs, np.zeros(len(runs), bool), bootstrap=0
    )
    assert out.status == "converged"
    assert any("before the end of a schedule" in w for w in out.warnings)
    out = fit_envelope(
        study.n, study.d, study.loss, None, runs, np.ones(len(runs), bool), bootstrap=0
    )
    assert not any("schedule" in w for w in out.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": [1e9]}, "columns of different length: N 3, D 1, loss 3"),
        ({"c": [1e18]}, "C 1"),
        ({"runs": ["a"]}, "runs 1"),
        ({"finished": [True]}, "finished has 1 values for 3 rows"),
        ({"n": [1e8, "x", 1e10]}, "N: could not convert .* expected numbers only"),
        ({"n": [[1e8], [1e9], [1e10]]}, "N: 2 dimensions"),
        ({"runs": ["a", "a", "b"]}, "N is 1e\\+08, and 1e\\+09 in another row of its run"),
    ],
)
def test_columns_that_do_not_fit_are_a_users_error(change: dict, message: str) -> None:
    columns = {"n": [1e8, 1e9, 1e10], "d": [1e9] * 3, "loss": [3.0, 2.0, 2.5], **change}
    with pytest.raises(UserError, match=message):
        fit_envelope(**columns)


def test_sizes_that_hardly_differ_are_one() -> None:
    study = curves(SIZES, BESIROGLU)
    again = study.n * np.where(np.arange(len(study.n)) % 2, 1.004, 1.0)
    one, two = (
        fit_envelope(n, study.d, study.loss, study.c, list(study.run), bootstrap=0)
        for n in (study.n, again)
    )
    assert two.params["a"] == pytest.approx(one.params["a"], abs=1e-3)


def test_integers_whose_product_needs_more_than_64_bits() -> None:
    study = curves(np.geomspace(4e9, 4e11, 10), BESIROGLU)
    n, d = study.n.astype(np.int64), study.d.astype(np.int64)
    assert 6 * int(n.max()) * int(d.max()) > 2**63
    whole = fit_envelope(n, d, study.loss, runs=list(study.run), bootstrap=0)
    assert whole.params["a"] == pytest.approx(exponent(BESIROGLU), abs=0.003)


def test_runs_are_drawn_and_not_their_rows() -> None:
    study = curves(SIZES, BESIROGLU, noise=0.002)
    by_run = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=200)
    by_row = fit_envelope(study.n, study.d, study.loss, bootstrap=200)
    assert by_run.bootstrap["unit"] == "runs" and by_row.bootstrap["unit"] == "rows"
    width = [f.ci95["a"][1] - f.ci95["a"][0] for f in (by_run, by_row)]
    assert width[0] > 2 * width[1]


def test_draws_that_miss_sizes_are_counted_and_half_of_them_missing_is_no_interval() -> None:
    study = curves(np.geomspace(4e7, 4e9, 5), BESIROGLU)
    out = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=300)
    assert out.status == "converged"
    assert out.bootstrap["not_identified"] + out.bootstrap["used"] == 300
    assert out.ci95 == {} and any("no interval" in w for w in out.warnings)
    assert out.band(np.array([1e19]), "n") is None


def test_same_seed_same_interval_and_json_holds_it_all() -> None:
    study = curves(SIZES, BESIROGLU, noise=0.002)
    one, two, other = (
        fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=100, seed=s)
        for s in (5, 5, 6)
    )
    assert one.ci95 == two.ci95 and one.ci95 != other.ci95
    out = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert "draws" not in out
    assert out["law"] == "envelope" and out["params"]["a"] == one.params["a"]
    assert out["rows_used"] == len(study.n) and out["objective"] >= 0


def test_band_is_that_of_the_draws() -> None:
    study = curves(SIZES, BESIROGLU, noise=0.002)
    out = fit_envelope(study.n, study.d, study.loss, runs=list(study.run), bootstrap=100)
    at = np.array([1e19, 1e20])
    band = out.band(at, "loss")
    assert out.draws is not None and band is not None
    values = np.exp(out.draws[:, [4]]) * at ** -out.draws[:, [5]]
    assert band[0] == pytest.approx(np.percentile(values, 2.5, axis=0))
    assert band[1] == pytest.approx(np.percentile(values, 97.5, axis=0))


@pytest.mark.long
def test_truth_is_inside_the_interval_at_least_at_the_nominal_rate() -> None:
    """Conservative: a draw lacks a third of the sizes, which moves it more than noise does."""
    truth, inside = exponent(BESIROGLU), 0
    for seed in range(100):
        study = curves(np.geomspace(4e7, 4e9, 12), BESIROGLU, points=30, noise=0.003, seed=seed)
        out = fit_envelope(
            study.n, study.d, study.loss, runs=list(study.run), bootstrap=200, seed=seed
        )
        low, high = out.ci95["a"]
        inside += low <= truth <= high
    assert inside >= binom.ppf(0.005, 100, 0.95)
