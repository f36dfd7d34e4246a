"""The laws that can be fitted, in coordinates in which they are easy to fit.

A form maps centred logarithms of its inputs to ln y. Inside, scales are logarithms, so that every
term stays positive (Hoffmann et al. 2022, arXiv 2203.15556, sec. 3.3); `natural` turns inner
coordinates into the parameters of the printed formula.

Shapes: B problems (starts, bootstrap draws), P rows, K parameters, I inputs, T terms.
theta_BK inner coordinates; u_IP = ln input - centre of that input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[Any]
"""Of float64, or of bool where it is a mask."""

EXPONENTS = (1e-3, 5.0)
"""Range of the search for exponents. No published exponent of a loss or an error is outside."""
NEGLIGIBLE = 1e-4
"""A term below this share of the smallest y, everywhere, has left no trace in the data."""
_START_EXPONENTS = (0.05, 0.12, 0.22, 0.35, 0.5, 0.75, 1.1, 1.8)


def sigmoid(t: Array) -> Array:
    """1 / (1 + exp(-t)) without overflow."""
    return special.expit(t)


def softplus(t: Array) -> Array:
    """ln(1 + exp(t)) without overflow."""
    return np.logaddexp(0.0, t)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A law. Subclasses say how ln y and its derivatives come about."""

    name: str
    formula: str
    names: tuple[str, ...]
    """Parameters of the formula, in the order of `natural`."""
    inputs: tuple[str, ...]
    meaning: str
    source: str
    exponents: tuple[str, ...]
    """Those of `names` that are searched within EXPONENTS."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self.names)

    @property
    def needs_distinct(self) -> int:
        """Distinct values each input must have. One axis must tell all parameters apart."""
        return max(3, self.size) if len(self.inputs) == 1 else 3

    def kinds(self, num: int) -> Array:
        """What sets `num` rows apart beside their inputs, a line for each such thing."""
        return np.zeros((0, num))

    def of_rows(self, chosen: Array) -> Form:
        """The form for these rows alone."""
        return self

    def value(self, theta_BK: Array, u_IP: Array) -> Array:
        """ln y, (B, P)."""
        raise NotImplementedError

    def jacobian(self, theta_BK: Array, u_IP: Array) -> tuple[Array, Array]:
        """ln y (B, P) and its derivatives (B, P, K)."""
        raise NotImplementedError

    def curvature(self, theta_BK: Array, u_IP: Array, jacobian_BPK: Array, psi_BP: Array) -> Array:
        """Sum over rows of psi times the second derivatives of ln y, (B, K, K)."""
        num, size = theta_BK.shape
        step_BK = 1e-5 * np.maximum(1.0, np.abs(theta_BK))
        moved_KBK = step_BK * np.eye(size)[:, None]
        # Both ways along every parameter in one call: points are few, calls of numpy are not free.
        tried = np.concatenate([theta_BK + moved_KBK, theta_BK - moved_KBK]).reshape(-1, size)
        slopes = self.jacobian(tried, u_IP)[1].reshape(2, size, num, -1, size)
        out = np.matmul(psi_BP[:, None], slopes[0] - slopes[1])[:, :, 0].transpose(1, 0, 2)
        out = out / (2 * step_BK[:, :, None])
        return 0.5 * (out + out.transpose(0, 2, 1))

    def limits(self, u_IP: Array, ln_y_P: Array) -> tuple[Array, Array]:
        """Smallest and largest inner coordinates of the search, (K,) each."""
        raise NotImplementedError

    def starts(self, u_IP: Array, y_P: Array) -> Array:
        """Inner coordinates to start from, (B, K)."""
        raise NotImplementedError

    def natural(self, theta_BK: Array, centre_I: Array) -> Array:
        """The formula's parameters, (B, K)."""
        raise NotImplementedError

    def edges(self, theta_K: Array, u_IP: Array, ln_y_P: Array) -> list[str]:
        """What the data push to a limit, in words: numbers that mean nothing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SumOfPowers(Form):
    """y = sum over terms of exp(scale_t - exponent_t * u of its input); E has no exponent.

    `terms` names (scale, input, exponent) by place; input and exponent are None for a constant.
    Inner coordinates: all scales' logarithms, then the exponents.
    """

    terms: tuple[tuple[int, int | None, int | None], ...]

    def _logs(self, theta_BK: Array, u_IP: Array) -> list[Array]:
        """ln of every term, (B, P) each."""
        out = []
        for scale, place, exponent in self.terms:
            line = np.broadcast_to(theta_BK[:, scale, None], (len(theta_BK), u_IP.shape[1]))
            if place is not None and exponent is not None:
                line = line - theta_BK[:, exponent, None] * u_IP[place]
            out.append(line)
        return out

    def value(self, theta_BK: Array, u_IP: Array) -> Array:
        """ln y, (B, P)."""
        logs = self._logs(theta_BK, u_IP)
        if len(logs) == 1:
            return logs[0]
        top = np.maximum.reduce(logs)
        return top + np.log(sum(np.exp(line - top) for line in logs))

    def jacobian(self, theta_BK: Array, u_IP: Array) -> tuple[Array, Array]:
        """ln y (B, P) and its derivatives (B, P, K): the share of a term, times -u."""
        logs = self._logs(theta_BK, u_IP)
        top = np.maximum.reduce(logs)
        shares = [np.exp(line - top) for line in logs]
        total = np.add.reduce(shares)
        out = np.zeros((*total.shape, self.size))
        for (scale, place, exponent), share in zip(self.terms, shares, strict=True):
            share /= total
            out[:, :, scale] = share
            if place is not None and exponent is not None:
                out[:, :, exponent] -= u_IP[place] * share
        return top + np.log(total), out

    def curvature(self, theta_BK: Array, u_IP: Array, jacobian_BPK: Array, psi_BP: Array) -> Array:
        """Closed form: ln y is a log-sum-exp of lines in theta."""
        weighted = psi_BP[:, :, None] * jacobian_BPK
        out = -np.matmul(weighted.transpose(0, 2, 1), jacobian_BPK)
        for scale, place, exponent in self.terms:
            share = weighted[:, :, scale]
            out[:, scale, scale] += share.sum(axis=1)
            if place is not None and exponent is not None:
                cross = -(share @ u_IP[place])
                out[:, scale, exponent] += cross
                out[:, exponent, scale] += cross
                out[:, exponent, exponent] += share @ u_IP[place] ** 2
        return out

    def _is_exponent(self) -> Array:
        return np.array([name in self.exponents for name in self.names])

    def limits(self, u_IP: Array, ln_y_P: Array) -> tuple[Array, Array]:
        """Scales from far below the smallest y to far above what a term can need."""
        reach = EXPONENTS[1] * float(np.abs(u_IP).max())
        moving = {scale for scale, place, _ in self.terms if place is not None}
        low = np.full(self.size, ln_y_P.min() - 14.0)
        high = np.full(self.size, ln_y_P.max() + 2.0)
        for k in moving:
            low[k] -= reach
            high[k] += reach
        is_exponent = self._is_exponent()
        low[is_exponent], high[is_exponent] = EXPONENTS
        return low, high

    def starts(self, u_IP: Array, y_P: Array) -> Array:
        """Variable projection: for a grid of exponents, scales by non-negative least squares.

        y is linear in the scales once exponents are fixed; residuals are relative, as the fit's.
        """
        places = [k for k, is_exponent in enumerate(self._is_exponent()) if is_exponent]
        grids = np.meshgrid(*[np.array(_START_EXPONENTS)] * len(places), indexing="ij")
        rows = []
        for values in np.stack([g.ravel() for g in grids], axis=1):
            theta = np.zeros((1, self.size))
            theta[0, places] = values
            columns = np.stack([np.exp(line[0]) for line in self._logs(theta, u_IP)], axis=1)
            scales = _non_negative(columns / y_P[:, None])
            order = [scale for scale, _, _ in self.terms]
            theta[0, order] = np.log(np.maximum(scales, 1e-4 * y_P.min()))
            rows.append(theta[0])
        return np.array(rows)

    def natural(self, theta_BK: Array, centre_I: Array) -> Array:
        """Scales for the inputs themselves, in the formula's order."""
        out = theta_BK.copy()
        for scale, place, exponent in self.terms:
            line = theta_BK[:, scale]
            if place is not None and exponent is not None:
                line = line + theta_BK[:, exponent] * centre_I[place]
            out[:, scale] = np.exp(line)
        return out

    def edges(self, theta_K: Array, u_IP: Array, ln_y_P: Array) -> list[str]:
        """Terms that left no trace, exponents at a limit."""
        smallest = float(ln_y_P.min())
        found = []
        for (scale, place, exponent), line in zip(
            self.terms, self._logs(theta_K[None], u_IP), strict=True
        ):
            is_gone = float(line.max()) < smallest + np.log(NEGLIGIBLE)
            if is_gone and place is None:
                found.append(
                    f"{self.names[scale]} at 0: no sign of an irreducible term in this range"
                )
            elif is_gone:
                found.append(f"{self.names[scale]} at 0: y does not fall with {self.inputs[place]}")  # type: ignore[index]
            elif place is not None and exponent is not None:
                found += exponent_edges(self.names[exponent], float(theta_K[exponent]))
        return list(dict.fromkeys(found))


