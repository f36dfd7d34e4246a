"""What rows of runs tell about a law's exponents, and what one more row would.

The information of rows about the parameters is the sum of outer products of the law's gradients
over the variance of ln loss (Fisher information; Pukelsheim, Optimal Design of Experiments, 2006);
its inverse is the covariance, up to a factor that no design changes.

The variance of a row is that of seeds; points also lie off the law by what no seed averages out,
so that a point with m seeds has the variance point_sd^2 + seed_sd^2 / m.

Shapes: P rows, K parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from analysis.fit import Fit
from analysis.forms import Array, Form, SumOfPowers

NOMINAL = 0.35
"""Exponent assumed where rows identify none; within the range of published ones for N and D."""
_PRIOR_SD = {True: 0.5, False: 3.0}
"""Of exponents, and of logarithms of scales, where rows leave a parameter open."""
_SMALLEST_SD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Rows of one init and their law, refused or not; (P,) each."""

    init: str
    law: Fit
    form: SumOfPowers
    n: Array
    d: Array
    y: Array


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of ln y about the law: of seeds, and of points beyond their seeds."""

    seed_sd: float
    point_sd: float
    has_seeds: bool
    """False: one seed a point; all scatter is taken for that of seeds."""


def noise_of(arm: Arm) -> Noise:
    """Scatter of rows about the fitted law, split into seeds and points (one-way ANOVA)."""
    residual = np.log(arm.y) - np.log(arm.law.predict({"N": arm.n, "D": arm.d}))
    points = points_of(arm.n, arm.d)
    rows, size = len(residual), arm.form.size
    within = rows - len(points)
    if within < 1:
        sd = math.sqrt(float((residual**2).sum()) / max(1, rows - size))
        return Noise(seed_sd=max(sd, _SMALLEST_SD), point_sd=0.0, has_seeds=False)
    groups = [residual[list(rows_of)] for rows_of in points.values()]
    seeds = sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / within
    between = sum(len(g) * float(g.mean()) ** 2 for g in groups)
    free = len(points) - size
    beyond = 0.0
    if free >= 1:
        beyond = max(0.0, (between / free - seeds) * len(points) / rows)
    return Noise(
        seed_sd=max(math.sqrt(seeds), _SMALLEST_SD), point_sd=math.sqrt(beyond), has_seeds=True
    )


def points_of(n: Array, d: Array) -> dict[tuple[float, float], list[int]]:
    """Rows of every (parameters, images)."""
    found: dict[tuple[float, float], list[int]] = {}
    for i, key in enumerate(zip(map(float, n), map(float, d), strict=True)):
        found.setdefault(key, []).append(i)
    return found


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of an arm's law at some set of rows."""

    form: Form
    theta: Array
    centre: Array
    noise: Noise
    seeds: Mapping[tuple[float, float], int]
    prior: Array
    """Information that is there without rows, (K, K)."""

    @classmethod
    def of(cls, arm: Arm) -> Known:
        """By the arm's fitted law and its rows."""
        assert arm.law.inner is not None and arm.law.centre is not None
        return cls(
            form=arm.form,
            theta=arm.law.inner,
            centre=arm.law.centre,
            noise=noise_of(arm),
            seeds={k: len(v) for k, v in points_of(arm.n, arm.d).items()},
            prior=np.zeros((arm.form.size, arm.form.size)),
        )

    @classmethod
    def nominal(cls, arm: Arm) -> Known:
        """With exponents of NOMINAL and what scales fit best with them, loosely believed."""
        logs = np.log(np.stack([arm.n, arm.d]))
        centre = logs.mean(axis=1)
        starts = arm.form.starts(logs - centre[:, None], arm.y)
        places = [arm.form.names.index(e) for e in arm.form.exponents]
        near = np.abs(starts[:, places] - NOMINAL).sum(axis=1).argmin()
        sds = [_PRIOR_SD[name in arm.form.exponents] for name in arm.form.names]
        return cls(
            form=arm.form,
            theta=starts[near],
            centre=centre,
            noise=Noise(seed_sd=0.01, point_sd=0.0, has_seeds=False),
            seeds={k: len(v) for k, v in points_of(arm.n, arm.d).items()},
            prior=np.diag(1.0 / np.square(sds)),
        )

    def with_row(self, n: float, d: float) -> Known:
        """One more run of that size."""
        key = (float(n), float(d))
        return replace(self, seeds={**self.seeds, key: self.seeds.get(key, 0) + 1})

    def exponent_sds(self) -> Array:
        """Standard deviations of the exponents, in the form's order."""
        sizes = np.array(list(self.seeds)).T
        _, jacobian = self.form.jacobian(self.theta[None], np.log(sizes) - self.centre[:, None])
        num = np.array(list(self.seeds.values()), float)
        variance = self.noise.point_sd**2 + self.noise.seed_sd**2 / num
        information = (jacobian[0] / variance[:, None]).T @ jacobian[0] + self.prior
        # In units in which the diagonal is 1: the parameters' own differ by orders.
        scale = np.sqrt(np.diag(information))
        inverse = np.linalg.inv(information / np.outer(scale, scale)) / np.outer(scale, scale)
        places = [self.form.names.index(e) for e in self.form.exponents]
        return np.sqrt(np.diag(inverse)[places])
