"""Which parameter of L(N, D) an initialization changes: offset, scales, exponents, or data shift.

Both arms (random, MAE) are fitted jointly, some parameters different in the MAE arm; F tests and
the error on pairs that were left out say which changes explain the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from analysis import resample
from analysis.arms import Arm
from analysis.fit import fit
from analysis.forms import CHINCHILLA, Array
from analysis.joint import joint
from analysis.solve import Problem, minimise, promising

CHANGES = {
    "E": "offset: the irreducible loss",
    "A": "scale of the model-size term",
    "alpha": "exponent of model size",
    "B": "data shift: as if each image counted several times",
    "beta": "exponent of data",
}
"""What an initialization may change, in words. A changed B is a constant multiple of data:
B / D^beta = B0 / (k D)^beta with k = (B0 / B)^(1 / beta)."""
_LEVEL = 0.05
_PARTS = 60
_FEW_PARTS = 20
"""Pairs are left out one at a time up to so many, then in so many parts; in few where there are
hundreds of pairs, of which each part then has dozens."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The joint law with some parameters different in the MAE arm."""

    changes: tuple[str, ...]
    objective: float
    parameters: int
    p_against_none: float
    """F test: chance of so much better a fit if the initialization changed nothing."""
    p_against_all: float
    """F test: chance of so much worse a fit than with all parameters changed, if these suffice."""
    cv_log_rmse: float
    """Root mean square of log residuals of pairs that were left out of the fit."""
    values: dict[str, float]
    """Changes: ln of the ratio MAE over random for E, A, B; difference for exponents."""
    ci95: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class WhichParameter:
    """Every single change, none and all, and what may be concluded."""

    status: Literal["answered", "refused"]
    reason: str = ""
    verdict: str = ""
    changed: tuple[str, ...] = ()
    """The single changes that explain the difference; several where they cannot be told apart."""
    rows: tuple[Change, ...] = ()
    rows_used: int = 0
    delta: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**self.__dict__, "rows": [dict(r.__dict__) for r in self.rows]}


def which_parameter(
    random: Arm, mae: Arm, *, delta: float, bootstrap: int = 400, seed: int = 0
) -> WhichParameter:
    """Fits both arms jointly with E, A, alpha, B, beta shared but for the changes, and compares.

    The tests need near-Gaussian losses, so delta is raised to three robust standard deviations of
    the residuals of the law with all parameters changed. Refused where the random arm alone does
    not identify the law.
    """
    alone = fit(
        CHINCHILLA, {"N": random.n, "D": random.d}, random.y, delta=delta, bootstrap=0, seed=seed
    )
    if alone.status == "refused":
        return WhichParameter(status="refused", reason=f"the random arm: {alone.reason}")
    if len(mae.y) < 3 or len(np.unique(mae.pairs)) < 3:
        return WhichParameter(
            status="refused", reason=f"{len(mae.y)} MAE rows; at least 3 pairs needed"
        )
    data = _Data.of(random, mae)
    everything = tuple(CHANGES)
    theta, _ = data.solve(everything, delta)
    residual = data.residual(everything, theta)
    spread = 1.4826 * float(np.median(np.abs(residual)))
    wide = max(delta, 3.0 * spread)
    size = CHINCHILLA.size
    solved = data.solve_all(wide)
    least = max(solved[everything][1], 1e-300)
    none, num = solved[()][1], len(data.y)
    free = num - size - len(everything)
    if free < 3:
        return WhichParameter(
            status="refused", reason=f"{num} rows; at least {num - free + 3} needed"
        )
    rows = []
    for changes, (theta, value) in solved.items():
        used = size + len(changes)
        rows.append(
            Change(
                changes=changes,
                objective=value,
                parameters=used,
                p_against_none=_f_test(none, value, len(changes), num - used),
                p_against_all=_f_test(value, least, len(everything) - len(changes), free),
                cv_log_rmse=data.left_out(changes, theta, wide),
                **data.intervals(changes, theta, wide, bootstrap, seed),
            )
        )
    verdict, changed = _verdict(rows)
    return WhichParameter(
        status="answered",
        verdict=verdict,
        changed=changed,
        rows=tuple(rows),
        rows_used=num,
        delta=wide,
    )


def _f_test(more: float, less: float, changes: int, free: int) -> float:
    """p value of the F test; sums of Huber losses are half sums of squares within delta."""
    if not changes:
        return 1.0
    value = max(0.0, more - less) / changes / max(less / free, 1e-300)
    return float(stats.f.sf(value, changes, free))


