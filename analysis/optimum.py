"""Power laws through compute-optimal points: what approaches 1 and 2 share.

Approach 1 (`analysis.envelope`) and approach 2 (`analysis.isoflop`) of Hoffmann et al. 2022 (arXiv
2203.15556, sec. 3.1 and 3.2) find optima (C, N*, D*, L*) in different ways and then do the same:
lines in log-log by ordinary least squares,

    N* = G C^a,    D* = H C^b,    L* = K C^-gamma.

The last one describes the range of C it was fitted on: with an irreducible loss it flattens above.

Shapes: R units of resampling (runs or rows), B bootstrap draws, Q optima of all draws together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.errors import UserError

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Status = Literal["converged", "not_converged", "at_bound", "refused"]

NAMES = ("G", "a", "H", "b", "K", "gamma")
DRAW_COLUMNS = ("ln G", "a", "ln H", "b", "ln K", "gamma")
FORMULA = "N* = G * C**a, D* = H * C**b, L* = K * C**-gamma"
MIN_SIZES = 3
MIN_DECADES = 1.0
SAME_SIZE = 0.01
"""N that differ by less are one size: counted with another head, or read off a figure."""
MIN_USED = 0.5
"""Share of draws that must give a law; with fewer, what is left is no sample of the estimator."""
_QUANTITIES = {"n": (0, 1), "d": (2, 3), "loss": (4, 5)}
_CHUNK = 16_000_000


@dataclass(frozen=True, kw_only=True)
class OptimumFit:
    """The three laws with what a reader needs to judge them. `params` is empty when refused."""

    law: Literal["envelope", "isoflop"]
    status: Status
    reason: str = ""
    params: dict[str, float] = field(default_factory=dict)
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    objective: float | None = None
    """Sum of squared residuals of ln N* around its line."""
    rows_used: int = 0
    rows_dropped: tuple[dict[str, Any], ...] = ()
    """{row, reason}; rows are counted from 0 in the order given."""
    warnings: tuple[str, ...] = ()
    bootstrap: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    points: tuple[dict[str, Any], ...] = ()
    """Optima {c, n, d, loss, used, ...}; for isoflop also the classes that have none, with why."""
    c_range: tuple[float, float] | None = None
    """Smallest and largest C of the optima used."""
    draws: Array | None = None
    """Bootstrap laws [B, 6], columns `DRAW_COLUMNS`."""

    def predict(self, c: Array, what: Literal["n", "d", "loss"]) -> Array:
        """N*, D* or L* at compute c. Raises UserError when the fit was refused."""
        if not self.params:
            raise UserError(f"{self.law}: there is no law to predict with: {self.reason}")
        scale, power = (self.params[NAMES[i]] for i in _QUANTITIES[what])
        return scale * np.asarray(c, float) ** (-power if what == "loss" else power)

    def band(self, c: Array, what: Literal["n", "d", "loss"]) -> tuple[Array, Array] | None:
        """95 % bootstrap band at compute c; None where there is no interval."""
        if self.draws is None or not self.ci95:
            return None
        offset_B1, power_B1 = (self.draws[:, [i]] for i in _QUANTITIES[what])
        sign = -1.0 if what == "loss" else 1.0
        values = offset_B1 + sign * power_B1 * np.log(np.asarray(c, float))[None]
        low, high = np.exp(np.percentile(values, [2.5, 97.5], axis=0))
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Everything but the draws."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del out["draws"]
        return {"formula": FORMULA, **out, "heldout": None}


# -- rows -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that can be used, those that cannot, and what is resampled."""

    n: Array
    d: Array
    loss: Array
    c: Array
    row: Ints
    """Place of each row in the input."""
    unit: Ints
    """Which unit of resampling each row belongs to, 0 to `num_units` - 1."""
    num_units: int
    unit_kind: Literal["runs", "rows"]
    dropped: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def read_rows(
    n: Sequence[float] | Array,
    d: Sequence[float] | Array,
    loss: Sequence[float] | Array,
    c: Sequence[float] | Array | None,
    runs: Sequence[Any] | None,
) -> Rows:
    """Checks the columns; units are runs where a run has more than one row, else rows.

    Products are taken in floats: 6 N D of real runs does not fit into 64-bit integers. Raises
    UserError where columns are not numbers or not equally long.
    """
    columns = {"N": _numbers("N", n), "D": _numbers("D", d), "loss": _numbers("loss", loss)}
    if c is not None:
        columns["C"] = _numbers("C", c)
    lengths = {name: len(values) for name, values in columns.items()}
    if runs is not None:
        lengths["runs"] = len(runs)
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"columns of different length: {found}; give one value of each per row")
    warnings = ()
    if c is None:
        columns["C"] = 6.0 * columns["N"] * columns["D"]
        warnings = ("no column of compute was given: C = 6 N D",)
    good_of = {name: np.isfinite(v) & (v > 0) for name, v in columns.items()}
    reasons = {name: "not finite and positive" for name in columns}
    code = np.arange(lengths["N"])
    if runs is not None:
        code, names = pd.factorize(np.array([*runs, None], dtype=object)[:-1])
        good_of["run"] = (code >= 0) & ~np.isin(code, np.flatnonzero([n == "" for n in names]))
        reasons["run"] = "not named"
    good = np.logical_and.reduce(list(good_of.values()))
    kept = np.flatnonzero(good)
    # Numbers from 0 without gaps, in order of appearance.
    unit, seen = pd.factorize(code[kept])
    by_run = runs is not None and len(seen) < len(kept)
    return Rows(
        n=columns["N"][kept],
        d=columns["D"][kept],
        loss=columns["loss"][kept],
        c=columns["C"][kept],
        row=kept,
        unit=unit if by_run else np.arange(len(kept)),
        num_units=len(seen) if by_run else len(kept),
        unit_kind="runs" if by_run else "rows",
        dropped=tuple(
            {
                "row": int(i),
                "reason": "; ".join(f"{k} {reasons[k]}" for k, ok in good_of.items() if not ok[i]),
            }
            for i in np.flatnonzero(~good)
        ),
        warnings=warnings,
    )


