"""Rows of a CSV file as a fit takes them: numbers, with every row that is left out and why."""

from __future__ import annotations

import difflib
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.forms import Array
from harness.errors import NotFoundError, UserError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Usable rows. `lines` are line numbers in the file, the header being line 1."""

    columns: Mapping[str, Array]
    """Numbers by role (`N`, `D`, `C`, `x`, `y`, `train`)."""
    runs: list[str] | None
    schedules: list[str] | None
    lines: Array
    dropped: list[dict[str, Any]]
    sha256: str

    def without(self, gone: Array, reason: str) -> Rows:
        """Without the rows of a bool mask, which are listed with the reason."""
        lost = [{"line": int(n), "reason": reason} for n in self.lines[gone]]
        kept = ~gone
        return Rows(
            columns={k: v[kept] for k, v in self.columns.items()},
            runs=_kept(self.runs, kept),
            schedules=_kept(self.schedules, kept),
            lines=self.lines[kept],
            dropped=self.dropped + lost,
            sha256=self.sha256,
        )


def _kept(names: list[str] | None, kept: Array) -> list[str] | None:
    return None if names is None else [n for n, k in zip(names, kept, strict=True) if k]


def read(
    path: Path,
    columns: Mapping[str, str],
    *,
    run: str | None = None,
    schedule: str | None = None,
) -> Rows:
    """Reads the columns named by role; a row with anything unusable in them is left out, listed.

    Every role but `train` must be finite and above 0, since laws live in logarithms. Raises
    NotFoundError for a missing file, UserError for what is no table or has not the columns.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file; expected a CSV file with a header") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected a CSV file with a header") from None
    try:
        table = pd.read_csv(
            io.BytesIO(raw),
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            encoding="utf-8-sig",
            skip_blank_lines=False,
        )
    except (ValueError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: cannot be read as CSV: {why}; expected a header and rows"
        ) from None
    table.columns = [str(c).strip() for c in table.columns]
    wanted = list(columns.values()) + [c for c in (run, schedule) if c]
    _check_columns(path, table, wanted)
    blank = (table == "").all(axis=1).to_numpy(bool)
    lines = np.arange(len(table)) + 2
    table, lines = table[~blank], lines[~blank]
    numbers: dict[str, Array] = {}
    reasons = np.full(len(table), "", dtype=object)
    for role, name in columns.items():
        text = table[name].str.strip()
        values = pd.to_numeric(text, errors="coerce").to_numpy(float)
        numbers[role] = values
        bad = ~np.isfinite(values) if role == "train" else ~(np.isfinite(values) & (values > 0))
        for i in np.flatnonzero(bad & (reasons == "")):
            reasons[i] = f"{name} is {text.iloc[i]!r}; {_expected(role)}"
    good = reasons == ""
    return Rows(
        columns={k: v[good] for k, v in numbers.items()},
        runs=_names(table, run, good),
        schedules=_names(table, schedule, good),
        lines=lines[good],
        dropped=[
            {"line": int(n), "reason": str(r)}
            for n, r in zip(lines[~good], reasons[~good], strict=True)
        ],
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def _expected(role: str) -> str:
    return "expected a number" if role == "train" else "expected a number above 0"


def _names(table: pd.DataFrame, name: str | None, good: Array) -> list[str] | None:
    return None if name is None else [str(v).strip() for v in table[name][good]]


def _check_columns(path: Path, table: pd.DataFrame, wanted: list[str]) -> None:
    problems = []
    known = [str(c) for c in table.columns]
    for name in wanted:
        if known.count(name) > 1:
            problems.append(f"{path}: {known.count(name)} columns are called {name!r}; rename one")
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, 1, 0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        problems.append(f"{path}: no column {name!r}; it has: {', '.join(known) or 'none'}{hint}")
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if not len(table):
        raise UserError(f"{path}: no rows below the header; expected one per run or checkpoint")


def schedule_column(path: Path) -> str | None:
    """The file's column called `schedule`, in any case; None if it has none."""
    try:
        header = pd.read_csv(path, nrows=0, encoding="utf-8-sig", skipinitialspace=True)
    except (OSError, ValueError):
        return None
    return next((str(c) for c in header.columns if str(c).strip().lower() == "schedule"), None)