def exponent_edges(name: str, value: float) -> list[str]:
    """Whether an exponent is at a limit of the search, in words."""
    if value <= EXPONENTS[0] * 1.01:
        return [f"{name} at its lower limit: y does not fall like a power"]
    if value >= EXPONENTS[1] * 0.99:
        return [f"{name} at its upper limit: y has levelled off after the smallest values"]
    return []


def _non_negative(columns_PT: Array) -> Array:
    """Non-negative least squares against ones, by trying every set of columns (T is at most 3)."""
    num = columns_PT.shape[1]
    best, found = np.inf, np.zeros(num)
    for bits in range(1, 1 << num):
        chosen = [t for t in range(num) if bits >> t & 1]
        part = columns_PT[:, chosen]
        solved, *_ = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)
        if (solved < 0).any():
            continue
        loss = float(((part @ solved - 1.0) ** 2).sum())
        if loss < best:
            best, found = loss, np.zeros(num)
            found[chosen] = solved
    return found


# -- one axis -------------------------------------------------------------------------------

POWER = SumOfPowers(
    name="power",
    formula="y = a * x**-b",
    names=("a", "b"),
    inputs=("x",),
    meaning="a scale, b exponent",
    source="straight line in log-log; M1 of Alabdulmohsin et al. 2022, arXiv 2209.06640",
    exponents=("b",),
    terms=((0, 0, 1),),
)
POWER_IRREDUCIBLE = SumOfPowers(
    name="power_irreducible",
    formula="y = a * x**-b + c",
    names=("a", "b", "c"),
    inputs=("x",),
    meaning="a scale, b exponent, c irreducible",
    source="M2 of Alabdulmohsin et al. 2022, arXiv 2209.06640",
    exponents=("b",),
    terms=((0, 0, 1), (2, None, None)),
)

# -- two axes -------------------------------------------------------------------------------

CHINCHILLA = SumOfPowers(
    name="chinchilla",
    formula="L = E + A / N**alpha + B / D**beta",
    names=("E", "A", "B", "alpha", "beta"),
    inputs=("N", "D"),
    meaning="E irreducible, A and alpha of model size, B and beta of data",
    source="approach 3 of Hoffmann et al. 2022, arXiv 2203.15556, eq. 2",
    exponents=("alpha", "beta"),
    terms=((0, None, None), (1, 0, 3), (2, 1, 4)),
)
TIED = SumOfPowers(
    name="tied",
    formula="L = E + A / N**alpha + B / D**alpha",
    names=("E", "A", "B", "alpha"),
    inputs=("N", "D"),
    meaning="as chinchilla, with one exponent for both axes",
    source="chinchilla with beta = alpha: then N and D of the optimum grow alike",
    exponents=("alpha",),
    terms=((0, None, None), (1, 0, 3), (2, 1, 3)),
)
