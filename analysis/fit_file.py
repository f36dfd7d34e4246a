"""Fits a law to a CSV file of anybody's rows: what `harness fit` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import rows as csv_rows
from analysis.envelope import fit_envelope
from analysis.fit import DELTA, Fit, fit, form_of
from analysis.forms import Array, Form, SumOfPowers
from analysis.holdout import compare, held_out
from analysis.isoflop import fit_isoflop
from analysis.rows import Rows
from analysis.schedules import unfinished, why_mixed
from analysis.shapes import FORMS
from harness.errors import UserError
from harness.ledger.files import write_bytes

TWO_AXES = tuple(name for name, form in FORMS.items() if len(form.inputs) == 2)
ONE_AXIS = tuple(name for name, form in FORMS.items() if len(form.inputs) == 1)
CURVES = ("envelope", "isoflop")
LAWS = (*ONE_AXIS, *TWO_AXES, *CURVES)
_FAR = 6.0
"""Residuals beyond so many median absolute deviations (as a normal's sd) are named."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to fit, and to which columns."""

    law: str
    n: str | None = None
    d: str | None = None
    c: str | None = None
    x: str | None = None
    y: str | None = None
    run: str | None = None
    train: str | None = None
    schedule: str | None = None
    """Column that says of which schedule a row is; its name, or None to take `schedule`, if any."""
    drop_highest: int = 0
    delta: float = DELTA
    bootstrap: int = 4000
    seed: int = 0
    chance: float | None = None
    compare: bool = False


def check(question: Question) -> None:
    """Raises UserError with every option that is missing, too many, or out of range."""
    q, problems = question, []
    if q.law in ONE_AXIS:
        need, other = {"--x": q.x, "--y": q.y}, {"--n": q.n, "--d": q.d, "--c": q.c}
    else:
        need, other = {"--n": q.n, "--loss": q.y}, {"--x": q.x, "--train": q.train}
        if q.law in TWO_AXES:
            need["--d"] = q.d
            other.pop("--train")
        elif q.d is None and q.c is None:
            problems.append(f"--law {q.law} needs --d or --c: which column has data, or FLOPs?")
    problems += [
        f"--law {q.law} needs {flag}: which column is it?" for flag, v in need.items() if v is None
    ]
    problems += [
        f"{flag} means nothing for --law {q.law}; leave it out"
        for flag, v in other.items()
        if v is not None
    ]
    if q.drop_highest < 0:
        problems.append(f"--drop-highest {q.drop_highest}: expected 0 or more rows")
    if not q.delta > 0:
        problems.append(f"--delta {q.delta:g}: expected a number above 0, in units of ln y")
    if q.bootstrap < 0 or 0 < q.bootstrap < 20:
        problems.append(f"--bootstrap {q.bootstrap}: expected 0, or at least 20 draws")
    if q.chance is not None and (q.law != "m4" or not q.chance > 0):
        problems.append(f"--chance {q.chance:g}: expected a value above 0, and --law m4")
    if q.compare and q.law in CURVES:
        problems.append(f"--compare compares forms of one kind; --law {q.law} has no other")
    if problems:
        raise UserError(*problems)


def answer(path: Path, question: Question) -> dict[str, Any]:
    """The fit as it stands in fit.json. Raises UserError for options or columns that do not do."""
    check(question)
    q = question
    roles = {"N": q.n, "D": q.d, "C": q.c, "x": q.x, "y": q.y, "train": q.train}
    schedule = q.schedule or csv_rows.schedule_column(path)
    if q.schedule == "none":
        schedule = None
    read = csv_rows.read(
        path, {k: v for k, v in roles.items() if v is not None}, run=q.run, schedule=schedule
    )
    kept = _drop_highest(read, q)
    about = {
        "schema": 1,
        "law": q.law,
        "data": {
            "file": path.name,
            "sha256": read.sha256,
            "columns": {k: v for k, v in roles.items() if v is not None},
            "run": q.run,
        },
        "rows_dropped": kept.dropped,
    }
    kinds = sorted(set(kept.schedules or []))
    if len(kinds) > 1:
        counts = ", ".join(f"{k} ({(kept.schedules or []).count(k)})" for k in kinds)
        reason = (
            f"mixed schedules: column {schedule!r} has {counts}; fit one kind at a time,"
            " or say --schedule none"
        )
        return _refused(about, kept, reason)
    if q.law in CURVES:
        return about | _of_curves(kept, q)
    return about | _of_law(kept, read, q)


def _refused(about: dict[str, Any], kept: Rows, reason: str) -> dict[str, Any]:
    return {
        **about,
        "status": "refused",
        "reason": reason,
        "params": {},
        "ci95": {},
        "objective": None,
        "rows_used": len(kept.lines),
        "warnings": [],
        "heldout": None,
    }


def _drop_highest(read: Rows, question: Question) -> Rows:
    num = question.drop_highest
    if not num:
        return read
    y = read.columns["y"]
    gone = np.zeros(len(y), bool)
    # Stable, so that the first of equals goes.
    gone[np.argsort(-y, kind="stable")[:num]] = True
    return read.without(gone, f"among the {num} highest values of {question.y} (--drop-highest)")


def _of_curves(kept: Rows, q: Question) -> dict[str, Any]:
    columns = kept.columns
    n, loss = columns["N"], columns["y"]
    c = columns.get("C")
    d = columns["D"] if "D" in columns else columns["C"] / (6.0 * n)
    runs = kept.runs
    if q.law == "envelope":
        found = fit_envelope(n, d, loss, c, runs, bootstrap=q.bootstrap, seed=q.seed)
    else:
        found = fit_isoflop(n, d, loss, c, runs, bootstrap=q.bootstrap, seed=q.seed)
    out = found.to_json()
    dropped = [
        {**entry, "line": int(kept.lines[entry["row"]])} if "row" in entry else entry
        for entry in out.pop("rows_dropped", [])
    ]
    return {"heldout": None, **out, "rows_dropped": kept.dropped + dropped}


def _of_law(kept: Rows, read: Rows, q: Question) -> dict[str, Any]:
    form = form_of(q.law, q.chance)
    inputs, y = {name: kept.columns[name] for name in form.inputs}, kept.columns["y"]
    train = np.ones(len(y), bool)
    if "train" in kept.columns:
        train = kept.columns["train"] != 0
    runs = kept.runs
    inside = {name: values[train] for name, values in inputs.items()}
    names = None if runs is None else [r for r, t in zip(runs, train, strict=True) if t]
    found = fit(
        form,
        inside,
        y[train],
        groups=names,
        delta=q.delta,
        bootstrap=q.bootstrap,
        seed=q.seed,
    )
    mixed = _mixed(form, inside, y[train], names, found, q)
    warnings = list(found.warnings)
    if mixed:
        found = Fit(
            law=found.law,
            formula=found.formula,
            status="refused",
            reason=mixed,
            delta=found.delta,
            rows_used=found.rows_used,
            distinct=found.distinct,
            span_decades=found.span_decades,
        )
        warnings = []
    common: dict[str, Any] = {
        "groups": runs,
        "delta": q.delta,
        "seed": q.seed,
        "bootstrap": min(q.bootstrap, 400),
    }
    is_split = "train" in kept.columns
    held: dict[str, Any] | None = None
    if found.status != "refused" or is_split:
        same = found if is_split else None
        held = held_out(form, inputs, y, train if is_split else None, fitted=same, **common)
    warnings += _far_rows(found, inside, y[train], kept.lines[train])
    out: dict[str, Any] = {**found.to_json(), "heldout": held}
    if q.drop_highest and found.params:
        out["all_rows"] = _with_all(form, read, q)
    if q.compare and not mixed:
        rest = [n for n in (ONE_AXIS if q.law in ONE_AXIS else TWO_AXES) if n != q.law]
        split = train if is_split else None
        out["forms"] = compare([q.law, *rest], inputs, y, split, chance=q.chance, **common)
    return {**out, "warnings": warnings}


def _mixed(
    form: Form,
    inputs: Mapping[str, Array],
    y: Array,
    runs: list[str] | None,
    found: Fit,
    q: Question,
) -> str | None:
    """Whether rows before the end of their runs lie off the others: laws over data can tell."""
    if runs is None or "D" not in inputs or not isinstance(form, SumOfPowers) or not found.params:
        return None
    marked = unfinished(runs, inputs["D"])
    return why_mixed(form, inputs, y, runs, marked, delta=q.delta, seed=q.seed)


def _far_rows(found: Fit, inputs: Mapping[str, Array], y: Array, lines: Array) -> list[str]:
    """Rows far off the law: named, and left in."""
    if not found.params:
        return []
    residual = np.log(y) - np.log(found.predict(inputs))
    # A law that its rows meet to rounding has no outliers.
    spread = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    far = np.abs(residual) > _FAR * max(spread, 1e-6)
    if not far.any():
        return []
    shown = ", ".join(
        f"line {n} ({r:+.1%})" for n, r in zip(lines[far], residual[far], strict=True)
    )
    return [f"{int(far.sum())} rows are far off the law and were used all the same: {shown}"]


def _with_all(form: Form, read: Rows, q: Question) -> dict[str, Any]:
    """The same fit with the rows that were dropped, so that their effect is seen."""
    inputs = {name: read.columns[name] for name in form.inputs}
    found = fit(form, inputs, read.columns["y"], delta=q.delta, bootstrap=0)
    return {"status": found.status, "params": found.params, "rows_used": found.rows_used}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """fit.json; what is not a finite number becomes null."""
    from analysis.plain import plain

    text = json.dumps(plain(found), indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())
