"""Fits a law to rows, with the evidence that the fit is a true optimum, or refuses with a reason.

The objective is the *sum* of Huber losses of log residuals (Hoffmann et al. 2022, arXiv
2203.15556, sec. 3.3); a mean makes optimisers stop early (Besiroglu et al. 2024, arXiv
2404.10102). Starts come from variable projection on a grid of exponents; every start is brought
to an optimum by Newton's method (`analysis.solve`), so that it can be said how many of them agree.

Shapes: B problems, P rows, K parameters, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from analysis import resample, solve
from analysis.forms import EXPONENTS, Array, Form
from analysis.shapes import FORMS, m4_with_chance
from analysis.solve import Problem, condition_number, minimise, objective

Status = Literal["converged", "not_converged", "at_bound", "refused"]

DELTA = 1e-3
"""Of the Huber loss, in units of ln y; Hoffmann et al. 2022, sec. 3.3."""
MAX_CONDITION = 1e8
"""Beyond it, some change of the parameters moves no prediction by a thousandth of a percent."""
MIN_SPREAD = 0.2
"""Decades by which D must vary at equal N (and N at equal D) for both axes to be told apart."""
MIN_SPAN = 1.0
"""Decades that every input must span."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One fitted law with what a reader needs to judge it. `params` is empty when refused."""

    law: str
    formula: str
    status: Status
    reason: str = ""
    params: dict[str, float] = field(default_factory=dict)
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    objective: float | None = None
    """The sum, never a mean."""
    delta: float = DELTA
    rows_used: int = 0
    distinct: dict[str, int] = field(default_factory=dict)
    """Distinct values by input."""
    span_decades: dict[str, float] = field(default_factory=dict)
    starts: int = 0
    starts_at_best: int = 0
    gradient_norm: float | None = None
    condition_number: float | None = None
    bounds_hit: tuple[str, ...] = ()
    log_rmse: float | None = None
    covariance: tuple[tuple[float, ...], ...] = ()
    """Of the parameters in the order of `params`, over bootstrap draws."""
    bootstrap: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    draws: Array | None = None
    """Bootstrap parameters in the order of `params`, (draws, K)."""
    form: Form | None = None
    inner: Array | None = None
    """Inner coordinates of the optimum, for `centre`."""
    inner_draws: Array | None = None
    centre: Array | None = None

    @property
    def is_number(self) -> bool:
        """Whether the parameters mean anything."""
        return self.status == "converged"

    def predict(self, inputs: Mapping[str, Any]) -> Array:
        """The law at the inputs; any shape."""
        assert self.form is not None and self.inner is not None, f"refused: {self.reason}"
        return self._values(self.inner[None], inputs)[0]

    def band(self, inputs: Mapping[str, Any]) -> tuple[Array, Array] | None:
        """95 % bootstrap band at the inputs; None without draws."""
        if self.inner_draws is None or len(self.inner_draws) < 20:
            return None
        values = self._values(self.inner_draws, inputs)
        return resample.ends(values)

    def draws_at(self, inputs: Mapping[str, Any]) -> Array:
        """The law of every bootstrap draw at the inputs, (draws, ...)."""
        assert self.inner_draws is not None, "no bootstrap draws"
        return self._values(self.inner_draws, inputs)

    def _values(self, theta_BK: Array, inputs: Mapping[str, Any]) -> Array:
        assert self.form is not None and self.centre is not None
        columns = np.broadcast_arrays(*(np.asarray(inputs[n], float) for n in self.form.inputs))
        u = np.stack([np.log(c).ravel() for c in columns]) - self.centre[:, None]
        return np.exp(self.form.value(theta_BK, u)).reshape(len(theta_BK), *columns[0].shape)

    def to_json(self) -> dict[str, Any]:
        """Everything but the draws and the form."""
        hidden = {"draws", "form", "inner", "inner_draws", "centre"}
        out = {k: v for k, v in self.__dict__.items() if k not in hidden}
        log = {n: float(np.log(v)) for n, v in self.params.items() if v > 0}
        return {**out, "params_log": log, "reduction": "sum", "solver": SOLVER}


SOLVER = "variable projection starts, reweighted and Newton steps (Levenberg-Marquardt)"


def form_of(law: str, chance: float | None = None) -> Form:
    """The form by name; `chance` fixes e0 of m4."""
    if chance is not None and law == "m4":
        return m4_with_chance(chance)
    return FORMS[law]


