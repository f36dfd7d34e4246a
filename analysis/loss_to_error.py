"""Downstream error as a function of pretraining loss: between a floor and chance, with the noise
that a test set of finite size has.

error = c + (e0 - c) / (1 + exp(-k (loss - L0))): the logistic curve of Bhagia et al. 2024 (arXiv
2412.04403), its upper end fixed at the error of guessing, e0 = 1 - 1 / classes. For
losses well above L0 it is the exponential of Gadre et al. 2024 (arXiv 2403.08540).

A row's variance is binomial, f (1 - f) / n for n test samples, plus that of runs, s^2, which is
what makes the weighted squares as large as their degrees of freedom (Paule and Mandel 1982, J. Res.
NBS 87). All rows are judged on the same samples, so what is hard about those is common to them:
the binomial variance is an upper bound of what makes rows differ.

Shapes: B draws or starts, P rows, K = 3 parameters (c, ln k, L0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from analysis.forms import Array, sigmoid

FORMULA = "error = c + (e0 - c) / (1 + exp(-k * (loss - L0)))"
NAMES = ("c", "k", "L0")
MIN_ROWS = 5
MIN_CHANGE = 4.0
"""The law must change along the rows by so many standard deviations of a row."""
_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class LossToError:
    """One fitted curve; `params` is empty when refused."""

    status: Literal["converged", "not_converged", "refused"]
    reason: str = ""
    chance: float
    params: dict[str, float] = field(default_factory=dict)
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows_used: int = 0
    loss_range: tuple[float, float] | None = None
    spearman: float | None = None
    spearman_p: float | None = None
    """One-sided: chance of so high a rank correlation if error did not rise with loss."""
    residual_sd: float | None = None
    """Of errors about the curve, rows - 3 degrees of freedom."""
    noise_sd: float | None = None
    """Root mean square of the binomial standard deviations; None if test sizes are unknown."""
    run_sd: float | None = None
    """s: what runs of equal loss differ by beyond the test set's noise; 0 where none is seen."""
    noise_p: float | None = None
    """Chance of so large a scatter if all of it were the test set's noise."""
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    theta: Array | None = None
    draws: Array | None = None
    """Bootstrap (c, ln k, L0), (B, 3)."""

    @property
    def is_number(self) -> bool:
        """Whether the parameters mean anything."""
        return self.status == "converged"

    def predict(self, loss: Any) -> Array:
        """The curve; any shape."""
        assert self.theta is not None, f"refused: {self.reason}"
        values = np.asarray(loss, float)
        return _value(self.theta[None], values.reshape(1, -1), self.chance)[0].reshape(values.shape)

    def draws_at(self, loss: Any) -> Array:
        """The curve of every draw at losses (P,) or at a draw's own losses (B, P); (B, P)."""
        assert self.draws is not None, "no bootstrap draws"
        return _value(self.draws, np.atleast_2d(np.asarray(loss, float)), self.chance)

    def band(self, loss: Any) -> tuple[Array, Array] | None:
        """95 % band of the curve itself; None without draws."""
        if self.draws is None:
            return None
        low, high = np.percentile(self.draws_at(loss), [2.5, 97.5], axis=0)
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Everything but the draws."""
        out = {k: v for k, v in self.__dict__.items() if k not in ("theta", "draws")}
        return {"formula": FORMULA, **out}


def fit_loss_to_error(
    loss: Sequence[float] | Array,
    error: Sequence[float] | Array,
    *,
    chance: float,
    num_tests: Sequence[float] | Array | None = None,
    bootstrap: int = 400,
    seed: int = 0,
) -> LossToError:
    """Fits the curve by weighted least squares; refuses where rows cannot show one.

    `num_tests` is the number of test samples of each row; without it the noise floor is absent
    and all scatter counts as the runs'. The bootstrap is parametric: binomial test results of runs
    that scatter about the curve.
    """
    x, y = np.asarray(loss, float), np.asarray(error, float)
    num = None if num_tests is None else np.asarray(num_tests, float)
    facts: dict[str, Any] = {"chance": chance, "rows_used": len(x)}
    refusal = _why_not(x, y)
    if refusal:
        return LossToError(status="refused", reason=refusal, **facts)
    ranks: Any = stats.spearmanr(x, y, alternative="greater")
    rho, p = float(ranks.statistic), float(ranks.pvalue)
    facts |= {
        "loss_range": (float(x.min()), float(x.max())),
        "spearman": rho,
        "spearman_p": p,
    }
    if not p < _LEVEL:
        return LossToError(
            status="refused",
            reason="no monotone law: error does not clearly fall with the loss (Spearman"
            f" {rho:.2f}, p = {p:.2g}; at most {_LEVEL:g} needed)",
            **facts,
        )
    theta, variance, run_var, converged = _fit(x, y, chance, num)
    fitted = _value(theta[None], x[None], chance)[0]
    residual_sd = float(np.sqrt(((y - fitted) ** 2).sum() / (len(x) - len(NAMES))))
    change = float(fitted.max() - fitted.min())
    row_sd = float(np.sqrt(variance.mean()))
    facts |= {"residual_sd": residual_sd, "run_sd": float(np.sqrt(run_var))}
    facts |= _noise(y, fitted, num)
    if change < MIN_CHANGE * row_sd:
        return LossToError(
            status="refused",
            reason=f"span of the loss too small: along {x.min():.3g} to {x.max():.3g} the error"
            f" changes by {100 * change:.2g} points, a row scatters by {100 * row_sd:.2g};"
            f" at least {MIN_CHANGE:g} times that needed",
            **facts,
        )
    draws = _draws(theta, x, chance, num, run_var, variance, bootstrap, seed)
    return LossToError(
        status="converged" if converged else "not_converged",
        params=dict(zip(NAMES, map(float, _natural(theta[None])[0]), strict=True)),
        ci95=_intervals(draws),
        theta=theta,
        draws=draws,
        verdict=_verdict(facts),
        warnings=_warnings(theta, draws, len(x)),
        **facts,
    )


def _why_not(x: Array, y: Array) -> str | None:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return "values that are not finite"
    if ((y < 0) | (y > 1)).any():
        return "errors outside 0 to 1"
    if len(x) < MIN_ROWS:
        return f"too few points ({len(x)}); at least {MIN_ROWS} needed for {len(NAMES)} parameters"
    distinct = len(np.unique(x))
    if distinct <= len(NAMES):
        return f"{distinct} distinct losses; at least {len(NAMES) + 1} needed"
    return None


def _natural(theta_BK: Array) -> Array:
    return np.stack([theta_BK[:, 0], np.exp(theta_BK[:, 1]), theta_BK[:, 2]], axis=1)


def _value(theta_BK: Array, x_BP: Array, chance: float) -> Array:
    floor, log_k, middle = (theta_BK[:, k, None] for k in range(3))
    return floor + (chance - floor) * sigmoid(np.exp(log_k) * (x_BP - middle))


def _jacobian(theta_BK: Array, x_P: Array, chance: float) -> Array:
    floor, log_k, middle = (theta_BK[:, k, None] for k in range(3))
    k = np.exp(log_k)
    share = sigmoid(k * (x_P - middle))
    slope = (chance - floor) * share * (1.0 - share) * k
    return np.stack([1.0 - share, slope * (x_P - middle), -slope], axis=2)


# -- solving --------------------------------------------------------------------------------


def _limits(x_P: Array, chance: float) -> tuple[Array, Array]:
    span = float(x_P.max() - x_P.min())
    low, high = float(x_P.min()), float(x_P.max())
    return (
        np.array([0.0, np.log(0.02 / span), low - 10 * span]),
        np.array([0.99 * chance, np.log(200.0 / span), high + 10 * span]),
    )


def _starts(x: Array, y: Array, chance: float) -> Array:
    """Logits are a line in the loss once the floor is fixed."""
    rows = []
    for share in (0.0, 0.5, 0.9):
        floor = share * min(float(y.min()), 0.9 * chance)
        part = np.clip((y - floor) / (chance - floor), 0.01, 0.99)
        slope, offset = np.polyfit(x, np.log(part / (1 - part)), 1)
        slope = max(float(slope), 0.05 / float(np.ptp(x)))
        rows.append([floor, np.log(slope), -float(offset) / slope])
    return np.array(rows)


def _minimise(
    theta: Array, x_P: Array, y_BP: Array, weight_P: Array, chance: float, steps: int = 200
) -> tuple[Array, Array, Array]:
    """Levenberg-Marquardt inside the limits; points, weighted squares, whether nothing is left."""
    low, high = _limits(x_P, chance)
    theta = np.clip(theta, low, high)
    y_BP = np.broadcast_to(y_BP, (len(theta), len(x_P)))

    def squares(at: Array) -> Array:
        return (weight_P * (_value(at, x_P[None], chance) - y_BP) ** 2).sum(axis=1)

    value, damping = squares(theta), np.full(len(theta), 1e-2)
    left = np.full(len(theta), np.inf)
    for _ in range(steps):
        jacobian = _jacobian(theta, x_P, chance)
        weighted = weight_P[None, :, None] * jacobian
        residual = _value(theta, x_P[None], chance) - y_BP
        gradient = np.matmul(residual[:, None, :], weighted)[:, 0]
        # A parameter that pushes against its limit stays there.
        held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        gradient = np.where(held, 0.0, gradient)
        matrix = np.matmul(weighted.transpose(0, 2, 1), jacobian)
        scale = np.sqrt(np.einsum("bkk->bk", matrix)) + 1e-150
        matrix = matrix / (scale[:, :, None] * scale[:, None, :])
        matrix[held[:, :, None] | held[:, None, :]] = 0.0
        matrix[:, range(3), range(3)] = np.where(held, 1.0, 1.0 + damping[:, None])
        step = np.linalg.solve(matrix, (gradient / scale)[:, :, None])[:, :, 0] / scale
        left = (gradient * step).sum(axis=1)
        trial = np.clip(theta - step, low, high)
        trial_value = squares(trial)
        better = trial_value <= value
        theta = np.where(better[:, None], trial, theta)
        value = np.where(better, trial_value, value)
        damping = np.clip(damping * np.where(better, 0.3, 5.0), 1e-12, 1e8)
        if (left <= 1e-10 * value + 1e-18 * weight_P.mean()).all():
            break
    return theta, value, left <= 1e-6 * value + 1e-14 * weight_P.mean()


def _fit(x: Array, y: Array, chance: float, num: Array | None) -> tuple[Array, Array, float, bool]:
    """Parameters, variance of each row, s^2, convergence: weights and curve found in turn."""
    variance, run_var, theta = np.full(len(x), 1.0), 0.0, _starts(x, y, chance)
    converged = False
    for _ in range(6):
        found, value, good = _minimise(theta, x, y[None], 1.0 / variance, chance)
        best = int(value.argmin())
        theta, converged = found[best : best + 1], bool(good[best])
        fitted = _value(theta, x[None], chance)[0]
        binomial = _binomial(fitted, num)
        last, run_var = run_var, _between_runs((y - fitted) ** 2, binomial)
        variance = np.maximum(binomial + run_var, 1e-16)
        if abs(run_var - last) <= 1e-4 * float(variance.mean()) and last:
            break
    return theta[0], variance, run_var, converged


def _binomial(fitted: Array, num: Array | None) -> Array:
    if num is None:
        return np.zeros_like(fitted)
    # At least a tenth of a wrong sample: a fitted error of 0 would have an infinite weight.
    share = np.clip(fitted, 0.1 / num, 1 - 0.1 / num)
    return share * (1 - share) / num


def _between_runs(squares: Array, binomial: Array) -> float:
    """s^2 >= 0 with sum of squares / (binomial + s^2) = rows - 3, by bisection."""
    free = len(squares) - len(NAMES)
    if not binomial.any():
        return float(squares.sum() / free)
    if (squares / binomial).sum() <= free:
        return 0.0
    low, high = 0.0, float(squares.sum() / free) + float(binomial.max())
    for _ in range(60):
        middle = 0.5 * (low + high)
        if (squares / (binomial + middle)).sum() > free:
            low = middle
        else:
            high = middle
    return high


def _draws(
    theta: Array,
    x: Array,
    chance: float,
    num: Array | None,
    run_var: float,
    variance: Array,
    bootstrap: int,
    seed: int,
) -> Array | None:
    """Refits of made rows, (B, 3), spread by Student's t as far as the scatter was estimated."""
    if bootstrap < 20:
        return None
    rng = np.random.default_rng(seed)
    fitted = _value(theta[None], x[None], chance)
    made = observed(np.repeat(fitted, bootstrap, axis=0), num, run_var, rng)
    begin = np.repeat(theta[None], bootstrap, axis=0)
    one, value = _refitted(begin, x, made, 1.0 / variance, chance)
    # Where the optimum has no floor, a draw's may have one, and the other way round.
    other = begin.copy()
    other[:, 0] = 0.0 if theta[0] > 0 else 0.5 * float(fitted.min())
    two, value_two = _refitted(other, x, made, 1.0 / variance, chance)
    found = np.where((value_two < value)[:, None], two, one)
    free = len(x) - len(NAMES)
    wide = float(stats.t.ppf(0.975, free) / stats.norm.ppf(0.975)) - 1.0
    spread = 1.0 + wide * run_var / float(variance.mean())
    return np.clip(theta + (found - theta) * spread, *_limits(x, chance))


