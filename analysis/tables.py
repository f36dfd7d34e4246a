"""The tables of a report, as rows of text: cells, results, gains, fits, ablations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import gain, style
from analysis.laws import AXIS_LABELS, DELTA, Law
from analysis.load import StudyData, axis_label
from analysis.metrics import Metric
from harness.units import format_seconds, format_si

NONE = "–"  # noqa: RUF001


@dataclass(frozen=True, kw_only=True)
class Source:
    """Cells, by id, that the numbers of a row come from."""

    cells: tuple[str, ...]
    label: str = ""
    """Which of the row's numbers, or why these cells are not used; empty: all numbers."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells; columns in `numeric` are set to the right."""

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    wide: frozenset[int] = frozenset()
    """Columns of running text, which may break lines."""
    state_column: int | None = None
    sources: tuple[tuple[Source, ...], ...] = ()
    """A row's cells, which the page links to; empty for a table that rests on none."""
    cells: tuple[str, ...] = ()
    """Only of the table of cells: the cell that each row is."""
    folders: tuple[tuple[str, ...], ...] = ()
    """Only of the table of cells: folders of its stages, relative to the run root."""
    file: str = ""
    """The file beside the page that has all rows; a long table is cut on the page."""


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else NONE


def cells(study: StudyData) -> Table:
    """Every cell with its state, its cost and the folders of its stages."""
    rows = []
    for c in study.cells.to_dict("records"):
        rows.append(
            (
                str(c["name"]),
                str(c["state"]),
                style.short(c["params"]),
                axis_label(int(c["data"])),
                str(c["init"]),
                str(c["seed"]),
                format_si(c["flops"], "FLOPs"),
                format_si(c["flops_mae"], "FLOPs") if c["flops_mae"] else NONE,
                format_seconds(c["wall_s"]) if c["wall_s"] else NONE,
                str(c["attempts"]),
                str(c["why"]),
            )
        )
    return Table(
        name="cells",
        title="Every cell",
        note="FLOPs and time of all stages of the cell; an MAE stage that several cells share is"
        " counted in full in each. Folders are relative to the run root.",
        header=(
            *("cell", "state", "params", "images", "init", "seed"),
            *("FLOPs", "of it MAE", "time", "attempts", "why"),
        ),
        rows=tuple(rows),
        numeric=frozenset({2, 3, 5, 6, 7, 8, 9}),
        wide=frozenset({10}),
        state_column=1,
        cells=tuple(map(str, study.cells["cell"])),
        folders=tuple(folders(study, own) for own in study.cells["stages"]),
        file="cells.csv",
    )


def folders(study: StudyData, stages: Mapping[str, str]) -> tuple[str, ...]:
    """Folders of a cell's stages, relative to the run root."""
    return tuple(
        study.stages[stage].folder.path.relative_to(study.root).as_posix()
        for stage in stages.values()
    )


def results(study: StudyData, metrics: list[Metric]) -> Table:
    """A row per cell, a column per judged metric; a state stands where there is no number."""
    columns = []
    for metric in metrics:
        rows = metric.rows(study.results).drop_duplicates("cell").set_index("cell")
        columns.append(
            {
                str(cell): _number(value) if math.isfinite(value) else str(state)
                for cell, value, state in zip(rows.index, rows["value"], rows["state"], strict=True)
            }
        )
    body = tuple(
        (str(name), *(column.get(cell, NONE) for column in columns))
        for cell, name in zip(study.cells["cell"], study.cells["name"], strict=True)
    )
    return Table(
        name="results",
        title="Results",
        note="Accuracies as fractions, losses in nats. All numbers, also those not judged here,"
        " are in results.csv.",
        header=("cell", *(m.label for m in metrics)),
        rows=body,
        numeric=frozenset(range(1, len(metrics) + 1)),
        sources=tuple((Source(cells=(str(cell),)),) for cell in study.cells["cell"]),
        file="results.csv",
    )