def _verdict(rows: list[Change]) -> tuple[str, tuple[str, ...]]:
    by = {r.changes: r for r in rows}
    whole = by[tuple(CHANGES)]
    singles = [r for r in rows if len(r.changes) == 1]
    if whole.p_against_none >= _LEVEL and min(r.p_against_none for r in singles) >= _LEVEL:
        return "no change of the law by the initialization is resolved", ()
    suffices = [r for r in singles if r.p_against_none < _LEVEL and r.p_against_all >= _LEVEL]
    names = tuple(r.changes[0] for r in sorted(suffices, key=lambda r: r.objective))
    if not names:
        return "the initialization changes more than one parameter of the law", ()
    if len(names) == 1:
        return f"the initialization changes {names[0]} ({CHANGES[names[0]]}), and no more", names
    listed = ", ".join(names[:-1]) + f" or {names[-1]}"
    return (
        f"one changed parameter explains the difference; which one the rows cannot tell: {listed}",
        names,
    )


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Rows of both arms, MAE rows marked."""

    u_IP: Array
    centre: Array
    y: Array
    marked: Array
    pairs: tuple[str, ...]

    @classmethod
    def of(cls, random: Arm, mae: Arm) -> _Data:
        n, d = np.concatenate([random.n, mae.n]), np.concatenate([random.d, mae.d])
        logs = np.log(np.stack([n, d]))
        centre = logs.mean(axis=1)
        return cls(
            u_IP=logs - centre[:, None],
            centre=centre,
            y=np.concatenate([random.y, mae.y]),
            marked=np.repeat([0.0, 1.0], [len(random.y), len(mae.y)]),
            pairs=(*random.pairs, *mae.pairs),
        )

    def problem(self, changes: tuple[str, ...], delta: float) -> Problem:
        form = joint(CHINCHILLA, changes, self.marked, self.centre)
        return Problem(form=form, u_IP=self.u_IP, ln_y_P=np.log(self.y), delta=delta)

    def solve_all(self, delta: float) -> dict[tuple[str, ...], tuple[Array, float]]:
        """The law without a change, with every single one and with all: optimum and objective.

        Each also starts from the optima of those it contains, so it fits no worse than they do.
        """
        size = CHINCHILLA.size
        found: dict[tuple[str, ...], tuple[Array, float]] = {(): self.solve((), delta)}
        for name in CHANGES:
            found[(name,)] = self.solve((name,), delta, np.append(found[()][0], 0.0)[None])
        wider = np.zeros((len(CHANGES), size + len(CHANGES)))
        for i, name in enumerate(CHANGES):
            theta, _ = found[(name,)]
            wider[i, :size], wider[i, size + i] = theta[:size], theta[size]
        everything = tuple(CHANGES)
        return found | {everything: self.solve(everything, delta, wider)}

    def solve(
        self, changes: tuple[str, ...], delta: float, more_BK: Array | None = None
    ) -> tuple[Array, float]:
        problem = self.problem(changes, delta)
        starts = promising(problem, self.y)
        if more_BK is not None:
            starts = np.concatenate([starts, more_BK])
        ones = np.ones((1, len(self.y)))
        found = minimise(problem, starts, ones, reweighted=40, newton=100)
        best = int(np.argmin(found.objective_B))
        return found.theta_BK[best], float(found.objective_B[best])

    def residual(self, changes: tuple[str, ...], theta: Array) -> Array:
        problem = self.problem(changes, 1.0)
        return problem.form.value(theta[None], self.u_IP)[0] - problem.ln_y_P

    def left_out(self, changes: tuple[str, ...], theta: Array, delta: float) -> float:
        """Root mean square log error of pairs that the fit did not see, `_PARTS` at most."""
        problem = self.problem(changes, delta)
        unit_P, _ = resample.units(len(self.y), self.pairs)
        unit_P = unit_P % (_PARTS if unit_P.max() < 10 * _PARTS else _FEW_PARTS)
        weight = (unit_P[None] != np.arange(unit_P.max() + 1)[:, None]).astype(float)
        begin = np.repeat(theta[None], len(weight), axis=0)
        found = minimise(problem, begin, weight, reweighted=10, newton=60)
        off = problem.form.value(found.theta_BK, self.u_IP) - problem.ln_y_P
        return float(np.sqrt((off[weight == 0] ** 2).mean()))

    def intervals(
        self, changes: tuple[str, ...], theta: Array, delta: float, num: int, seed: int
    ) -> dict[str, Any]:
        """The changes with their bootstrap intervals over pairs, both arms drawn together."""
        values = dict(zip(changes, map(float, theta[CHINCHILLA.size :]), strict=True))
        if not changes or not num:
            return {"values": values, "ci95": {}}
        problem = self.problem(changes, delta)
        none = np.zeros((0, len(theta)))
        ones = np.ones(len(self.y))
        drawn = resample.refit(problem, theta, none, ones, self.pairs, num, seed)
        if len(drawn.theta_BK) < 20:
            return {"values": values, "ci95": {}}
        low, high = np.percentile(drawn.theta_BK[:, CHINCHILLA.size :], [2.5, 97.5], axis=0)
        ends = zip(changes, map(float, low), map(float, high), strict=True)
        return {"values": values, "ci95": {name: (lo, hi) for name, lo, hi in ends}}
