"""Do the three approaches agree, and does it matter how compute is counted?

Hoffmann et al. 2022 (arXiv 2203.15556, table 2) put the exponents of three approaches side by
side; Porian et al. 2024 (arXiv 2406.19146) trace the gap between Kaplan's and theirs partly to what
counts as compute.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.costs import cost_of_rows
from analysis.envelope import fit_envelope
from analysis.frontier import Cost, Frontier, frontier
from analysis.isoflop import fit_isoflop
from analysis.optimum import Array, OptimumFit

POORLY_PRICED = 0.1
"""Root mean square of ln C around a cost fitted to rows that is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """One approach's a and b, or why it has none."""

    approach: str
    status: str
    reason: str
    a: float | None
    a_ci95: tuple[float, float] | None
    b: float | None
    b_ci95: tuple[float, float] | None
    total: float | None
    """a + b: 1 where C is a product of N and D."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ApproachesTable:
    """Exponents side by side. `agree` is None where no two approaches have intervals."""

    rows: tuple[Exponents, ...]
    agree: bool | None
    disagreements: tuple[str, ...]
    not_compared: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists."""
        return dataclasses.asdict(self)


def approaches_table(fits: Mapping[str, OptimumFit | Frontier]) -> ApproachesTable:
    """Exponents of each named fit, and which differ by more than their intervals allow.

    Two exponents disagree where the 95 % interval of their difference leaves out 0. It is put
    together from both intervals (Zou and Donner 2008, MOVER) as if they were independent; fits to
    the same rows err alike, so a disagreement that is found is one.
    """
    rows = tuple(_exponents(name, fit) for name, fit in fits.items())
    found, skipped, compared = [], [], 0
    for one, other in itertools.combinations(rows, 2):
        for name in ("a", "b"):
            pair = f"{name} of {one.approach} and {other.approach}"
            gap = _difference(
                *(getattr(r, k) for r in (one, other) for k in (name, f"{name}_ci95"))
            )
            if gap is None:
                lacking = [r.approach for r in (one, other) if getattr(r, f"{name}_ci95") is None]
                skipped.append(f"{pair}: no interval for {' and '.join(lacking)}")
                continue
            compared += 1
            low, high = gap
            if low > 0 or high < 0:
                values = f"{getattr(one, name):.3f} and {getattr(other, name):.3f}"
                found.append(f"{pair}: {values}, difference {low:+.3f} to {high:+.3f}")
    return ApproachesTable(
        rows=rows,
        agree=not found if compared else None,
        disagreements=tuple(found),
        not_compared=tuple(skipped),
    )


def _exponents(name: str, fit: OptimumFit | Frontier) -> Exponents:
    a, b = fit.params.get("a"), fit.params.get("b")
    return Exponents(
        approach=name,
        status=fit.status,
        reason=fit.reason,
        a=a,
        a_ci95=fit.ci95.get("a"),
        b=b,
        b_ci95=fit.ci95.get("b"),
        total=None if a is None or b is None else a + b,
        warnings=fit.warnings,
    )


def _difference(
    one: float | None,
    one_ci: tuple[float, float] | None,
    two: float | None,
    two_ci: tuple[float, float] | None,
) -> tuple[float, float] | None:
    if one is None or two is None or one_ci is None or two_ci is None:
        return None
    gap = one - two
    # A percentile interval may leave out its estimate; there is no distance less than none.
    below = math.hypot(max(0.0, one - one_ci[0]), max(0.0, two_ci[1] - two))
    above = math.hypot(max(0.0, one_ci[1] - one), max(0.0, two - two_ci[0]))
    return gap - below, gap + above


# -- conventions of compute -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Exponents when compute is counted one way; `rows` is empty where it was not counted."""

    name: str
    reason: str
    rows: tuple[Exponents, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists."""
        return dataclasses.asdict(self)


def conventions_table(
    n: Array,
    d: Array,
    loss: Array,
    costs: Mapping[str, Array | str | None],
    runs: Sequence[Any] | None = None,
    finished: Sequence[bool] | None = None,
    *,
    surface: Mapping[str, float] | Sequence[float] | None = None,
    draws: Array | None = None,
    exact: Mapping[str, Cost] | None = None,
    bootstrap: int = 4000,
    seed: int = 0,
) -> tuple[Convention, ...]:
    """The exponents under 6 N D and under each cost of `costs` (exact FLOPs, GPU-hours, ...).

    A cost is a column of the rows; None or a reason in words where there is none. Approaches 1
    and 2 are fitted anew on each; rows planned for equal 6 N D are rarely of equal cost
    otherwise, and approach 2 then has only what classes come about. Approach 3, given the
    `surface` and its `draws`, minimises it at each cost, over the range the rows have: a function
    of `exact` by that name, or else a smooth one fitted to the column.
    """
    size, samples = np.asarray(n, dtype=float), np.asarray(d, dtype=float)
    out = []
    for name, column in {"6 N D": 6.0 * size * samples, **costs}.items():
        if column is None or isinstance(column, str):
            reason = column or "not recorded for these rows"
            out.append(Convention(name=name, reason=reason, rows=()))
            continue
        c = np.asarray(column, dtype=float)
        fits: dict[str, OptimumFit | Frontier] = {
            "envelope": fit_envelope(
                size, samples, loss, c, runs, finished, bootstrap=bootstrap, seed=seed
            ),
            "isoflop": fit_isoflop(size, samples, loss, c, runs, bootstrap=bootstrap, seed=seed),
        }
        if surface is not None:
            cost = 6.0 if name == "6 N D" else (exact or {}).get(name)
            fits["surface"] = _on_surface(name, surface, draws, size, samples, c, cost)
        rows = tuple(_exponents(approach, fit) for approach, fit in fits.items())
        out.append(Convention(name=name, reason="", rows=rows))
    return tuple(out)


def _on_surface(
    name: str,
    surface: Mapping[str, float] | Sequence[float],
    draws: Array | None,
    n: Array,
    d: Array,
    c: Array,
    cost: float | Cost | None,
) -> Frontier:
    warnings = []
    if cost is None:
        fitted = cost_of_rows(n, d, c)
        if isinstance(fitted, str):
            return Frontier(status="refused", reason=fitted, cost=name)
        if fitted.rms > POORLY_PRICED:
            warnings.append(f"N and D give {name} only to {fitted.rms:.0%}")
        cost = fitted
    priced = c[np.isfinite(c) & (c > 0)]
    if not len(priced):
        return Frontier(status="refused", reason=f"no row has {name}", cost=name)
    grid = np.geomspace(priced.min(), priced.max(), 25)
    found = frontier(surface, grid, draws, cost=cost, cost_name=name)
    return dataclasses.replace(found, warnings=(*found.warnings, *warnings))