def why_not(form: Form, inputs: Mapping[str, Any], y: Array) -> str | None:
    """Why the rows cannot identify the law, whatever their values of y; None if they may."""
    if not (np.isfinite(y).all() and (y > 0).all()):
        return "y has values that are not finite and positive"
    num, least = len(y), form.size + 2
    if num < least:
        return f"too few points ({num}); at least {least} needed for {form.size} parameters"
    for name in form.inputs:
        distinct = np.unique(np.asarray(inputs[name], float))
        if len(distinct) < form.needs_distinct:
            return f"{len(distinct)} distinct {name}; at least {form.needs_distinct} needed"
        span = float(np.log10(distinct[-1] / distinct[0]))
        if span < MIN_SPAN - 1e-9:
            return f"{name} spans {span:.2f} decades; at least {MIN_SPAN:g} needed"
    if len(form.inputs) == 2:
        return _why_not_apart(form, inputs)
    return None


def _why_not_apart(form: Form, inputs: Mapping[str, Any]) -> str | None:
    """Two axes that move together cannot be told apart."""
    lines = [np.log10(np.asarray(inputs[name], float)) for name in form.inputs]
    for (one, of), (other, by) in zip(
        zip(lines, form.inputs, strict=True),
        list(zip(lines, form.inputs, strict=True))[::-1],
        strict=True,
    ):
        slope, offset = np.polyfit(other, one, 1)
        rest = one - offset - slope * other
        spread = float(rest.max() - rest.min())
        if spread < MIN_SPREAD:
            return (
                f"{of} and {by} move together: at equal {by}, {of} varies by {spread:.2f} decades;"
                f" at least {MIN_SPREAD:g} needed to tell their exponents apart"
            )
    return None


def fit(
    law: str | Form,
    inputs: Mapping[str, Any],
    y: Sequence[float] | Array,
    *,
    groups: Sequence[Any] | None = None,
    weights: Sequence[float] | Array | None = None,
    delta: float = DELTA,
    bootstrap: int = 400,
    seed: int = 0,
    chance: float | None = None,
) -> Fit:
    """Fits the law to y over the named inputs; refuses when the rows cannot identify it.

    `groups` names the resampling unit of each row (default: each its own): rows of one run are
    drawn together, since they share the run's luck. `weights` multiply rows' losses.
    """
    form = form_of(law, chance) if isinstance(law, str) else law
    y_P = np.asarray(y, float)
    columns = {name: np.asarray(inputs[name], float) for name in form.inputs}
    facts: dict[str, Any] = {
        "law": form.name,
        "formula": form.formula,
        "delta": delta,
        "rows_used": len(y_P),
        "distinct": {n: len(np.unique(c)) for n, c in columns.items()},
        "span_decades": {n: _span(c) for n, c in columns.items()},
    }
    refusal = why_not(form, columns, y_P)
    if refusal:
        return Fit(status="refused", reason=refusal, **facts)
    log_IP = np.log(np.stack(list(columns.values())))
    centre = log_IP.mean(axis=1)
    problem = Problem(form=form, u_IP=log_IP - centre[:, None], ln_y_P=np.log(y_P), delta=delta)
    weight_P = np.ones(len(y_P)) if weights is None else np.asarray(weights, float)
    best = _optimum(problem, y_P, weight_P)
    facts |= {
        "form": form,
        "centre": centre,
        "starts": best.starts,
        "starts_at_best": best.at_best,
        "gradient_norm": best.gradient,
        "condition_number": condition_number(problem, best.theta, weight_P),
        "bootstrap": {"draws": 0},
    }
    edges = form.edges(best.theta, problem.u_IP, problem.ln_y_P)
    if facts["condition_number"] > MAX_CONDITION and not edges:
        return Fit(
            status="refused",
            reason="parameters not identified: some change of them moves no prediction (condition"
            f" number {facts['condition_number']:.1e})",
            **facts,
        )
    drawn = None
    if bootstrap:
        drawn = resample.refit(problem, best.theta, best.others, weight_P, groups, bootstrap, seed)
        facts["bootstrap"] = drawn.counts
    found = _with_numbers(problem, best, edges, drawn, weight_P, facts)
    return replace(found, warnings=_warnings(found, form)) if found.params else found


@dataclass(frozen=True, kw_only=True)
class _Optimum:
    theta: Array
    objective: float
    gradient: float
    is_converged: bool
    starts: int
    at_best: int
    others: Array
    """Further local optima, best first, (B, K): bootstrap draws try them too."""