def _refitted(
    theta: Array, x_P: Array, y_BP: Array, weight_P: Array, chance: float
) -> tuple[Array, Array]:
    """A few draws at a time where rows are many: a core's cache holds them, and they end early."""
    size = max(1, _AT_ONCE // len(x_P))
    found = [
        _minimise(theta[i : i + size], x_P, y_BP[i : i + size], weight_P, chance, 60)[:2]
        for i in range(0, len(theta), size)
    ]
    points, values = (np.concatenate(part) for part in zip(*found, strict=True))
    return points, values


_AT_ONCE = 130_000
"""Rows times draws: 400 draws of 300 rows are still refitted at once."""


def observed(expected: Array, num: Array | None, run_var: float, rng: np.random.Generator) -> Array:
    """Errors as they would be measured: runs scatter, test samples are finite."""
    share = expected + np.sqrt(run_var) * rng.standard_normal(expected.shape)
    share = np.clip(share, 0.0, 1.0)
    if num is None:
        return share
    whole = np.maximum(1, np.round(num)).astype(np.int64)
    return rng.binomial(np.broadcast_to(whole, share.shape), share) / whole


# -- words ----------------------------------------------------------------------------------


def _noise(y: Array, fitted: Array, num: Array | None) -> dict[str, Any]:
    if num is None:
        return {}
    binomial = _binomial(fitted, num)
    free = len(y) - len(NAMES)
    chi2 = float(((y - fitted) ** 2 / binomial).sum())
    return {
        "noise_sd": float(np.sqrt(binomial.mean())),
        "noise_p": float(stats.chi2.sf(chi2, free)),
    }


def _verdict(facts: dict[str, Any]) -> str:
    scatter = f"scatter about the curve {100 * facts['residual_sd']:.2g} points"
    if facts.get("noise_sd") is None:
        return f"{scatter}; sizes of the test set unknown, so no noise floor"
    ratio = facts["residual_sd"] / facts["noise_sd"]
    floor = f"{100 * facts['noise_sd']:.2g} points of the test set's noise"
    if facts["noise_p"] >= _LEVEL:
        return (
            f"predictable from the loss to the noise floor: {scatter}, no more than {floor};"
            " only a larger test set could show more"
        )
    return (
        f"not fully predictable from the loss: {scatter}, {ratio:.1f} times {floor}; runs of equal"
        " loss differ"
    )


def _intervals(draws: Array | None) -> dict[str, tuple[float, float]]:
    if draws is None:
        return {}
    low, high = np.percentile(_natural(draws), [2.5, 97.5], axis=0)
    return {n: (float(low[i]), float(high[i])) for i, n in enumerate(NAMES)}


def _warnings(theta: Array, draws: Array | None, num: int) -> tuple[str, ...]:
    out = []
    lowest = float(theta[0]) if draws is None else float(np.percentile(draws[:, 0], 2.5))
    if lowest <= 1e-6:
        out.append("no floor resolved: c may be 0")
    if num < 3 * len(NAMES):
        out.append(f"only {num} rows for {len(NAMES)} parameters; read with care")
    return tuple(out)
