"""Approach 3's frontier: closed form, scipy's minimisers, exact ViT FLOPs, bands, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import erf
from surfaces import BESIROGLU, EVEN, HOFFMANN, STEEP_D, STEEP_N, Surface, loss_at

from analysis.costs import cost_of_rows, cost_of_sizes
from analysis.frontier import Cost, frontier
from harness.errors import UserError
from harness.study.flops import encoder_params, mae_train, vit_train
from harness.study.recipes import MaeRecipe, Model

C = np.geomspace(1e17, 1e24, 8)
SURFACES = [HOFFMANN, BESIROGLU, STEEP_N, STEEP_D, EVEN]


def data_for(c: float, n: float, cost: Cost) -> float:
    """D that costs c with n parameters."""

    def over(log_d: float) -> float:
        return float(np.log(cost(np.array([n]), np.exp(np.array([log_d])))[0]) - np.log(c))

    return float(np.exp(brentq(over, -40.0, 100.0, xtol=1e-13, rtol=1e-15)))


def by_scipy(c: float, p: Surface, cost: Cost, near: float) -> tuple[float, float]:
    """ln N* from the root of the slope along equal cost, and the smallest loss by search."""

    def along(log_n: float) -> float:
        n = np.exp(log_n)
        return float(loss_at(n, np.float64(data_for(c, float(n), cost)), p)) - p[0]

    h = 1e-3

    def slope(log_n: float) -> float:
        one = along(log_n + h) - along(log_n - h)
        two = along(log_n + 2 * h) - along(log_n - 2 * h)
        return (8 * one - two) / (12 * h)

    root = brentq(slope, near - 1.0, near + 1.0, xtol=1e-13)
    found = minimize_scalar(along, bounds=(near - 1, near + 1), method="bounded")
    return float(root), float(found.fun) + p[0]


# -- closed form ----------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_closed_form_is_the_minimum_along_equal_compute(surface: Surface) -> None:
    _, a, b, alpha, beta = surface
    out = frontier(surface, C)
    assert out.status == "converged"
    for i, c in enumerate(C):

        def slope(log_n: float, c: float = c) -> float:
            n = np.exp(log_n)
            return float(-alpha * a * n**-alpha + beta * b * (c / 6 / n) ** -beta)

        root = brentq(slope, np.log(out.n[i]) - 2, np.log(out.n[i]) + 2, xtol=1e-14)
        assert out.n[i] == pytest.approx(np.exp(root), rel=1e-8)
        low = minimize_scalar(
            lambda u, c=c: float(loss_at(np.exp(u), c / 6 / np.exp(u), surface)),
            bounds=(root - 1, root + 1),
            method="bounded",
        )
        assert out.loss[i] == pytest.approx(low.fun, abs=1e-8)
    assert 6 * out.n * out.d == pytest.approx(C, rel=1e-12)


@pytest.mark.parametrize("surface", SURFACES)
def test_parameters_are_those_of_the_laws(surface: Surface) -> None:
    out = frontier(surface, C, cost=2.5)
    p = out.params
    assert p["a"] + p["b"] == pytest.approx(1.0, abs=1e-14)
    assert p["G"] * C ** p["a"] == pytest.approx(out.n, rel=1e-10)
    assert p["H"] * C ** p["b"] == pytest.approx(out.d, rel=1e-10)
    assert p["E"] + p["K"] * C ** -p["gamma"] == pytest.approx(out.loss, rel=1e-12)


def test_published_exponents() -> None:
    # Hoffmann et al. table 2: 0.46 and 0.54, from parameters with more digits than they print;
    # Besiroglu et al. sec. 3: 0.513 from theirs.
    assert frontier(HOFFMANN, C).params["a"] == pytest.approx(0.46, abs=0.01)
    assert frontier(BESIROGLU, C).params["a"] == pytest.approx(0.513, abs=5e-4)


def test_names_and_order_are_both_understood() -> None:
    named = dict(zip(("E", "A", "B", "alpha", "beta"), HOFFMANN, strict=True))
    assert frontier({**named, "delta": 1e-3}, C).params == frontier(HOFFMANN, C).params
    with pytest.raises(UserError, match="surface with E, A, alpha: B, beta missing"):
        frontier({"E": 1.0, "A": 2.0, "alpha": 0.3}, C)
    with pytest.raises(UserError, match="4 parameters: expected E, A, B, alpha, beta"):
        frontier(HOFFMANN[:4], C)


# -- any cost -------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_a_function_for_6nd_gives_the_closed_form(surface: Surface) -> None:
    closed, solved = frontier(surface, C), frontier(surface, C, cost=lambda n, d: 6 * n * d)
    for name in ("n", "d", "loss"):
        assert getattr(solved, name) == pytest.approx(getattr(closed, name), rel=1e-10)
    assert solved.params["a"] == pytest.approx(closed.params["a"], abs=1e-10)


def vits() -> list[Model]:
    """ViTs of patch 16, 30 thousand to 2 billion parameters."""
    shapes = [(24, 2, 1), (64, 4, 2), (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16)]
    shapes.append((2560, 24, 32))
    return [Model(width=w, depth=d, heads=h, patch=16, image_size=224) for w, d, h in shapes]


@pytest.mark.parametrize("surface", [HOFFMANN, STEEP_D])
@pytest.mark.parametrize("kind", ["classifier", "decoder", "mae stage of fixed length before"])
def test_exact_flops_of_vits_are_minimised_as_scipy_does(kind: str, surface: Surface) -> None:
    models = vits()
    params = [encoder_params(m) for m in models]
    recipe = MaeRecipe.model_construct(
        mask_ratio=0.75, decoder_width=512, decoder_depth=8, decoder_heads=16
    )
    mae = [mae_train(m, recipe) for m in models]
    classifier = [vit_train(m, 1000) for m in models]
    per_image = mae if kind == "decoder" else classifier
    once = [1e6 * f for f in mae] if kind.startswith("mae stage") else None
    cost = cost_of_sizes(params, per_image, once)
    # The splines meet the sizes themselves.
    for i in range(len(models)):
        n, d = np.array([float(params[i])]), np.array([3e7])
        exact = per_image[i] * 3e7 + (once[i] if once else 0.0)
        assert cost(n, d) == pytest.approx([exact], rel=1e-12)
    c = np.array([1e19, 1e20, 1e21, 3e22])
    out = frontier(surface, c, cost=cost)
    assert out.status == "converged"
    for i in range(len(c)):
        log_n, loss = by_scipy(c[i], surface, cost, np.log(out.n[i]))
        assert np.log(out.n[i]) == pytest.approx(log_n, abs=1e-8)
        assert out.loss[i] == pytest.approx(loss, abs=1e-8)
        assert cost(out.n[[i]], out.d[[i]]) == pytest.approx([c[i]], rel=1e-10)


def test_a_costly_decoder_favours_larger_encoders() -> None:
    """It is paid per image whatever the encoder, so fewer images and more parameters."""
    n = np.geomspace(1e6, 1e9, 9)
    without = frontier(EVEN, [1e18], cost=cost_of_sizes(n, 6 * n))
    decoder = frontier(EVEN, [1e18], cost=cost_of_sizes(n, 6 * (n + 3e7)))
    assert decoder.n[0] > 1.1 * without.n[0]
    assert decoder.d[0] < without.d[0] / 1.1


def test_a_cost_fitted_to_rows_is_the_cost() -> None:
    n = np.repeat(np.geomspace(1e6, 1e9, 6), 4)
    d = np.tile(np.geomspace(1e7, 1e10, 4), 6)
    hours = 3e-18 * n**0.9 * d**1.05 * np.exp(0.02 * np.log(n / 3e7) ** 2)
    fitted = cost_of_rows(n, d, hours)
    assert not isinstance(fitted, str)
    assert fitted.rms < 1e-10
    assert fitted(n, d) == pytest.approx(hours, rel=1e-9)
    exact = frontier(
        EVEN,
        [1.0, 10.0],
        cost=lambda n, d: 3e-18 * n**0.9 * d**1.05 * np.exp(0.02 * np.log(n / 3e7) ** 2),
    )
    assert frontier(EVEN, [1.0, 10.0], cost=fitted).n == pytest.approx(exact.n, rel=1e-8)


@pytest.mark.parametrize(
    ("n", "d", "reason"),
    [
        ([1e6, 1e6, 1e7, 1e7, 1e7], [1e8, 1e9] * 2 + [1e10], "5 rows, 2 N and 3 D"),
        ([1e6, 1e7, 1e8, 1e9, 1e10], [1e7, 1e8, 1e9, 1e10, 1e11], "N and D vary together"),
        ([1e6, 1e7, 1e8], [1e7, 1e8, 1e8], "3 rows, 3 N and 2 D with a cost"),
    ],
)
def test_rows_that_do_not_tell_a_cost_say_so(n: list, d: list, reason: str) -> None:
    out = cost_of_rows(np.array(n), np.array(d), np.array(n) * np.array(d))
    assert isinstance(out, str) and reason in out


def test_sizes_that_are_no_table_are_a_users_error() -> None:
    with pytest.raises(UserError, match="expected at least two, each once"):
        cost_of_sizes([1e6, 1e6], [1e7, 1e8])
    with pytest.raises(UserError, match=r"FLOPs per sample .* expected a positive number"):
        cost_of_sizes([1e6, 1e7], [1e7, -1.0])


# -- bands ----------------------------------------------------------------------------------


def some_draws(num: int = 500, spread: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array(BESIROGLU) * np.exp(spread * rng.normal(size=(num, 5)))


def test_bands_are_percentiles_of_the_draws_own_frontiers() -> None:
    draws = some_draws(200)
    out = frontier(BESIROGLU, C, draws)
    own = [frontier(tuple(row), C) for row in draws]  # type: ignore[arg-type]
    for name in ("n", "d", "loss"):
        values = np.array([getattr(one, name) for one in own])
        low, high = np.percentile(values, [2.5, 97.5], axis=0)
        assert out.bands[name][0] == pytest.approx(low, rel=1e-10)
        assert out.bands[name][1] == pytest.approx(high, rel=1e-10)
    a = np.percentile([one.params["a"] for one in own], [2.5, 97.5])
    assert out.ci95["a"] == pytest.approx(a, rel=1e-10)
    assert out.bootstrap == {"draws": 200, "used": 200, "not_identified": 0}


def test_bands_of_a_function_are_those_of_the_closed_form() -> None:
    draws = some_draws()
    closed = frontier(BESIROGLU, C, draws)
    solved = frontier(BESIROGLU, C, draws, cost=lambda n, d: 6 * n * d)
    assert solved.bands["n"][1] == pytest.approx(closed.bands["n"][1], rel=1e-9)
    assert solved.ci95["b"] == pytest.approx(closed.ci95["b"], rel=1e-9)


def test_draws_without_an_optimum_are_counted_and_too_many_are_no_band() -> None:
    draws = some_draws()
    draws[:100, 2] = 0.0
    draws[100:120, 3] = np.nan
    out = frontier(BESIROGLU, C, draws)
    assert out.bootstrap == {"draws": 500, "used": 380, "not_identified": 120}
    assert out.bands and out.ci95
    draws[:300, 2] = 0.0
    out = frontier(BESIROGLU, C, draws)
    assert out.status == "converged" and out.bands == {} and out.ci95 == {}
    assert out.warnings == ("no interval: 300 of 500 draws have no optimum",)


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surface", "reason"),
    [
        ((1.7, 400.0, 0.0, 0.3, 0.3), "no optimum: B not finite and above 0"),
        ((1.7, 400.0, 400.0, -0.1, np.nan), "no optimum: alpha, beta not finite and above 0"),
        ((np.nan, 400.0, 400.0, 0.3, 0.3), "no optimum: a parameter not finite and above 0"),
    ],
)
def test_refuses_a_surface_without_an_optimum(surface: Surface, reason: str) -> None:
    out = frontier(surface, C)
    assert out.status == "refused" and out.reason == reason
    assert out.params == {} and len(out.n) == 0


def test_compute_below_the_fixed_cost_has_no_optimum() -> None:
    n = np.geomspace(1e6, 1e9, 5)
    cost = cost_of_sizes(n, 6 * n, np.full(5, 1e18))
    out = frontier(EVEN, [1e19, 9e17], cost=cost)
    assert out.status == "not_converged"
    assert "no smallest loss found at C = 9e+17" in out.reason


@pytest.mark.parametrize("knee", [18.0, 25.0, 26.5, 27.0, 27.5, 28.0, 32.0])
def test_of_two_minima_the_lower_is_found(knee: float) -> None:
    """Around the knee larger models cost little more, which makes a minimum on either side."""

    def cost(n: np.ndarray, d: np.ndarray) -> np.ndarray:
        x = np.log(n) - knee
        return 1e3 * d * np.exp(2 * x - 0.95 * np.sqrt(np.pi) * 2 * erf(x / 2))

    out = frontier(EVEN, [1e15], cost=cost)
    assert out.status == "converged"
    n = np.exp(np.linspace(10, 40, 601))
    loss = loss_at(n, np.array([data_for(1e15, one, cost) for one in n]), EVEN)
    assert out.loss[0] <= loss.min()
    assert np.log(out.n[0]) == pytest.approx(np.log(n[loss.argmin()]), abs=0.06)


@pytest.mark.parametrize("c", [[], [0.0], [1e18, np.inf], [[1e18]]])
def test_compute_that_is_none_is_a_users_error(c: list) -> None:
    with pytest.raises(UserError, match="expected finite, positive values, at least one"):
        frontier(HOFFMANN, c)


def test_draws_of_another_shape_are_a_users_error() -> None:
    with pytest.raises(UserError, match=r"draws of shape \(3, 4\): expected E, A, B, alpha, beta"):
        frontier(HOFFMANN, C, np.ones((3, 4)))


def test_says_how_far_beyond_the_rows_it_goes() -> None:
    out = frontier(HOFFMANN, [1e18, 1e21], fitted_c=(1e18, 1e20))
    assert out.warnings == (
        "C goes 10 times beyond the rows behind the surface: extrapolated there",
    )
    assert frontier(HOFFMANN, [1e18, 1e20], fitted_c=(1e18, 1e20)).warnings == ()


def test_json_holds_it_all() -> None:
    out = json.loads(json.dumps(frontier(BESIROGLU, C, some_draws()).to_json(), allow_nan=False))
    assert out["cost"] == "C = 6 N D"
    assert len(out["n"]) == len(out["bands"]["n"][0]) == len(C)
