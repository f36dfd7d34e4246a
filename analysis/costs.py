"""What a run of N parameters on D samples costs: exact FLOPs by size, or measured costs by row.

Both make a smooth function of (N, D) for `analysis.frontier`, where 6 N D is too coarse: a masked
autoencoder's decoder, attention and the head do not grow with N as the encoder's products do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from analysis.optimum import Array
from harness.errors import UserError


@dataclass(frozen=True)
class SizesCost:
    """C = f(N) D + g(N): f per sample, g once per run."""

    per_sample: CubicSpline
    per_run: CubicSpline | None
    ends: tuple[float, float]

    def __call__(self, n: Array, d: Array) -> Array:
        """C of n parameters and d samples."""
        log_n = np.log(n)
        once = 0.0 if self.per_run is None else np.exp(self._at(self.per_run, log_n))
        return np.exp(self._at(self.per_sample, log_n)) * d + once

    def _at(self, spline: CubicSpline, log_n: Array) -> Array:
        inside = np.clip(log_n, *self.ends)
        return spline(inside) + spline(inside, 1) * (log_n - inside)


def cost_of_sizes(
    params: Sequence[float] | Array,
    per_sample: Sequence[float] | Array,
    per_run: Sequence[float] | Array | None = None,
) -> SizesCost:
    """Cost from a table of sizes: parameters, FLOPs per sample, and FLOPs that D does not change.

    The last is for a stage of fixed length that is charged to every run, such as the MAE stage.
    Between the sizes natural cubic splines in log-log, beyond them straight lines, which keeps
    first and second derivatives whole. Raises UserError for fewer than two sizes, repeated ones,
    or values without a logarithm.
    """
    n = np.asarray(params, dtype=float)
    columns = {"FLOPs per sample": np.asarray(per_sample, dtype=float)}
    if per_run is not None:
        columns["FLOPs per run"] = np.asarray(per_run, dtype=float)
    for name, values in {"parameters": n, **columns}.items():
        if len(values) != len(n) or not (np.isfinite(values) & (values > 0)).all():
            raise UserError(f"{name} {values.tolist()}: expected a positive number for each size")
    order = np.argsort(n)
    if len(n) < 2 or (np.diff(n[order]) <= 0).any():
        raise UserError(f"sizes {n.tolist()}: expected at least two, each once")
    log_n = np.log(n[order])
    splines = [
        CubicSpline(log_n, np.log(values[order]), bc_type="natural") for values in columns.values()
    ]
    return SizesCost(splines[0], splines[1] if len(splines) > 1 else None, (log_n[0], log_n[-1]))


@dataclass(frozen=True)
class RowsCost:
    """ln C as a polynomial in ln N, linear in ln D, about the mean of the rows."""

    coefficients: Array
    centre: tuple[float, float]
    rms: float
    """Root mean square of the rows' ln C around it."""

    def __call__(self, n: Array, d: Array) -> Array:
        """C of n parameters and d samples."""
        x, y = np.log(n) - self.centre[0], np.log(d) - self.centre[1]
        offset, slope, of_d, *bend = self.coefficients
        return np.exp(offset + slope * x + of_d * y + (bend[0] * x**2 if bend else 0.0))


def cost_of_rows(n: Array, d: Array, cost: Array) -> RowsCost | str:
    """Cost from rows that measured it, GPU-hours for example; in words why not, if so.

    Least squares of ln C on 1, ln N, ln D, and (ln N)^2 where there are four sizes.
    """
    good = np.isfinite(cost) & (cost > 0)
    x, y, z = (np.log(np.asarray(v, dtype=float)[good]) for v in (n, d, cost))
    sizes, lengths = len(np.unique(x)), len(np.unique(y))
    if sizes < 3 or lengths < 2 or len(z) < 5:
        return f"{len(z)} rows, {sizes} N and {lengths} D with a cost; at least 5, 3 and 2 needed"
    centre = (float(x.mean()), float(y.mean()))
    x, y = x - centre[0], y - centre[1]
    design = np.stack([np.ones_like(x), x, y, *([x**2] if sizes >= 4 else [])], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(design, z, rcond=None)
    if rank < design.shape[1]:
        return "N and D vary together in the rows: what each costs cannot be told apart"
    rms = float(np.sqrt(np.mean((z - design @ coefficients) ** 2)))
    return RowsCost(coefficients.astype(float), centre, rms)
