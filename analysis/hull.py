"""Which points of many training curves are on their envelope, for many resamples at once.

Shapes: P candidate points, R units (runs or rows), S sizes, B resamples, Q points on the envelope
of all resamples together, each a pair (resample, candidate). A candidate is a point that can be on
the envelope of some resample; ln C is x, ln loss is y.
"""

from __future__ import annotations

import itertools

import numpy as np

from analysis.optimum import MIN_SIZES, Array, Bools, Ints, Rows, power_laws, sizes_of
from harness.errors import UserError

# A point that 40 other units beat is on the envelope of a resample only if that has none of them:
# (1 - 40 / R)^R < e^-40.
_BEATEN_BY = 40
# Slopes -d ln L / d ln C of lines that touch the hull from below; every one of use is inside.
_SLOPES = np.geomspace(1e-5, 100.0, 160)
_CHUNK = 4_000_000


class Curves:
    """The points of all units, and the envelope of any choice of units.

    `bins` = 0 takes the falling part of the lower convex hull; otherwise the smallest loss in
    each of so many bins of ln C, where a bin with one size has nothing to compare and no say.
    """

    def __init__(self, rows: Rows, bins: int) -> None:
        self.bins = bins
        self.bins_skipped = 0
        self.sizes, size_of_row = sizes_of(rows.n)
        x, y = np.log(rows.c), np.log(rows.loss)
        self._describe_units(rows, size_of_row, x)
        picked = self._binned(rows, size_of_row, x, y) if bins else self._on_own_hull(rows, x, y)
        self.x, self.y = x[picked], y[picked]
        self.n, self.d = rows.n[picked], rows.d[picked]
        self.row, self.unit = rows.row[picked], rows.unit[picked]
        self.size = size_of_row[picked]

    def _describe_units(self, rows: Rows, size_of_row: Ints, x: Array) -> None:
        """Size, shortest and longest point of each unit, and units by size."""
        self.num_units = rows.num_units
        self.unit_size = np.zeros(rows.num_units, np.int64)
        self.unit_size[rows.unit] = size_of_row
        mixed = np.flatnonzero(self.unit_size[rows.unit] != size_of_row)
        if len(mixed):
            one, other = (self.sizes[i[mixed[0]]] for i in (size_of_row, self.unit_size[rows.unit]))
            raise UserError(
                f"row {rows.row[mixed[0]]}: N is {one:.6g}, and {other:.6g} in another row of its"
                " run; name runs so that each has one N"
            )
        self._min_R = np.full(rows.num_units, np.inf)
        self._max_R = np.full(rows.num_units, -np.inf)
        np.minimum.at(self._min_R, rows.unit, x)
        np.maximum.at(self._max_R, rows.unit, x)
        self._units_by_size = np.argsort(self.unit_size, kind="stable")
        ordered = self.unit_size[self._units_by_size]
        self._unit_starts = np.searchsorted(ordered, np.arange(len(self.sizes)))

    def _binned(self, rows: Rows, size_of_row: Ints, x: Array, y: Array) -> Ints:
        """Best point of each unit in each bin, best first, as far as one can be of use."""
        low, high = x.min(), x.max()
        place = np.floor((x - low) / max(high - low, 1e-12) * self.bins).astype(np.int64)
        place = np.minimum(place, self.bins - 1)
        order = np.lexsort((x, y, place))
        kept: list[Ints] = []
        self._bin_starts = [0]
        for members in np.split(order, np.searchsorted(place[order], np.arange(1, self.bins))):
            if not len(members):
                continue
            if len(np.unique(size_of_row[members])) < 2:
                self.bins_skipped += 1
                continue
            _, first = np.unique(rows.unit[members], return_index=True)
            kept.append(members[np.sort(first)][:_BEATEN_BY])
            self._bin_starts.append(self._bin_starts[-1] + len(kept[-1]))
        return np.concatenate(kept) if kept else np.zeros(0, np.int64)

    def _on_own_hull(self, rows: Rows, x: Array, y: Array) -> Ints:
        """Points on the hull of their own unit that few other units beat, by x."""
        order = np.lexsort((y, x, rows.unit))
        if rows.num_units < len(x):
            starts = np.searchsorted(rows.unit[order], np.arange(rows.num_units))
            lengths = np.diff([*starts, len(order)])
            step = max(1, _CHUNK // int(lengths.max()))
            kept = []
            for first in range(0, rows.num_units, step):
                own = slice(first, first + step)
                column = np.arange(lengths[own].max())
                index = order[np.minimum(starts[own, None] + column, len(order) - 1)]
                inside = column[:, None] < lengths[own]
                kept.append(index[falling_hull(x[index], y[index], inside)])
            order = np.concatenate(kept)
            order = order[np.argsort(rows.unit[order], kind="stable")]
        order = order[self._can_win(x[order], y[order], rows.unit[order])]
        return order[np.lexsort((y[order], x[order]))]

    def _can_win(self, x: Array, y: Array, unit: Ints) -> Bools:
        """Whether a point is among the lowest 40 units in some direction; unit ascending."""
        if self.num_units <= _BEATEN_BY:
            return np.ones(len(x), bool)
        out = np.zeros(len(x), bool)
        starts = np.searchsorted(unit, np.arange(self.num_units))
        for value in (y, x, *(y + slope * x for slope in _SLOPES)):
            best_R = np.minimum.reduceat(value, starts)
            out |= value <= np.partition(best_R, _BEATEN_BY - 1)[_BEATEN_BY - 1]
        return out

    # -- for resamples; times_BR says how often each unit was drawn ---------------------------

    def envelope(self, times_BR: Array) -> tuple[Ints, Ints]:
        """Pairs (resample, candidate) on the envelopes, by resample and C."""
        inside_PB = np.ascontiguousarray((times_BR > 0).T)[self.unit]
        if not self.bins:
            shape = inside_PB.shape[::-1]
            x_BP, y_BP = np.broadcast_to(self.x, shape), np.broadcast_to(self.y, shape)
            return falling_hull(x_BP, y_BP, inside_PB)
        wins_PB = np.zeros(inside_PB.shape, bool)
        every = np.arange(inside_PB.shape[1])
        for start, end in itertools.pairwise(self._bin_starts):
            best = inside_PB[start:end].argmax(axis=0)
            wins_PB[start + best, every] = inside_PB[start + best, every]
        draw, point = np.nonzero(wins_PB.T)
        return draw, point

    def interior(self, draw_Q: Ints, point_Q: Ints, times_BR: Array) -> Bools:
        """Which points of the envelope are optima: others were there to win on both sides.

        Not: sizes that are the smallest or largest of the resample, sizes of which the shortest
        or longest point is on the envelope, and the hull's first point, which is on it for having
        the smallest C.
        """
        size_Q, x_Q = self.size[point_Q], self.x[point_Q]
        starts = self._unit_starts
        drawn_BR = times_BR[:, self._units_by_size] > 0
        in_BS = np.logical_or.reduceat(drawn_BR, starts, axis=1)
        shortest, longest = self._min_R[self._units_by_size], self._max_R[self._units_by_size]
        min_BS = np.minimum.reduceat(np.where(drawn_BR, shortest, np.inf), starts, axis=1)
        max_BS = np.maximum.reduceat(np.where(drawn_BR, longest, -np.inf), starts, axis=1)
        first_Q = np.zeros(len(draw_Q), bool)
        if not self.bins:
            first_Q[np.unique(draw_Q, return_index=True)[1]] = True
        at_end_Q = (x_Q <= min_BS[draw_Q, size_Q]) | (x_Q >= max_BS[draw_Q, size_Q])
        at_end_Q &= ~first_Q
        out_BS = np.zeros(in_BS.shape, bool)
        out_BS[draw_Q[at_end_Q], size_Q[at_end_Q]] = True
        every = np.arange(len(out_BS))
        out_BS[every, in_BS.argmax(axis=1)] = True
        out_BS[every, in_BS.shape[1] - 1 - in_BS[:, ::-1].argmax(axis=1)] = True
        return ~(first_Q | out_BS[draw_Q, size_Q])

    def optima(self, draw_Q: Ints, point_Q: Ints, per_size: bool) -> tuple[Ints, Array, Array]:
        """Draw, ln C and (ln N, ln D, ln L) of each optimum: points, or means over each size's."""
        values_4P = np.stack([self.x, np.log(self.n), np.log(self.d), self.y])
        values_4Q = values_4P[:, point_Q]
        if per_size:
            num = len(self.sizes)
            key, place_Q = np.unique(draw_Q * num + self.size[point_Q], return_inverse=True)
            count = np.bincount(place_Q, minlength=len(key))
            values_4Q = np.array([np.bincount(place_Q, v, len(key)) / count for v in values_4Q])
            draw_Q = key // num
        return draw_Q, values_4Q[0], values_4Q[1:].T

    def laws(self, draw_Q: Ints, point_Q: Ints, num: int, per_size: bool) -> Array:
        """`power_laws` through the optima of each draw [num, 6]; NaN with fewer than 3 sizes."""
        theta = power_laws(*self.optima(draw_Q, point_Q, per_size), num)
        pairs = np.unique(draw_Q * len(self.sizes) + self.size[point_Q]) // len(self.sizes)
        sizes = np.bincount(pairs, minlength=num)
        return np.where((sizes >= MIN_SIZES)[:, None], theta, np.nan)

    def sizes_of(self, points: Ints) -> Array:
        """Distinct N of these candidates, ascending."""
        return self.sizes[np.unique(self.size[points])]


def falling_hull(x_BP: Array, y_BP: Array, inside_PB: Bools) -> tuple[Ints, Ints]:
    """Vertices of the lower convex hull of the points inside, as far as it falls.

    Pairs (b, p), b ascending, then p. Andrew's scan, all B at once. Along P, x must not fall, and
    y must not where x is equal.
    """
    points, num = inside_PB.shape
    stack = np.zeros((num, 16), np.int64)
    top = np.zeros(num, np.int64)
    for p in range(points):
        at = np.flatnonzero(inside_PB[p])
        # Not below the last vertex: beyond the lowest point so far, where the hull rises.
        last = stack[at, np.maximum(top[at] - 1, 0)]
        at = at[(top[at] == 0) | (y_BP[at, p] < y_BP[at, last])]
        above = at
        while len(above := above[top[above] >= 2]):
            j, i = stack[above, top[above] - 1], stack[above, top[above] - 2]
            x_i, y_i = x_BP[above, i], y_BP[above, i]
            turn = (x_BP[above, j] - x_i) * (y_BP[above, p] - y_i)
            turn -= (y_BP[above, j] - y_i) * (x_BP[above, p] - x_i)
            above = above[turn <= 0]
            top[above] -= 1
        if len(at) and top[at].max() == stack.shape[1]:
            stack = np.concatenate([stack, np.zeros_like(stack)], axis=1)
        stack[at, top[at]] = p
        top[at] += 1
    b, depth = np.nonzero(np.arange(stack.shape[1]) < top[:, None])
    return b, stack[b, depth]
