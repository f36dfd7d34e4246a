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

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from analysis.forms import Array, Form

_CHUNK_NUMBERS = 150_000
"""Jacobian entries, or rows, worked on at once: a dozen arrays so large fit a core's cache."""
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
    # In one of several processes (`analysis.beside`) the other cores have work of their own.
    if len(pieces) == 1 or cores == 1 or multiprocessing.current_process().daemon:
        return [run(piece) for piece in pieces]
    with ThreadPoolExecutor(min(cores, len(pieces))) as pool:
        return list(pool.map(run, pieces))


@dataclass(frozen=True, kw_only=True)
class _Local:
    """A point with the value and the derivatives there, each by problem."""

    theta_BK: Array
    value_B: Array
    gradient_BK: Array
    held_BK: Array
    """Parameters at a limit that want to go further: they are held there, their gradient is 0."""
    matrix_BKK: Array
    """Of a reweighted step or, where that was wanted, of a Newton step."""
    scale_BK: Array
    """Square root of the diagonal that a reweighted step has."""

    def of(self, chosen: Array) -> _Local:
        """The same of some of the problems."""
        return _Local(**{name: part[chosen] for name, part in self.__dict__.items()})

    def put(self, places: Array, other: _Local, chosen: Array) -> None:
        """Takes over some of another's problems."""
        for name, part in self.__dict__.items():
            part[places] = getattr(other, name)[chosen]


def _local(
    rows: _Rows,
    theta: Array,
    weight: Array,
    limits: tuple[Array, Array],
    want_newton: bool,
) -> _Local:
    form, delta = rows.form, rows.delta
    value, jacobian = form.jacobian(theta, rows.u_IG)
    # All that is as long as the rows, in as few passes over them as may be.
    residual = rows.of_rows(value) - rows.ln_y_P
    size = np.abs(residual)
    inside = np.minimum(size, delta)
    within = rows.by_point(np.where(size <= delta, weight, 0.0)) if want_newton else None
    weighted = weight * inside
    psi = rows.by_point(np.copysign(weighted, residual))
    weighted *= size - 0.5 * inside
    total = weighted.sum(axis=1)
    np.divide(delta, np.maximum(size, 1e-300, out=size), out=size)
    pull = rows.by_point(np.multiply(np.minimum(size, 1.0, out=size), weight, out=size))
    gradient = np.matmul(psi[:, None, :], jacobian)[:, 0]
    held = ((theta <= limits[0]) & (gradient > 0)) | ((theta >= limits[1]) & (gradient < 0))
    if within is None:
        matrix = _gram(jacobian, pull)
        diagonal = np.einsum("bkk->bk", matrix)
    else:
        matrix = _gram(jacobian, within)
        matrix += form.curvature(theta, rows.u_IG, jacobian, psi)
        diagonal = np.matmul(pull[:, None, :], jacobian**2)[:, 0]
    return _Local(
        theta_BK=theta,
        value_B=total,
        gradient_BK=np.where(held, 0.0, gradient),
        held_BK=held,
        matrix_BKK=matrix,
        scale_BK=np.sqrt(diagonal + 1e-10 * diagonal.max(axis=1, keepdims=True) + 1e-300),
    )


def _gram(jacobian_BPK: Array, weight_BP: Array) -> Array:
    weighted = weight_BP[:, :, None] * jacobian_BPK
    return np.matmul(weighted.transpose(0, 2, 1), jacobian_BPK)


def _step(local: _Local, damping_B: Array) -> Array:
    """The damped step, in units in which the scale is 1; nothing moves that is held."""
    matrix = local.matrix_BKK / (local.scale_BK[:, :, None] * local.scale_BK[:, None, :])
    matrix[local.held_BK[:, :, None] | local.held_BK[:, None, :]] = 0.0
    ends = np.arange(matrix.shape[1])
    matrix[:, ends, ends] += np.where(local.held_BK, 1.0, damping_B[:, None])
    along = (local.gradient_BK / local.scale_BK)[:, :, None]
    return _solve(matrix, along)[:, :, 0] / local.scale_BK


def _minimise(
    rows: _Rows, start: Array, weight: Array, reweighted: int, newton: int
) -> tuple[Array, ...]:
    limits = rows.limits()
    theta = np.clip(start, *limits)
    for steps, is_newton in ((reweighted, False), (newton, True)):
        theta = _descend(rows, theta, weight, limits, steps, is_newton)
    local = _local(rows, theta, weight, limits, want_newton=False)
    step = _step(local, np.full(len(theta), 1e-12))
    decrement = 0.5 * (local.gradient_BK * step).sum(axis=1)
    gradient = np.linalg.norm(local.gradient_BK, axis=1)
    return theta, local.value_B, gradient, np.abs(decrement)


def _descend(
    rows: _Rows,
    theta: Array,
    weight: Array,
    limits: tuple[Array, Array],
    steps: int,
    is_newton: bool,
) -> Array:
    if not steps:
        return theta
    found = theta.copy()
    damping = np.full(len(theta), 1e-3)
    quiet = np.zeros(len(theta), int)
    active = np.arange(len(theta))
    # Newton's steps finish what reweighted ones begin; those crawl long before the end.
    enough = 1e-10 if is_newton else 1e-3
    at = _local(rows, found.copy(), weight, limits, is_newton)
    for _ in range(steps):
        step = _step(at, damping)
        expected = (at.gradient_BK * step).sum(axis=1)
        trial = _local(rows, np.clip(at.theta_BK - step, *limits), weight, limits, is_newton)
        better = trial.value_B < at.value_B
        fall = np.where(better, at.value_B - trial.value_B, 0.0)
        if better.all():
            at = trial
        else:
            at.put(better, trial, better)
        damping = np.clip(damping * np.where(better, 0.2, 6.0), 1e-14, 1e10)
        quiet = np.where(fall <= 1e-12 * at.value_B, quiet + 1, 0)
        # Nearly undamped, a step says itself what is left.
        over = (np.abs(expected) <= enough * at.value_B) & (damping < 1e-2)
        going = (quiet < _QUIET) & ~over & (at.value_B > 1e-32)
        if not going.all():
            found[active[~going]] = at.theta_BK[~going]
            active, damping, quiet = active[going], damping[going], quiet[going]
            if not len(active):
                return found
            at, weight = at.of(going), weight[going]
    found[active] = at.theta_BK
    return found


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
    local = _local(rows, theta_K[None], weight_P[None], rows.limits(), want_newton=False)
    diagonal = np.sqrt(np.einsum("bkk->bk", local.matrix_BKK)[0])
    if not (diagonal > 0).all():
        return float("inf")
    return float(np.linalg.cond(local.matrix_BKK[0] / np.outer(diagonal, diagonal)))