def _numbers(name: str, values: Sequence[float] | Array) -> Array:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}; expected numbers only") from None
    if array.ndim != 1:
        raise UserError(f"{name}: {array.ndim} dimensions; expected one value per row")
    return array


def sizes_of(n: Array) -> tuple[Array, Ints]:
    """Distinct sizes, ascending, by their smallest N, and which of them each n is."""
    distinct, place = np.unique(n, return_inverse=True)
    starts: list[float] = []
    size_of_distinct = np.zeros(len(distinct), np.int64)
    for i, value in enumerate(distinct):
        # From the size's smallest N, so that a dense row of N does not become one size.
        if not starts or value > starts[-1] * (1 + SAME_SIZE):
            starts.append(float(value))
        size_of_distinct[i] = len(starts) - 1
    return np.array(starts), size_of_distinct[place]


# -- lines ----------------------------------------------------------------------------------


def power_laws(draw_Q: Ints, log_c_Q: Array, log_y_Q3: Array, num: int) -> Array:
    """Least squares of ln N*, ln D*, ln L* on ln C for each of `num` draws [num, 6].

    Q optima of all draws together, `draw_Q` says whose. Columns `DRAW_COLUMNS`; NaN where C does
    not vary.
    """

    def total(values_Q: Array) -> Array:
        return np.bincount(draw_Q, values_Q, num).astype(float)

    count = np.maximum(np.bincount(draw_Q, minlength=num), 1)
    mean = total(log_c_Q) / count
    dx = log_c_Q - mean[draw_Q]
    square = total(dx**2)
    square[square <= 0] = np.nan
    columns = []
    for y_Q, sign in zip(log_y_Q3.T, (1.0, 1.0, -1.0), strict=True):
        slope = total(dx * y_Q) / square
        columns += [total(y_Q) / count - slope * mean, sign * slope]
    return np.stack(columns, axis=1)


def named(theta_6: Array) -> dict[str, float]:
    """One row of `power_laws` as parameters by name."""
    values = [np.exp(v) if name in "GHK" else v for name, v in zip(NAMES, theta_6, strict=True)]
    return {name: float(v) for name, v in zip(NAMES, values, strict=True)}


def span_decades(c: Array) -> float:
    """Decades between the smallest and the largest c."""
    return float(np.log10(c.max() / c.min())) if len(c) else 0.0


# -- bootstrap ------------------------------------------------------------------------------


def bootstrap_laws(
    laws_of: Callable[[Array], Array],
    strata: list[Ints],
    num_units: int,
    num: int,
    seed: int,
    width: int,
) -> Array:
    """Laws of `num` draws [num, 6], NaN where a draw identifies none.

    `laws_of` takes how often each unit was drawn [B, R] and gives [B, 6]. Units are drawn with
    replacement inside their stratum. `width` is the largest number of values a draw needs at
    once, so that many rows do not need much memory.
    """
    size = max(1, _CHUNK // max(width, num_units))
    found = [laws_of(times_BR) for times_BR in _draws(strata, num_units, num, seed, size)]
    return np.concatenate([np.zeros((0, 6)), *found])


def _draws(strata: list[Ints], num_units: int, num: int, seed: int, size: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    for start in range(0, num, size):
        times = np.zeros((min(size, num - start), num_units))
        for members in strata:
            picks = rng.integers(0, len(members), size=(len(times), len(members)))
            flat = picks + len(members) * np.arange(len(times))[:, None]
            count = np.bincount(flat.ravel(), minlength=len(times) * len(members))
            times[:, members] = count.reshape(len(times), len(members))
        yield times


def intervals(
    draws_B6: Array, unit: str, num_units: int, why_failed: str
) -> tuple[Array, dict[str, tuple[float, float]], dict[str, Any], list[str]]:
    """Usable draws, 95 % percentile intervals, counts, warnings.

    No interval where fewer than half of the draws, or than 20, gave a law.
    """
    num = len(draws_B6)
    usable = draws_B6[np.isfinite(draws_B6).all(axis=1)]
    counts = {
        "unit": unit,
        "units": num_units,
        "draws": num,
        "used": len(usable),
        "not_identified": num - len(usable),
    }
    warnings = []
    ci95: dict[str, tuple[float, float]] = {}
    if len(usable) >= max(20, MIN_USED * num):
        bounds = np.percentile(usable, [2.5, 97.5], axis=0).T
        for name, (low, high) in zip(NAMES, bounds, strict=True):
            ends = np.exp([low, high]) if name in "GHK" else (low, high)
            ci95[name] = (float(ends[0]), float(ends[1]))
        if len(usable) < 0.8 * num:
            warnings.append(
                f"{num - len(usable)} of {num} bootstrap draws {why_failed} and are left out; the"
                " interval is too narrow for that reason"
            )
    elif num:
        warnings.append(
            f"no interval: {num - len(usable)} of {num} bootstrap draws {why_failed}, and the rest"
            " is no fair sample"
        )
    return usable, ci95, counts, warnings