def gains(
    study: StudyData,
    metric: Metric,
    loss: Metric | None,
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    multipliers: pd.DataFrame,
) -> Table:
    """A row per grid point: gain at equal samples, at equal FLOPs, and what it is worth in data."""
    points = gain.by_point(pairs[pairs["metric"] == metric.key])
    own = {_key(r): r for r in points.to_dict("records")}
    ratios = charged.assign(why=charged["why_ratio"])
    worth = multipliers[multipliers["metric"] == metric.key]
    extra: list[tuple[str, dict[tuple[object, ...], str]]] = []
    if loss is not None and loss.key != metric.key:
        of_loss = pairs[pairs["metric"] == loss.key]
        extra.append((f"{loss.label}, nats", _spans(of_loss, "gain", 3)))
    extra.append(("loss, equal total FLOPs", _spans(charged, "gain", 3)))
    extra.append(("FLOPs to random's loss", _spans(ratios, "ratio", 2, "x", signed=False)))
    extra.append(("worth in images", _spans(worth, "multiplier", 2, "x", signed=False)))
    digits = 1 if metric.is_accuracy else 3
    rows = []
    for key, row in own.items():
        where = f"{row['size']}, {axis_label(int(row['data']))}"
        where += f", {row['variant']}" if row["variant"] else ""
        numbers = [_span(row, metric.gain_scale, digits)] + [c.get(key, NONE) for _, c in extra]
        rows.append((where, f"{row['seeds']}/{row['expected']}", *numbers))
    first = f"{metric.label}, {metric.gain_unit}"
    header = ("size, images", "pairs", first, *(name for name, _ in extra))
    return Table(
        name="gains",
        title="Gains",
        note="Mean over seeds [smallest to largest]. Positive gains mean that MAE helps. Worth in"
        f" images: how many times the images a random-init run needs for the same {metric.label},"
        " interpolated within the random arm and refused beyond it.",
        header=header,
        rows=tuple(rows),
        numeric=frozenset({1}),
        wide=frozenset(range(2, len(header))),
        sources=tuple(tuple(sources) for sources in _behind_gains(study, own)),
        file="gains.csv",
    )


def _behind_gains(study: StudyData, keys: Iterable[tuple[object, ...]]) -> Iterator[list[Source]]:
    """Cells of each grid point by init; and random's arm, which `worth in images` interpolates."""
    points: dict[tuple[object, ...], dict[str, list[str]]] = {}
    arms: dict[tuple[object, ...], list[tuple[float, str]]] = {}
    for cell in study.grid[[*gain.POINT, "init", "cell"]].to_dict("records"):
        init, name = str(cell["init"]), str(cell["cell"])
        key = tuple(cell[k] for k in gain.POINT)
        points.setdefault(key, {}).setdefault(init, []).append(name)
        if init == gain.WITHOUT:
            arms.setdefault(key[:-1], []).append((float(cell["data"]), name))
    for key in keys:
        own = points.get(key, {})
        found = [
            Source(cells=tuple(own.get(init, ())), label=style.init_label(init))
            for init in (gain.WITH, gain.WITHOUT)
        ]
        rest = tuple(name for data, name in arms.get(key[:-1], ()) if data != key[-1])
        found.append(Source(cells=rest, label="worth in images, also"))
        yield [source for source in found if source.cells]


def _spans(
    rows: pd.DataFrame, value: str, digits: int, unit: str = "", signed: bool = True
) -> dict[tuple[object, ...], str]:
    points = gain.by_point(rows, value)
    return {_key(r): _span(r, 1.0, digits, unit, signed) for r in points.to_dict("records")}


def _key(row: Mapping[Any, Any]) -> tuple[object, ...]:
    return tuple(row[k] for k in gain.POINT)


def _span(
    row: Mapping[Any, Any], scale: float, digits: int, unit: str = "", signed: bool = True
) -> str:
    if not row["seeds"]:
        return str(row["why"]) or NONE
    sign = "+" if signed else ""
    mean, low, high = (f"{row[k] * scale:{sign}.{digits}f}" for k in ("mean", "low", "high"))
    text = f"{mean}{unit}"
    if row["seeds"] > 1:
        text += f" [{low} to {high}]"
    if row["seeds"] < row["expected"]:
        text += f" ({row['seeds']} of {row['expected']} seeds)"
    return text


