"""Why a fit may be believed or not: what it rests on and how the optimum was reached.

Read from the entries of fits.json only, so that a law of another form needs no change here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.laws import Law
from analysis.tables import NONE, Table, behind_fit

_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("rows", ("rows_used",)),
    ("distinct x", ("distinct_x",)),
    ("span, decades", ("span_decades",)),
    ("objective", ("objective",)),
    ("starts at best", ("starts_at_best",)),
    ("gradient norm", ("gradient_norm",)),
    ("condition number", ("condition_number", "condition")),
    ("bounds hit", ("bounds_hit", "at_bounds")),
    ("log RMSE", ("log_rmse",)),
    ("bootstrap draws", ("bootstrap",)),
)
"""Header -> entries of fits.json, the first that is there. A column without entries is left out."""


def entry(fit: Mapping[str, Any], *names: str) -> Any:
    """The first of the entries that a fit has; None if it has none."""
    return next((fit[name] for name in names if fit.get(name) is not None), None)


def number(value: Any) -> str:
    """Any entry as text."""
    if value is None or value == "" or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {number(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def table(laws: Sequence[Law]) -> Table | None:
    """A row per fit."""
    fits = [law.to_json() for law in laws]
    if not fits:
        return None
    columns = [
        (header, names)
        for header, names in _COLUMNS
        if any(entry(fit, *names) is not None for fit in fits)
    ]
    rows = []
    for law, fit in zip(laws, fits, strict=True):
        what = f"{fit['y']} over {fit['x']}, {fit['init']}"
        what += f" [{fit['variant']}]" if fit["variant"] else ""
        cells = [_cell(fit, header, names) for header, names in columns]
        rows.append((what, str(law.fit.status).replace("_", " "), *cells))
    return Table(
        name="diagnostics",
        title="Fit diagnostics",
        note=_note(fits),
        header=("fit", "status", *(header for header, _ in columns)),
        rows=tuple(rows),
        numeric=frozenset(i + 2 for i, (header, _) in enumerate(columns) if _is_number(header)),
        wide=frozenset(i + 2 for i, (header, _) in enumerate(columns) if not _is_number(header)),
        state_column=1,
        sources=tuple(map(behind_fit, laws)),
        file="fits.json",
    )


def _is_number(header: str) -> bool:
    return header not in ("bounds hit", "bootstrap draws")


def _cell(fit: Mapping[str, Any], header: str, names: tuple[str, ...]) -> str:
    value = entry(fit, *names)
    if header == "rows":
        dropped = len(fit.get("rows_dropped") or ())
        return f"{number(value)}, {dropped} dropped" if dropped else number(value)
    if header == "starts at best" and value is not None and fit.get("starts"):
        return f"{value} of {fit['starts']}"
    return number(value)


def _note(fits: Sequence[Mapping[str, Any]]) -> str:
    forms = list(dict.fromkeys(str(fit["formula"]) for fit in fits if fit.get("formula")))
    deltas = list(dict.fromkeys(f"{fit['delta']:g}" for fit in fits if fit.get("delta")))
    parts = [f"Form: {'; '.join(forms)}." if forms else ""]
    parts += [f"Huber delta {', '.join(deltas)}." if deltas else ""]
    parts.append(
        "Starts at best: how many of the starting points end in the best optimum; a small gradient"
        " says that it is one. A fit that was refused has no optimum to speak of."
    )
    return " ".join(part for part in parts if part)
