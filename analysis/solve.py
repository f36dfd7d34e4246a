"""Minimises the summed Huber loss of log residuals, for many starts or bootstrap draws at once.

Two kinds of steps, both Levenberg-Marquardt inside the form's limits. *Reweighted* steps use the
Huber weights as a majorizer: they never fail, and crawl where most residuals are beyond delta.
*Newton* steps use the true second derivatives (rows within delta, and the curvature of the law
under the others): they are exact near the optimum. Hoffmann et al. 2022 (arXiv 2203.15556) used
L-BFGS; that it stops early is how their own numbers came to be off (Besiroglu et al. 2024, arXiv
2404.10102), so convergence is measured here and not assumed.

Where rows share their inputs (seeds of a grid point), the law is computed once for each point.

Shapes: B problems, P rows, G points (distinct inputs), K parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from analysis.forms import Array, Form

_CHUNK_NUMBERS = 400_000
"""Jacobian entries worked on at once: a few MB, which a core's cache holds."""
_QUIET = 6
"""Steps without a gain before a problem counts as settled."""
_WORTH_SORTING = 150
"""Rows from which the law is computed by point: below, there is nothing to save."""
_MANY_ROWS = 1000
"""Rows from which starts are found on a mean row of each point."""
_PROMISING = 4
"""Optima that it hands on."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What all problems share: the law, its inputs, the observations."""

    form: Form
    u_IP: Array
    """ln input - its centre."""
    ln_y_P: Array
    delta: float


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A point per problem, with the evidence that it is a minimum."""

    theta_BK: Array
    objective_B: Array
    gradient_B: Array
    """Norm of the gradient, without what pushes against a limit."""
    decrement_B: Array
    """By how much one more step of full length is expected to lower the objective."""

    def is_converged(self, delta: float) -> Array:
        """Whether nothing worth having is left: 1e-8 of the objective, or of the smallest one
        that rounding leaves.
        """
        return self.decrement_B <= 1e-8 * self.objective_B + 1e-14 * delta**2 + 1e-22


def huber(residual: Array, delta: float) -> Array:
    """Half the square within delta, a line beyond."""
    size = np.abs(residual)
    inside = np.minimum(size, delta)
    return inside * (size - 0.5 * inside)


def objective(problem: Problem, theta_BK: Array, weight_BP: Array) -> Array:
    """The sum that is minimised, (B,)."""
    return _Rows.plain(problem).objective(theta_BK, weight_BP)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A problem whose rows are sorted by point, or left as they are: then each is its own point."""

    form: Form
    """For the points."""
    u_IG: Array
    ln_y_P: Array
    delta: float
    first_G: Array | None = None
    """The first row of each point."""
    counts_G: Array | None = None

    @classmethod
    def plain(cls, problem: Problem) -> _Rows:
        return cls(form=problem.form, u_IG=problem.u_IP, ln_y_P=problem.ln_y_P, delta=problem.delta)

    @classmethod
    def sorted(cls, problem: Problem) -> tuple[_Rows, Array | slice]:
        """With the order of the rows."""
        num = len(problem.ln_y_P)
        if num < _WORTH_SORTING:
            return cls.plain(problem), slice(None)
        kinds = np.concatenate([problem.u_IP, problem.form.kinds(num)])
        order = np.lexsort(kinds)
        is_new = np.any(np.diff(kinds[:, order], axis=1) != 0, axis=0)
        first = np.concatenate([[0], 1 + np.flatnonzero(is_new)])
        if 2 * len(first) > num:
            return cls.plain(problem), slice(None)
        found = cls(
            form=problem.form.of_rows(order[first]),
            u_IG=problem.u_IP[:, order[first]],
            ln_y_P=problem.ln_y_P[order],
            delta=problem.delta,
            first_G=first,
            counts_G=np.diff(first, append=num),
        )
        return found, order

    def of_rows(self, value_BG: Array) -> Array:
        """Values of points for their rows."""
        return value_BG if self.counts_G is None else np.repeat(value_BG, self.counts_G, axis=1)

    def by_point(self, value_BP: Array) -> Array:
        """Sums over the rows of each point."""
        return value_BP if self.first_G is None else np.add.reduceat(value_BP, self.first_G, axis=1)

    def residual(self, theta_BK: Array) -> Array:
        """Fitted minus observed, (B, P)."""
        return self.of_rows(self.form.value(theta_BK, self.u_IG)) - self.ln_y_P

    def objective(self, theta_BK: Array, weight_BP: Array) -> Array:
        """The sum that is minimised, (B,)."""
        return (weight_BP * huber(self.residual(theta_BK), self.delta)).sum(axis=1)

    def limits(self) -> tuple[Array, Array]:
        """Of the form, for these rows."""
        return self.form.limits(self.u_IG, self.ln_y_P)