def fits(laws: Sequence[Law]) -> Table:
    """Every law: parameters with intervals, what it rests on, its held-out error."""
    rows = []
    for law in laws:
        fit, held = law.fit, law.held_out
        used = f"{fit.rows_used} of {fit.rows_used + len(law.dropped)}"
        if law.dropped:
            reasons = pd.Series([r for _, r in law.dropped]).value_counts()
            used += f" (dropped: {', '.join(f'{n} {r}' for r, n in reasons.items())})"
        error = NONE
        if "relative_error" in held:
            last, line = (held["baselines"][k] for k in ("last_value", "log_log_line"))
            error = (
                f"{held['relative_error']:+.1%} (last value {last:+.1%}, log-log line {line:+.1%})"
            )
        elif "reason" in held:
            error = f"refused: {held['reason']}"
        remarks = "; ".join(filter(None, [fit.reason, *fit.warnings]))
        rows.append(
            (
                law.metric.error_label + (f" [{law.variant}]" if law.variant else ""),
                f"{AXIS_LABELS[law.axis]} ({law.fixed})",
                law.init,
                fit.status.replace("_", " "),
                *(_with_interval(law, name) for name in ("a", "b", "c")),
                NONE if fit.log_rmse is None else f"{fit.log_rmse:.4f}",
                used,
                error,
                remarks,
            )
        )
    return Table(
        name="fits",
        title="Power laws",
        note=f"y = a x^-b + c; Huber loss on log residuals, summed, delta {DELTA:g}; 95 %"
        " percentile intervals from 400 bootstrap draws over runs. Held out: the law fitted"
        " without the largest x, its relative error there and that of two baselines.",
        header=(
            *("y", "over (held)", "init", "status", "a", "b", "c"),
            *("log RMSE", "rows", "held-out error", "remarks"),
        ),
        rows=tuple(rows),
        numeric=frozenset({7}),
        wide=frozenset({0, 1, 8, 9, 10}),
        state_column=3,
        sources=tuple(map(behind_fit, laws)),
        file="fits.json",
    )


def behind_fit(law: Law) -> tuple[Source, ...]:
    """The cells that a fit used, and those it dropped by reason."""
    found = [Source(cells=tuple(dict.fromkeys(law.cells)), label="used")]
    reasons: dict[str, list[str]] = {}
    for cell, reason in law.dropped:
        reasons.setdefault(reason, []).append(cell)
    found += [Source(cells=tuple(c), label=f"dropped, {why}") for why, c in reasons.items()]
    return tuple(source for source in found if source.cells)


def _with_interval(law: Law, name: str) -> str:
    if name not in law.fit.params:
        return NONE
    text = _number(law.fit.params[name], 3)
    if name in law.fit.ci95:
        low, high = law.fit.ci95[name]
        text += f" [{_number(low, 3)} to {_number(high, 3)}]"
    return text


def ablations(study: StudyData, metric: Metric | None) -> Table | None:
    """Cells that were run with a change, beside the cell they came from."""
    found = study.cells[study.cells["parent"].notna()]
    if not len(found):
        return None
    value = pd.Series(dtype=float)
    if metric is not None:
        value = metric.rows(study.results).drop_duplicates("cell").set_index("cell")["value"]
    names = study.cells.set_index("cell")["name"]
    rows, sources = [], []
    for _, c in found.iterrows():
        own, other = (float(value.get(k, np.nan)) for k in (c["cell"], c["parent"]))
        change = "; ".join(f"{k} = {v}" for k, v in c["set"].items())
        parent = str(names.get(c["parent"], c["parent"]))
        numbers = (_number(own), _number(other), _number(own - other, 3))
        rows.append((str(c["name"]), parent, change, str(c["state"]), *numbers))
        both = (Source(cells=(str(c["cell"]),), label="this"),)
        both += (Source(cells=(str(c["parent"]),), label="changed from"),)
        sources.append(both)
    label = metric.label if metric else "metric"
    return Table(
        name="ablations",
        title="Ablations",
        note=f"Judged by {label}. One run each: a difference says nothing about chance.",
        header=("cell", "changed from", "set", "state", "value", "parent's value", "difference"),
        rows=tuple(rows),
        numeric=frozenset({4, 5, 6}),
        wide=frozenset({2}),
        state_column=3,
        sources=tuple(sources),
        file="results.csv",
    )