def _optimum(problem: Problem, y_P: Array, weight_P: Array) -> _Optimum:
    starts = solve.starts(problem, y_P)
    solved = minimise(problem, starts, weight_P[None], reweighted=40, newton=80)
    order = np.argsort(solved.objective_B, kind="stable")
    best = int(order[0])
    polished = minimise(
        problem, solved.theta_BK[best : best + 1], weight_P[None], reweighted=0, newton=200
    )
    value = float(polished.objective_B[0])
    floor = 1e-9 * problem.delta**2  # what rounding leaves of an exact fit
    close = solved.objective_B <= value * (1 + 1e-6) + floor
    others: list[Array] = []
    last = value
    for i in order:
        if solved.objective_B[i] > last * (1 + 1e-4) + floor and len(others) < 3:
            others.append(solved.theta_BK[i])
            last = float(solved.objective_B[i])
    return _Optimum(
        theta=polished.theta_BK[0],
        objective=value,
        gradient=float(polished.gradient_B[0]),
        is_converged=bool(polished.is_converged(problem.delta)[0]),
        starts=len(starts),
        at_best=int(close.sum()),
        others=np.array(others).reshape(-1, problem.form.size),
    )


def _with_numbers(
    problem: Problem,
    best: _Optimum,
    edges: list[str],
    drawn: resample.Drawn | None,
    weight_P: Array,
    facts: dict[str, Any],
) -> Fit:
    form, centre = problem.form, facts["centre"]
    values = form.natural(best.theta[None], centre)[0]
    residual = form.value(best.theta[None], problem.u_IP)[0] - problem.ln_y_P
    numbers: dict[str, Any] = {
        "params": dict(zip(form.names, map(float, values), strict=True)),
        "objective": float(objective(problem, best.theta[None], weight_P[None])[0]),
        "log_rmse": float(np.sqrt(np.mean(residual**2))),
        "inner": best.theta,
    }
    if drawn is not None and len(drawn.theta_BK) >= 20:
        draws = form.natural(drawn.theta_BK, centre)
        low, high = resample.ends(draws)
        numbers |= {
            "ci95": {n: (float(low[i]), float(high[i])) for i, n in enumerate(form.names)},
            "draws": draws,
            "inner_draws": drawn.theta_BK,
        }
        with np.errstate(all="ignore"):
            covariance = np.atleast_2d(np.cov(draws, rowvar=False))
        if np.isfinite(covariance).all():
            numbers["covariance"] = tuple(tuple(map(float, row)) for row in covariance)
        loose = [] if edges else _loose(form, numbers["ci95"])
        if loose:
            return Fit(status="refused", reason="; ".join(loose), **facts)
    status: Status = "converged" if best.is_converged else "not_converged"
    if edges:
        status = "at_bound"
    return Fit(status=status, reason="; ".join(edges), bounds_hit=tuple(edges), **(facts | numbers))


def _loose(form: Form, ci95: Mapping[str, tuple[float, float]]) -> list[str]:
    """Exponents whose interval reaches a limit of the search: they could be anything there."""
    found = []
    for name in form.exponents:
        low, high = ci95[name]
        if low <= EXPONENTS[0] * 1.01 or high >= EXPONENTS[1] * 0.99:
            found.append(
                f"{name} not identified: its 95 % interval, {low:.2g} to {high:.2g}, reaches a"
                " limit of the search"
            )
    return found


def _span(values: Array) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(good.max() / good.min())) if len(good) else 0.0


def _warnings(found: Fit, form: Form) -> tuple[str, ...]:
    out = []
    if found.rows_used < 3 * form.size:
        out.append(f"only {found.rows_used} rows for {form.size} parameters; read with care")
    for name, num in found.distinct.items():
        if num == form.needs_distinct:
            # As many parameters as distinct x: the curve meets their means whatever the law.
            out.append(f"only {num} distinct {name}: the shape of the law is not tested")
    if found.starts_at_best == 1 and found.starts > 1:
        out.append(f"1 of {found.starts} starts reached the optimum: it may not be the best one")
    counts = found.bootstrap
    if counts.get("draws") and counts["used"] < 0.8 * counts["draws"]:
        out.append(
            f"{counts['not_identified']} of {counts['draws']} bootstrap draws had too few distinct"
            " inputs and are left out; the interval is too narrow for that reason"
        )
    if counts.get("not_converged", 0) > 0.05 * max(1, counts.get("draws", 0)):
        out.append(f"{counts['not_converged']} of {counts['draws']} refits did not converge")
    if counts.get("units") and counts["units"] < 10:
        out.append(
            f"only {counts['units']} {counts['unit']} to resample: intervals may be too narrow"
        )
    return tuple(out)