def minimise(
    problem: Problem, theta_BK: Array, weight_BP: Array, *, reweighted: int, newton: int
) -> Solved:
    """Improves every start by so many steps of each kind; fewer where it settles before.

    weight_BP has one row for all problems, or one each.
    """
    rows, order = _Rows.sorted(problem)
    numbers = max(rows.u_IG.shape[1] * problem.form.size, len(rows.ln_y_P))
    size = max(1, _CHUNK_NUMBERS // numbers)
    pieces = [slice(i, i + size) for i in range(0, len(theta_BK), size)]
    weight_BP = np.broadcast_to(weight_BP[:, order], (len(theta_BK), len(rows.ln_y_P)))

    def run(piece: slice) -> tuple[Array, ...]:
        return _minimise(rows, theta_BK[piece], weight_BP[piece], reweighted, newton)

    found = _on_cores(run, pieces)
    theta, value, gradient, decrement = (np.concatenate(part) for part in zip(*found, strict=True))
    return Solved(theta_BK=theta, objective_B=value, gradient_B=gradient, decrement_B=decrement)


def starts(problem: Problem, y_P: Array) -> Array:
    """Where to begin: the form's own starts, for a mean row of each point where rows are many."""
    short, _ = _means(problem)
    y_P = y_P if short is problem else np.exp(short.ln_y_P)
    return short.form.starts(short.u_IP, y_P)


def promising(problem: Problem, y_P: Array) -> Array:
    """A few distinct optima to start from, found on mean rows; all starts where rows are few."""
    begin = starts(problem, y_P)
    short, weight = _means(problem)
    if short is problem:
        return begin
    found = minimise(short, begin, weight[None], reweighted=40, newton=100)
    order = np.argsort(found.objective_B, kind="stable")
    values = found.objective_B[order]
    is_other = np.concatenate([[True], values[1:] > values[:-1] * (1 + 1e-4)])
    return found.theta_BK[order[is_other][:_PROMISING]]


def _means(problem: Problem) -> tuple[Problem, Array]:
    """A row for each point, with the number of its rows; the problem itself where rows are few."""
    rows, _ = _Rows.sorted(problem)
    if rows.counts_G is None or len(rows.ln_y_P) < _MANY_ROWS:
        return problem, np.ones(len(problem.ln_y_P))
    means = rows.by_point(rows.ln_y_P[None])[0] / rows.counts_G
    short = Problem(form=rows.form, u_IP=rows.u_IG, ln_y_P=means, delta=problem.delta)
    return short, rows.counts_G.astype(float)


def _on_cores(
    run: Callable[[slice], tuple[Array, ...]], pieces: list[slice]
) -> list[tuple[Array, ...]]:
    """numpy lets go of the interpreter inside its loops, so threads are enough."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if len(pieces) == 1 or cores == 1:
        return [run(piece) for piece in pieces]
    with ThreadPoolExecutor(min(cores, len(pieces))) as pool:
        return list(pool.map(run, pieces))


@dataclass(frozen=True, kw_only=True)
class _Local:
    """Derivatives at a point, on what is free to move."""

    gradient_BK: Array
    majorizer_BKK: Array
    newton_BKK: Array | None
    held_BK: Array


def _local(
    rows: _Rows,
    theta: Array,
    weight: Array,
    limits: tuple[Array, Array],
    want_newton: bool,
) -> tuple[Array, _Local]:
    form, delta = rows.form, rows.delta
    value, jacobian = form.jacobian(theta, rows.u_IG)
    residual = rows.of_rows(value) - rows.ln_y_P
    psi = rows.by_point(weight * np.clip(residual, -delta, delta))
    gradient = np.matmul(psi[:, None, :], jacobian)[:, 0]
    # A parameter at its limit that wants to go further is held there.
    held = ((theta <= limits[0]) & (gradient > 0)) | ((theta >= limits[1]) & (gradient < 0))
    size = np.maximum(np.abs(residual), 1e-300)
    majorizer = _gram(jacobian, rows.by_point(weight * np.minimum(1.0, delta / size)))
    newton = None
    if want_newton:
        newton = _gram(jacobian, rows.by_point(weight * (np.abs(residual) <= delta)))
        newton += form.curvature(theta, rows.u_IG, jacobian, psi)
    return (weight * huber(residual, delta)).sum(axis=1), _Local(
        gradient_BK=np.where(held, 0.0, gradient),
        majorizer_BKK=majorizer,
        newton_BKK=newton,
        held_BK=held,
    )


def _gram(jacobian_BPK: Array, weight_BP: Array) -> Array:
    weighted = weight_BP[:, :, None] * jacobian_BPK
    return np.matmul(weighted.transpose(0, 2, 1), jacobian_BPK)


def _scaled(matrix_BKK: Array, scale_BK: Array, held_BK: Array, damping_B: Array) -> Array:
    """The matrix in units in which the majorizer's diagonal is 1, damped, held rows inert."""
    out = matrix_BKK / (scale_BK[:, :, None] * scale_BK[:, None, :])
    out[held_BK[:, :, None] | held_BK[:, None, :]] = 0.0
    ends = np.arange(out.shape[1])
    out[:, ends, ends] += np.where(held_BK, 1.0, damping_B[:, None])
    return out


def _scale(local: _Local) -> Array:
    diagonal = np.einsum("bkk->bk", local.majorizer_BKK)
    return np.sqrt(diagonal + 1e-10 * diagonal.max(axis=1, keepdims=True) + 1e-300)


def _minimise(
    rows: _Rows, start: Array, weight: Array, reweighted: int, newton: int
) -> tuple[Array, ...]:
    limits = rows.limits()
    theta = np.clip(start, *limits)
    value = rows.objective(theta, weight)
    for steps, is_newton in ((reweighted, False), (newton, True)):
        theta, value = _descend(rows, theta, value, weight, limits, steps, is_newton)
    value, local = _local(rows, theta, weight, limits, want_newton=False)
    scale = _scale(local)
    system = _scaled(local.majorizer_BKK, scale, local.held_BK, np.full(len(theta), 1e-12))
    along = local.gradient_BK / scale
    decrement = 0.5 * (along * np.linalg.solve(system, along[:, :, None])[:, :, 0]).sum(axis=1)
    return theta, value, np.linalg.norm(local.gradient_BK, axis=1), np.abs(decrement)


def _descend(
    rows: _Rows,
    theta: Array,
    value: Array,
    weight: Array,
    limits: tuple[Array, Array],
    steps: int,
    is_newton: bool,
) -> tuple[Array, Array]:
    theta, value = theta.copy(), value.copy()
    damping = np.full(len(theta), 1e-3)
    quiet = np.zeros(len(theta), int)
    active = np.arange(len(theta))
    # Newton's steps finish what reweighted ones begin; those crawl long before the end.
    enough = 1e-10 if is_newton else 1e-3
    for _ in range(steps):
        t, w = theta[active], weight[active]
        _, local = _local(rows, t, w, limits, is_newton)
        scale = _scale(local)
        matrix = local.newton_BKK if local.newton_BKK is not None else local.majorizer_BKK
        system = _scaled(matrix, scale, local.held_BK, damping[active])
        along = (local.gradient_BK / scale)[:, :, None]
        step = _solve(system, along)[:, :, 0] / scale
        expected = (local.gradient_BK * step).sum(axis=1)
        trial = np.clip(t - step, *limits)
        trial_value = rows.objective(trial, w)
        better = trial_value < value[active]
        fall = np.where(better, value[active] - trial_value, 0.0)
        took = active[better]
        theta[took], value[took] = trial[better], trial_value[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.2, 6.0), 1e-14, 1e10)
        small = fall <= 1e-12 * value[active]
        quiet[active] = np.where(small, quiet[active] + 1, 0)
        # Nearly undamped, a step says itself what is left.
        over = (np.abs(expected) <= enough * value[active]) & (damping[active] < 1e-2)
        active = active[(quiet[active] < _QUIET) & ~over & (value[active] > 1e-32)]
        if not len(active):
            break
    return theta, value


def _solve(system: Array, along: Array) -> Array:
    """Solves what can be solved; an indefinite system's step is refused by the caller's test."""
    try:
        return np.linalg.solve(system, along)
    except np.linalg.LinAlgError:
        return np.linalg.solve(system + 1e-8 * np.eye(system.shape[1]), along)


def condition_number(problem: Problem, theta_K: Array, weight_P: Array) -> float:
    """Of the majorizer in units in which its diagonal is 1: how alike the parameters look.

    Large means that some combination of parameters changes nothing that was observed.
    """
    rows = _Rows.plain(problem)
    _, local = _local(rows, theta_K[None], weight_P[None], rows.limits(), want_newton=False)
    diagonal = np.sqrt(np.einsum("bkk->bk", local.majorizer_BKK)[0])
    if not (diagonal > 0).all():
        return float("inf")
    return float(np.linalg.cond(local.majorizer_BKK[0] / np.outer(diagonal, diagonal)))
