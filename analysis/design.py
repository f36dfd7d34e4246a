"""Which cells to run next: those that shrink the intervals of the exponents most per hour.

Every arm (init) has its own L(N, D). Cells are chosen one at a time: the greatest fall of the mean
ln standard deviation of all exponents (`analysis.information`), per hour of what is still to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis.fit import MIN_SPAN, MIN_SPREAD, why_not
from analysis.forms import Array, Form
from analysis.information import NOMINAL, Arm, Known, Noise
from analysis.tables import NONE, Table
from harness.units import format_count


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cell that could be run. `hours` are those of its stages that are not done, by stage id."""

    init: str
    size: str
    n: float
    d: float
    seed: int
    hours: Mapping[str, float]
    kind: str = "new cell"
    """`new cell`, `extra seed` or `planned cell`."""
    axes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As shown: size, images, init, seed."""
        return f"{self.size}, {format_count(round(self.d))} images, {self.init}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One advised cell, in the order of worth."""

    cell: Candidate
    hours: float
    """What it adds, stages shared with earlier steps paid."""
    ratio: float | None
    """Geometric mean of the exponents' interval widths after it over those before any step."""
    ci95: dict[str, tuple[float, float]]
    """Predicted interval of every `init.exponent` after this step; none where none is known now."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to run next and what it would bring."""

    status: Literal["advised", "identify", "refused"]
    """`identify`: a law was refused, and the cells are those that would let it be fitted."""
    reason: str = ""
    unit: str = "hours"
    steps: tuple[Step, ...] = ()
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Intervals as they are now."""
    noise: dict[str, Noise] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """Of all steps."""
        return sum(s.hours for s in self.steps)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        steps = [
            {**s.__dict__, "cell": dict(s.cell.__dict__), "label": s.cell.label} for s in self.steps
        ]
        noise = {k: dict(v.__dict__) for k, v in self.noise.items()}
        return {**self.__dict__, "steps": steps, "noise": noise, "hours": self.hours}


def advise(
    arms: Sequence[Arm],
    candidates: Sequence[Candidate],
    *,
    cells: int = 4,
    unit: str = "hours",
    notes: Sequence[str] = (),
) -> Advice:
    """Up to `cells` candidates, greedily. Where an arm's law was refused, those that would make its
    rows identify one come instead, and no interval is predicted.
    """
    mine = [c for c in candidates if any(a.init == c.init for a in arms)]
    if not mine:
        return Advice(
            status="refused", reason="no cell to choose from", unit=unit, notes=tuple(notes)
        )
    refused = [a for a in arms if a.law.status != "converged"]
    if refused:
        return _identify(refused, mine, cells, unit, notes)
    known = {a.init: Known.of(a) for a in arms}
    now = {f"{a.init}.{e}": a.law.ci95[e] for a in arms for e in a.form.exponents if a.law.ci95}
    steps = _greedy(known, mine, cells, arms, set())
    return Advice(
        status="advised" if steps else "refused",
        reason="" if steps else "no candidate shrinks any interval",
        unit=unit,
        steps=tuple(steps),
        ci95=now,
        noise={k: v.noise for k, v in known.items()},
        notes=(*notes, *_noise_notes(known)),
    )


# -- greedy ---------------------------------------------------------------------------------


def _greedy(
    known: Mapping[str, Known],
    candidates: Sequence[Candidate],
    cells: int,
    arms: Sequence[Arm],
    paid: set[str],
) -> list[Step]:
    current, left = dict(known), list(candidates)
    before = {k: v.exponent_sds() for k, v in known.items()}
    steps: list[Step] = []
    while left and len(steps) < cells:
        now = {k: np.log(v.exponent_sds()).sum() for k, v in current.items()}
        best, most = None, 0.0
        for cell in left:
            after = np.log(current[cell.init].with_row(cell.n, cell.d).exponent_sds()).sum()
            worth = (now[cell.init] - after) / max(_hours(cell, paid), 1e-9)
            if worth > most * (1 + 1e-9):
                best, most = cell, worth
        if best is None:
            break
        hours = _hours(best, paid)
        current[best.init] = current[best.init].with_row(best.n, best.d)
        paid |= best.hours.keys()
        left.remove(best)
        ratios = {k: v.exponent_sds() / before[k] for k, v in current.items()}
        every = np.concatenate(list(ratios.values()))
        steps.append(
            Step(
                cell=best,
                hours=hours,
                ratio=float(np.exp(np.log(every).mean())),
                ci95=_predicted(arms, ratios),
            )
        )
    return steps


def _hours(cell: Candidate, paid: set[str]) -> float:
    return sum(h for stage, h in cell.hours.items() if stage not in paid)


def _predicted(arms: Sequence[Arm], ratios: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    """Today's intervals drawn together about today's estimates."""
    found = {}
    for arm in arms:
        for name, ratio in zip(arm.form.exponents, ratios[arm.init], strict=True):
            if name in arm.law.ci95:
                value, (low, high) = arm.law.params[name], arm.law.ci95[name]
                ends = (value + ratio * (low - value), value + ratio * (high - value))
                found[f"{arm.init}.{name}"] = (float(ends[0]), float(ends[1]))
    return found


def _noise_notes(known: Mapping[str, Known]) -> list[str]:
    alone = [k for k, v in known.items() if not v.noise.has_seeds]
    if not alone:
        return []
    return [f"one seed per point ({', '.join(alone)}): all scatter is taken for that of seeds"]


# -- refused laws ---------------------------------------------------------------------------


def shortfall(form: Form, n: Array, d: Array) -> dict[str, float]:
    """What rows lack for the law to be fitted, in words, each with how far off it is (0 to 1)."""
    lacks: dict[str, float] = {}
    num, least = len(n), form.size + 2
    if num < least:
        lacks[f"{least - num} more rows"] = (least - num) / least
    for name, values in (("model size", n), ("data size", d)):
        distinct = len(np.unique(values))
        if distinct < form.needs_distinct:
            word = {1: "second and third", 2: "third"}.get(distinct, "first three")
            lacks[f"{word} {name} needed"] = 1.0 - distinct / form.needs_distinct
        span = float(np.log10(values.max() / values.min())) if len(values) else 0.0
        if span < MIN_SPAN - 1e-9:
            lacks[f"{name}s over {MIN_SPAN:g} decade needed"] = 1.0 - span / MIN_SPAN
    if len(n) > 1:
        apart = _apart(np.log10(n), np.log10(d))
        if apart < MIN_SPREAD:
            lacks["model and data size varied apart from each other"] = 1.0 - apart / MIN_SPREAD
    return lacks


def _apart(n: Array, d: Array) -> float:
    """Decades that one varies by at equal other, the less of both."""
    spreads = []
    for one, other in ((n, d), (d, n)):
        slope = 0.0
        if np.ptp(other) > 0:
            slope = float(np.polyfit(other, one, 1)[0])
        spreads.append(float(np.ptp(one - slope * other)))
    return min(spreads)


def _identify(
    arms: Sequence[Arm],
    candidates: Sequence[Candidate],
    cells: int,
    unit: str,
    notes: Sequence[str],
) -> Advice:
    reasons, steps, paid = [], [], set[str]()
    for arm in arms:
        reasons.append(f"{arm.init}: {arm.law.reason or arm.law.status}")
        own = [c for c in candidates if c.init == arm.init]
        if shortfall(arm.form, arm.n, arm.d):
            found = _fill(arm, own, cells - len(steps), paid)
        else:
            # Rows are many enough; more of them, where they tell most about a nominal law.
            found = _greedy({arm.init: Known.nominal(arm)}, own, cells - len(steps), (), paid)
            extra = f"most informative if exponents are near {NOMINAL:g}"
            found = [Step(**{**s.__dict__, "ratio": None, "note": extra}) for s in found]
        steps += found
    return Advice(
        status="identify" if steps else "refused",
        reason="; ".join(reasons),
        unit=unit,
        steps=tuple(steps),
        notes=tuple(notes),
    )


def _fill(arm: Arm, left: list[Candidate], cells: int, paid: set[str]) -> list[Step]:
    """Cells that bring the rows nearest to a law that can be fitted, per hour."""
    n, d, steps = arm.n, arm.d, []
    left = list(left)
    while left and len(steps) < cells and (lacks := shortfall(arm.form, n, d)):
        now = sum(lacks.values())
        worths = [
            (now - sum(shortfall(arm.form, np.append(n, c.n), np.append(d, c.d)).values()))
            / max(_hours(c, paid), 1e-9)
            for c in left
        ]
        if max(worths) <= 0:
            break
        best = left.pop(int(np.argmax(worths)))
        n, d = np.append(n, best.n), np.append(d, best.d)
        after = why_not(arm.form, {"N": n, "D": d}, np.ones(len(n)))
        note = f"{'; '.join(lacks)}; after it: {after or 'rows that a law can be fitted to'}"
        steps.append(Step(cell=best, hours=_hours(best, paid), ratio=None, ci95={}, note=note))
        paid |= best.hours.keys()
    return steps


# -- shown ----------------------------------------------------------------------------------


def table(advice: Advice) -> Table:
    """A row per advised cell, the intervals after it; first the intervals as they are."""
    names = list(advice.ci95)
    rows = (
        [("now", NONE, NONE, NONE, *(_interval(advice.ci95[n]) for n in names), "")]
        if names
        else []
    )
    total = 0.0
    for step in advice.steps:
        total += step.hours
        ends = [_interval(step.ci95[n]) if n in step.ci95 else NONE for n in names]
        width = NONE if step.ratio is None else f"{step.ratio:.2f}"
        rows.append(
            (step.cell.label, f"{step.hours:.3g}", f"{total:.3g}", width, *ends, _why(step))
        )
    head = {"advised": "", "identify": f"No law yet ({advice.reason}). "}.get(
        advice.status, f"No advice: {advice.reason}. "
    )
    return Table(
        name="next-cells",
        title="Which cells to run next",
        note=head
        + "Cells in the order of what they shrink the exponents' 95 % intervals by, per hour of"
        f" stages not yet done ({advice.unit}). Width: geometric mean over all exponents, as a"
        " share of today's; a prediction from the fitted law and its scatter, not a result."
        + "".join(f" {note[:1].upper()}{note[1:]}." for note in advice.notes),
        header=("cell", advice.unit, "in total", "width", *names, "why"),
        rows=tuple(rows),
        numeric=frozenset(range(1, 4 + len(names))),
        wide=frozenset({4 + len(names)}),
    )


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _why(step: Step) -> str:
    return step.cell.kind + (f": {step.note}" if step.note else "")
