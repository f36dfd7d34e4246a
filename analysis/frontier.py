"""Approach 3: the compute-optimal frontier of a surface L(N, D) = E + A N^-alpha + B D^-beta.

Hoffmann et al. 2022 (arXiv 2203.15556, sec. 3.3, eq. 4). At cost C = k N D it is a power law,

    N* = G C^a,  D* = H C^b,  L* = E + K C^-gamma,
    a = beta / (alpha + beta),  b = alpha / (alpha + beta),  gamma = alpha beta / (alpha + beta),
    G = (alpha A / (beta B))^(1 / (alpha + beta)) k^-a,  H = 1 / (k G),

with G for C itself, as approaches 1 and 2 have it; Hoffmann et al. give it for C / 6. At any other
cost (N, D) -> C, smooth and rising in both, it is the point where ln N and ln D buy as much loss
per share of C,

    alpha A N^-alpha / (d ln C / d ln N) = beta B D^-beta / (d ln C / d ln D),

and is found by Newton's method; the exponents then are slopes of lines in log-log over the C asked
for.

Shapes: J values of C, B draws of the parameters (E, A, B, alpha, beta).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.optimum import MIN_USED, Array, Status, power_laws
from harness.errors import UserError

Cost = Callable[[Array, Array], Array]
"""(N, D) -> C, elementwise on arrays, smooth and rising in both."""
SURFACE = ("E", "A", "B", "alpha", "beta")
_NAMES = ("G", "a", "H", "b", "E", "K", "gamma")
_K = 6.0
_ITERATIONS = 60
# The last step in ln N or ln D: the next would be far smaller, and rounding is 1e-11.
_CLOSE = 1e-9
# Of ln N and ln D in fourth-order differences, where truncation and rounding are alike, 1e-12.
_STEP = 1e-3
_CHUNK = 200_000


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """N*, D* and L* at each C, with 95 % bands from the draws. Empty when refused."""

    status: Status
    reason: str = ""
    params: dict[str, float] = field(default_factory=dict)
    """G, a, H, b; with C = k N D also E, K, gamma."""
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    cost: str = ""
    c: Array = field(default_factory=lambda: np.zeros(0))
    n: Array = field(default_factory=lambda: np.zeros(0))
    d: Array = field(default_factory=lambda: np.zeros(0))
    loss: Array = field(default_factory=lambda: np.zeros(0))
    bands: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Of n, d and loss; empty without enough draws."""
    bootstrap: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As lists of plain numbers."""
        out = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in ("c", "n", "d", "loss"):
            out[name] = out[name].tolist()
        out["bands"] = {k: [end.tolist() for end in ends] for k, ends in self.bands.items()}
        return out


def frontier(
    params: Mapping[str, float] | Sequence[float],
    c: Sequence[float] | Array,
    draws: Array | None = None,
    *,
    cost: float | Cost = _K,
    cost_name: str = "",
    fitted_c: tuple[float, float] | None = None,
) -> Frontier:
    """The frontier of the surface `params` at compute `c`.

    `params` are E, A, B, alpha, beta, by name or in this order; `draws` [B, 5] in this order.
    `cost` is k of C = k N D, or any cost of (N, D), as `analysis.costs` makes them. `fitted_c` is
    the range of C of the rows behind the surface, to say how far `c` goes beyond it.
    Refused where the surface has no optimum: A, B, alpha or beta not above 0.
    Raises UserError for c that is not positive or draws of another shape.
    """
    c_J = np.asarray(c, dtype=float)
    if c_J.ndim != 1 or not len(c_J) or not (np.isfinite(c_J) & (c_J > 0)).all():
        raise UserError(f"compute {c_J.tolist()}: expected finite, positive values, at least one")
    draws_B5 = np.zeros((0, 5)) if draws is None else np.asarray(draws, dtype=float)
    if draws_B5.ndim != 2 or draws_B5.shape[1] != 5:
        raise UserError(f"draws of shape {draws_B5.shape}: expected {', '.join(SURFACE)} per draw")
    theta_15 = _theta(params)
    name = cost_name or ("a cost of its own" if callable(cost) else f"C = {cost:g} N D")
    bad = [n for n, v in zip(SURFACE[1:], theta_15[0, 1:], strict=True) if not v > 0]
    if bad or not np.isfinite(theta_15).all():
        reason = f"no optimum: {', '.join(bad) or 'a parameter'} not finite and above 0"
        return Frontier(status="refused", reason=reason, cost=name)
    points_1J3 = _points(theta_15, c_J, cost, None)
    if callable(cost):
        points_1J3 = _lowest(theta_15, points_1J3, c_J, cost)
    lost = ~np.isfinite(points_1J3[0]).all(axis=1)
    if lost.any():
        reason = f"no smallest loss found at C = {c_J[lost][0]:.4g}: is the cost smooth and rising?"
        return Frontier(status="not_converged", reason=reason, cost=name)
    good_B5 = draws_B5[np.isfinite(draws_B5).all(axis=1) & (draws_B5[:, 1:] > 0).all(axis=1)]
    size = max(1, _CHUNK // len(c_J))
    near = points_1J3 / _closed(theta_15, c_J, _K)
    parts = [_points(good_B5[i : i + size], c_J, cost, near) for i in range(0, len(good_B5), size)]
    found_BJ3 = np.concatenate([np.zeros((0, len(c_J), 3)), *parts])
    solved = np.isfinite(found_BJ3).all(axis=(1, 2))
    good_B5, found_BJ3 = good_B5[solved], found_BJ3[solved]
    num, used = len(draws_B5), len(found_BJ3)
    warnings = _about_range(c_J, fitted_c)
    bands, ci95 = {}, {}
    if used >= max(20, MIN_USED * num):
        low, high = np.percentile(found_BJ3, [2.5, 97.5], axis=0)
        bands = {k: (low[:, i], high[:, i]) for i, k in enumerate(("n", "d", "loss"))}
        ends = np.percentile(_laws(good_B5, found_BJ3, c_J, cost), [2.5, 97.5], axis=0)
        ci95 = {k: (v[0], v[1]) for k, v in _named(ends).items()}
    elif num:
        warnings.append(f"no interval: {num - used} of {num} draws have no optimum")
    return Frontier(
        status="converged",
        params={k: v[0] for k, v in _named(_laws(theta_15, points_1J3, c_J, cost)).items()},
        ci95=ci95,
        cost=name,
        c=c_J,
        n=points_1J3[0, :, 0],
        d=points_1J3[0, :, 1],
        loss=points_1J3[0, :, 2],
        bands=bands,
        bootstrap={"draws": num, "used": used, "not_identified": num - used},
        warnings=tuple(warnings),
    )


def _theta(params: Mapping[str, float] | Sequence[float]) -> Array:
    if isinstance(params, Mapping):
        missing = [name for name in SURFACE if name not in params]
        if missing:
            found = ", ".join(params)
            raise UserError(f"surface with {found}: {', '.join(missing)} missing")
        params = [params[name] for name in SURFACE]
    if len(params) != len(SURFACE):
        raise UserError(f"{len(params)} parameters: expected {', '.join(SURFACE)}")
    return np.asarray([params], dtype=float)


def _about_range(c_J: Array, fitted_c: tuple[float, float] | None) -> list[str]:
    if fitted_c is None:
        return []
    beyond = max(c_J.max() / fitted_c[1], fitted_c[0] / c_J.min())
    if beyond <= 1 + 1e-9:
        return []
    return [f"C goes {beyond:.3g} times beyond the rows behind the surface: extrapolated there"]


# -- laws and points ------------------------------------------------------------------------


def _points(theta_B5: Array, c_J: Array, cost: float | Cost, near_1J3: Array | None) -> Array:
    """N*, D*, L* [B, J, 3]; NaN where none is found.

    `near_1J3` is what the frontier of a like surface is of the closed form, to start from there.
    """
    if not callable(cost):
        return _closed(theta_B5, c_J, float(cost))
    start = _closed(theta_B5, c_J, _K)
    return _newton(theta_B5, c_J, cost, start if near_1J3 is None else start * near_1J3)


def _laws(theta_B5: Array, points_BJ3: Array, c_J: Array, cost: float | Cost) -> Array:
    """ln G, a, ln H, b [B, 4], and with C = k N D also E, ln K, gamma [B, 7]."""
    if callable(cost):
        log_BJ3 = np.log(points_BJ3)
        draw = np.repeat(np.arange(len(log_BJ3)), len(c_J))
        x = np.tile(np.log(c_J), len(log_BJ3))
        return power_laws(draw, x, log_BJ3.reshape(-1, 3), len(log_BJ3))[:, :4]
    e, a_, b_, alpha, beta = theta_B5.T
    total = alpha + beta
    a, b, gamma = beta / total, alpha / total, alpha * beta / total
    log_g = np.log(alpha * a_ / (beta * b_)) / total - a * np.log(cost)
    log_h = -log_g - np.log(cost)
    log_k = np.log(a_) - alpha * log_g + np.log1p(alpha / beta)
    return np.stack([log_g, a, log_h, b, e, log_k, gamma], axis=1)


def _named(laws: Array) -> dict[str, list[float]]:
    values = zip(_NAMES[: laws.shape[1]], laws.T, strict=True)
    return {k: [float(x) for x in (np.exp(v) if k in "GHK" else v)] for k, v in values}


def _loss(theta_B5: Array, log_n_BJ: Array, log_d_BJ: Array) -> Array:
    e, a, b, alpha, beta = theta_B5.T[:, :, None]
    return e + a * np.exp(-alpha * log_n_BJ) + b * np.exp(-beta * log_d_BJ)


def _closed(theta_B5: Array, c_J: Array, k: float) -> Array:
    laws = _laws(theta_B5, np.zeros((0, 0, 3)), c_J, k)[:, :4, None]
    log_n, log_d = laws[:, 0] + laws[:, 1] * np.log(c_J), laws[:, 2] + laws[:, 3] * np.log(c_J)
    return np.stack([np.exp(log_n), np.exp(log_d), _loss(theta_B5, log_n, log_d)], axis=-1)


# -- any cost -------------------------------------------------------------------------------


def _log_cost(cost: Cost, log_n: Array, log_d: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.log(np.asarray(cost(np.exp(log_n), np.exp(log_d)), dtype=float))


def _elasticities(cost: Cost, log_n: Array, log_d: Array) -> tuple[Array, Array]:
    """d ln C / d ln N and d ln C / d ln D by fourth-order central differences."""
    h = _STEP
    out = []
    for dn, dd in ((h, 0.0), (0.0, h)):
        one, two = (
            _log_cost(cost, log_n + m * dn, log_d + m * dd)
            - _log_cost(cost, log_n - m * dn, log_d - m * dd)
            for m in (1, 2)
        )
        out.append((8 * one - two) / (12 * h))
    return out[0], out[1]


def _newton(theta_B5: Array, c_J: Array, cost: Cost, start_BJ3: Array) -> Array:
    """Both conditions solved in (ln N, ln D) from the closed form; NaN where that fails."""
    shape = start_BJ3.shape[:2]
    log_c = np.broadcast_to(np.log(c_J), shape).ravel()
    _, a, b, alpha, beta = (np.repeat(v, shape[1]) for v in theta_B5.T)
    log_ratio = np.log(alpha * a) - np.log(beta * b)
    n, d = (np.log(start_BJ3[..., i]).ravel() for i in (0, 1))
    active = np.arange(len(n))
    for _ in range(_ITERATIONS):
        at_n, at_d, al, be = n[active], d[active], alpha[active], beta[active]
        with np.errstate(all="ignore"):
            e_n, e_d = _elasticities(cost, at_n, at_d)
            ratio = np.log(e_n / e_d)
            turn_n, turn_d = (
                (np.log(np.divide(*_elasticities(cost, at_n + dn, at_d + dd))) - ratio) / _STEP
                for dn, dd in ((_STEP, 0.0), (0.0, _STEP))
            )
            off_c = _log_cost(cost, at_n, at_d) - log_c[active]
            gain = log_ratio[active] - al * at_n + be * at_d - ratio
            # Where the cost bends more than the loss, far from the optimum, as if it did not.
            bends = e_n * (be - turn_d) + e_d * (al + turn_n) > 0.1 * (e_n * be + e_d * al)
            to_n = al + np.where(bends, turn_n, 0.0)
            to_d = be - np.where(bends, turn_d, 0.0)
            scale = e_n * to_d + e_d * to_n
            step_n = np.clip((e_d * gain - to_d * off_c) / scale, -2, 2)
            step_d = np.clip((-e_n * gain - to_n * off_c) / scale, -2, 2)
        step_n[~((e_n > 0) & (e_d > 0))] = np.nan
        n[active] += step_n
        d[active] += step_d
        # NaN compares false: what is lost stops too.
        active = active[np.maximum(np.abs(step_n), np.abs(step_d)) > _CLOSE]
        if not len(active):
            break
    n[active] = np.nan
    n, d = n.reshape(shape), d.reshape(shape)
    d = np.where(np.isfinite(n), d, np.nan)
    return np.stack([np.exp(n), np.exp(d), _loss(theta_B5, n, d)], axis=-1)


def _lowest(theta_15: Array, points_1J3: Array, c_J: Array, cost: Cost) -> Array:
    """The points, or lower ones up to a factor 33 in N away; NaN where Newton does not reach them.

    A cost that bends has several stationary points along one C, a maximum between two minima.
    """
    lower = np.ones(len(c_J), bool)
    for _ in range(3):
        log_n = np.log(points_1J3[0, :, 0])
        n = log_n + np.linspace(-3.5, 3.5, 211)[:, None]
        low, high = np.full(n.shape, -50.0), np.full(n.shape, 100.0)
        for _ in range(50):
            middle = (low + high) / 2
            dear = _log_cost(cost, n, middle) > np.log(c_J)
            low, high = np.where(dear, low, middle), np.where(dear, middle, high)
        # From below: where a run costs more than C without any data, D stays next to nothing.
        loss = _loss(np.broadcast_to(theta_15, (len(n), 5)), n, low)
        best, every = loss.argmin(axis=0), np.arange(len(c_J))
        scanned = np.stack([n[best, every], low[best, every]], axis=1)
        # False also where there is no point to compare with.
        lower = loss[best, every] < points_1J3[0, :, 2] * (1 - 1e-9)
        if not lower.any():
            break
        start = np.where(lower[:, None], np.exp(scanned), points_1J3[0, :, :2])
        points_1J3 = _newton(theta_15, c_J, cost, start[None])
    else:
        points_1J3[0, lower] = np.nan
    return points_1J3
