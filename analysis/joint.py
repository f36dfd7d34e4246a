"""One law over two kinds of rows, some of its parameters different for the marked ones.

Used to ask which parameter an initialization changes (`analysis.which_parameter`) and whether rows
of unfinished schedules lie off the law of the finished ones (`analysis.schedules`).

Shapes: B problems, P rows, K parameters of the base law, C changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from analysis.forms import Array, SumOfPowers

FACTOR = "factor"
"""A change of y itself: marked rows are a constant factor off."""


@dataclass(frozen=True, kw_only=True)
class Joint(SumOfPowers):
    """`base` for unmarked rows; for marked ones, with `changes` added to parameters.

    A change of a scale (E, A, B) is the logarithm of its ratio, marked over unmarked; of an
    exponent, the difference, the scale of the printed formula held (not that of the centred
    coordinates: then what "only alpha changes" means would depend on the rows). Inner coordinates:
    those of `base`, then the changes.
    """

    base: SumOfPowers
    changes: tuple[str, ...]
    marked_P: Array = field(repr=False)
    """1 for marked rows, 0 for the others."""
    directions_CK: Array = field(repr=False)

    def kinds(self, num: int) -> Array:
        """Marked or not."""
        return self.marked_P[None]

    def of_rows(self, chosen: Array) -> Joint:
        """With the marks of these rows."""
        return replace(self, marked_P=self.marked_P[chosen])

    def _split(self, theta_BK: Array) -> tuple[Array, Array, Array]:
        plain = theta_BK[:, : self.base.size]
        change = theta_BK[:, self.base.size :]
        factor = np.zeros(len(theta_BK))
        if FACTOR in self.changes:
            factor = change[:, self.changes.index(FACTOR)]
        return plain, plain + change @ self.directions_CK, factor

    def value(self, theta_BK: Array, u_IP: Array) -> Array:
        """ln y, (B, P)."""
        plain, moved, factor = self._split(theta_BK)
        marked = self.marked_P > 0
        out = np.empty((len(theta_BK), len(marked)))
        out[:, ~marked] = self.base.value(plain, u_IP[:, ~marked])
        out[:, marked] = self.base.value(moved, u_IP[:, marked]) + factor[:, None]
        return out

    def jacobian(self, theta_BK: Array, u_IP: Array) -> tuple[Array, Array]:
        """ln y (B, P) and its derivatives (B, P, K + C)."""
        plain, moved, factor = self._split(theta_BK)
        marked, size = self.marked_P > 0, self.base.size
        value = np.empty((len(theta_BK), len(marked)))
        out = np.zeros((*value.shape, self.size))
        value[:, ~marked], out[:, ~marked, :size] = self.base.jacobian(plain, u_IP[:, ~marked])
        there, slopes = self.base.jacobian(moved, u_IP[:, marked])
        value[:, marked] = there + factor[:, None]
        out[:, marked, :size] = slopes
        out[:, marked, size:] = slopes @ self.directions_CK.T
        if FACTOR in self.changes:
            out[:, marked, size + self.changes.index(FACTOR)] = 1.0
        return value, out

    def curvature(self, theta_BK: Array, u_IP: Array, jacobian_BPK: Array, psi_BP: Array) -> Array:
        """That of the base on both kinds of rows, along the directions of the changes."""
        plain, moved, _ = self._split(theta_BK)
        marked, size = self.marked_P > 0, self.base.size
        here = jacobian_BPK[:, ~marked, :size]
        out = np.zeros((len(theta_BK), self.size, self.size))
        out[:, :size, :size] = self.base.curvature(
            plain, u_IP[:, ~marked], here, psi_BP[:, ~marked]
        )
        there = self.base.curvature(
            moved, u_IP[:, marked], jacobian_BPK[:, marked, :size], psi_BP[:, marked]
        )
        along = np.concatenate([np.eye(size), self.directions_CK.reshape(-1, size)])
        return out + along @ there @ along.T

    def limits(self, u_IP: Array, ln_y_P: Array) -> tuple[Array, Array]:
        """Changes may turn a term into nothing or into everything, no more."""
        low, high = self.base.limits(u_IP, ln_y_P)
        reach = np.array([reach_of(c, self.base) for c in self.changes])
        return np.concatenate([low, -reach]), np.concatenate([high, reach])

    def starts(self, u_IP: Array, y_P: Array) -> Array:
        """Those of the base for the unmarked rows, nothing changed."""
        plain = self.base.starts(u_IP, y_P)
        return np.concatenate([plain, np.zeros((len(plain), len(self.changes)))], axis=1)

    def natural(self, theta_BK: Array, centre_I: Array) -> Array:
        """The base's parameters for unmarked rows, then the changes."""
        size = self.base.size
        return np.concatenate(
            [self.base.natural(theta_BK[:, :size], centre_I), theta_BK[:, size:]], axis=1
        )

    def edges(self, theta_K: Array, u_IP: Array, ln_y_P: Array) -> list[str]:
        """Those of the base, on unmarked rows."""
        marked = self.marked_P > 0
        return self.base.edges(theta_K[: self.base.size], u_IP[:, ~marked], ln_y_P[~marked])


def reach_of(change: str, base: SumOfPowers) -> float:
    """How far a change is searched for, either way: of an exponent itself, of a scale its ln."""
    return 2.0 if change in base.exponents else 20.0


def joint(base: SumOfPowers, changes: tuple[str, ...], marked: Array, centre_I: Array) -> Joint:
    """`base` with changes for marked rows; `centre_I` as `fit` will take it: the mean of ln
    inputs over all rows.
    """
    directions = np.zeros((len(changes), base.size))
    for row, name in enumerate(changes):
        if name == FACTOR:
            continue
        place = base.names.index(name)
        directions[row, place] = 1.0
        for scale, axis, exponent in base.terms:
            if exponent == place and axis is not None:
                directions[row, scale] -= centre_I[axis]
    return Joint(
        name=f"{base.name} with {', '.join(changes) or 'nothing'} changed",
        formula=base.formula,
        names=(*base.names, *(f"change of {c}" for c in changes)),
        inputs=base.inputs,
        meaning=base.meaning,
        source=base.source,
        exponents=base.exponents,
        terms=base.terms,
        base=base,
        changes=changes,
        marked_P=np.asarray(marked, float),
        directions_CK=directions,
    )
