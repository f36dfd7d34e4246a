"""What the encoders of one grid point are worth: every task, every init, with intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import bootstrap, style
from analysis.bootstrap import Interval
from analysis.gain import WITH, WITHOUT
from analysis.load import StudyData, axis_label
from analysis.metrics import Metric
from analysis.panels import Figure, Panel
from analysis.tables import NONE, Source, Table

DIFFERENCE = "difference"
COLUMNS = [
    *("metric", "label", "task", "kind", "size", "data", "init", "seeds", "state"),
    *("value", "low", "high", "samples", "cells"),
]


def point_of(study: StudyData) -> tuple[str, float, float] | None:
    """(variant, params, data) of the grid point that is shown: the largest model on the most images
    of the study's main setting. None for a study without cells.
    """
    grid = study.grid
    if not len(grid):
        return None
    main = grid[grid["variant"] == grid["variant"].iloc[0]]
    last = main.sort_values(["params", "data"]).iloc[-1]
    return str(last["variant"]), float(last["params"]), float(last["data"])


def measure(study: StudyData, metrics: list[Metric]) -> pd.DataFrame:
    """A row per judged share x init at `point_of`, and one with the difference MAE - random.

    Values are means over seeds; low and high the ends of the bootstrap interval over test samples,
    NaN where a stage left no samples. A row without value has its state.
    """
    point = point_of(study)
    out: list[dict[str, Any]] = []
    if point is None:
        return pd.DataFrame(columns=COLUMNS)
    results = study.grid_results
    chosen = (results[["variant", "params", "data"]] == list(point)).all(axis=1)
    results = results[chosen]
    for metric in metrics:
        if not metric.is_accuracy:
            continue
        rows = metric.rows(results).drop_duplicates("cell")
        about = {"metric": metric.key, "label": metric.label, "task": metric.task}
        about |= {"kind": metric.kind}
        sides: dict[str, pd.DataFrame] = {}
        for init, group in rows.groupby("init", sort=False):
            good = group[np.isfinite(group["value"])]
            sides[str(init)] = good
            state = "done" if len(good) == len(group) else str(group["state"].iloc[0])
            out.append(_row(about, group, str(init), state, len(good), _own(study, metric, good)))
        if {WITH, WITHOUT} <= sides.keys():
            found, seeds = _difference(study, metric, sides[WITH], sides[WITHOUT])
            state = "done" if seeds else "no pair"
            out.append(_row(about, rows, DIFFERENCE, state, seeds, found))
    return pd.DataFrame(out, columns=COLUMNS)


def _row(
    about: dict[str, Any], rows: pd.DataFrame, init: str, state: str, seeds: int, found: Interval
) -> dict[str, Any]:
    first = rows.iloc[0]
    where = {"size": first["size"], "data": first["data"], "init": init, "seeds": seeds}
    numbers = {"value": found.value, "low": found.low, "high": found.high}
    cells = ";".join(map(str, rows["cell"]))
    return {**about, **where, "state": state, **numbers, "samples": found.samples, "cells": cells}


def _own(study: StudyData, metric: Metric, rows: pd.DataFrame) -> Interval:
    if not len(rows):
        return Interval(value=math.nan)
    return bootstrap.of_runs(float(rows["value"].mean()), _samples(study, metric, rows))


def _difference(
    study: StudyData, metric: Metric, one: pd.DataFrame, two: pd.DataFrame
) -> tuple[Interval, int]:
    """Over the seeds that both sides have."""
    seeds = sorted({*one["seed"]} & {*two["seed"]})
    if not seeds:
        return Interval(value=math.nan), 0
    one, two = (s.set_index("seed", drop=False).loc[seeds] for s in (one, two))
    value = float(one["value"].mean() - two["value"].mean())
    runs = [_samples(study, metric, side) for side in (one, two)]
    return bootstrap.of_difference(value, *runs), len(seeds)


def _samples(study: StudyData, metric: Metric, rows: pd.DataFrame) -> list[pd.Series | None]:
    return [
        bootstrap.read_samples(study.stages[str(stage)].folder.path, metric.name)
        for stage in rows["stage"]
    ]


# -- shown ----------------------------------------------------------------------------------


def table(study: StudyData, measured: pd.DataFrame) -> Table | None:
    """Tasks x inits, in percent."""
    if not len(measured):
        return None
    inits = style.ordered(i for i in measured["init"] if i != DIFFERENCE)
    with_difference = DIFFERENCE in set(measured["init"])
    rows, sources = [], []
    for label, group in measured.groupby("label", sort=False):
        by_init = {str(row["init"]): row for _, row in group.iterrows()}
        cells = [_text(by_init[i]) if i in by_init else NONE for i in inits]
        if with_difference:
            cells.append(_text(by_init[DIFFERENCE], signed=True) if DIFFERENCE in by_init else NONE)
        samples = int(group["samples"].max())
        rows.append((str(label), *cells, f"{samples:,}" if samples else NONE))
        behind = {i: tuple(str(by_init[i]["cells"]).split(";")) for i in inits if i in by_init}
        sources.append(tuple(Source(cells=c, label=style.init_label(i)) for i, c in behind.items()))
    first = measured.iloc[0]
    seeds = int(measured["seeds"].max())
    header = ["task", *(style.init_label(i) for i in inits)]
    header += ["MAE - random, paired"] if with_difference else []
    return Table(
        name="tasks",
        title="Transfer tasks",
        note=f"Percent, of {first['size']} pretrained on {axis_label(int(first['data']))} images,"
        f" mean over {seeds} seed{'s' if seeds != 1 else ''}. [95 % bootstrap interval over the"
        " test samples: how far the number would move on other samples, not with other seeds.]"
        " Differences are taken sample by sample. Samples of average precision are resamplings.",
        header=(*header, "samples"),
        rows=tuple(rows),
        numeric=frozenset(range(1, len(header) + 1)),
        sources=tuple(sources),
        file="tasks.csv",
    )


def _text(row: pd.Series, signed: bool = False) -> str:
    if not math.isfinite(row["value"]):
        return str(row["state"])
    sign = "+" if signed else ""
    text = f"{100 * row['value']:{sign}.1f}"
    if math.isfinite(row["low"]):
        text += f" [{100 * row['low']:{sign}.1f} to {100 * row['high']:{sign}.1f}]"
    return text


def figure(measured: pd.DataFrame) -> Figure | None:
    """Dots with intervals: every task, and beside it the paired difference."""
    good = measured[measured["value"].notna()]
    labels = list(dict.fromkeys(good["label"]))
    if len(labels) < 2:
        return None
    own, pairs = good[good["init"] != DIFFERENCE], good[good["init"] == DIFFERENCE]
    inits = style.ordered(own["init"])
    height = 1.1 + 0.34 * len(labels)
    panels = [
        Panel(
            title="Accuracy, recall or average precision",
            alt="; ".join(f"{r['label']}, {r['init']}: {_text(r)}" for _, r in own.iterrows()),
            draw=lambda ax: _dots(ax, own, labels, inits),
            width=4.8,
            height=height,
        )
    ]
    if len(pairs):
        panels.append(
            Panel(
                title="MAE minus random, paired",
                alt="; ".join(f"{r['label']}: {_text(r, True)}" for _, r in pairs.iterrows()),
                draw=lambda ax: _differences(ax, pairs, labels),
                width=4.8,
                height=height,
            )
        )
    first = measured.iloc[0]
    return Figure(
        name="tasks",
        title="Transfer tasks",
        caption=f"{first['size']} pretrained on {axis_label(int(first['data']))} images. Dots: mean"
        " over seeds; bars: 95 % bootstrap interval over the test samples.",
        panels=tuple(panels),
        columns=2,
        inits=inits,
    )


def _dots(ax: Axes, rows: pd.DataFrame, labels: list[str], inits: tuple[str, ...]) -> None:
    for number, init in enumerate(inits):
        # Side by side within a task's line, so that equal numbers do not hide each other.
        shift = 0.16 * (number - (len(inits) - 1) / 2)
        own = rows[rows["init"] == init]
        _bars(ax, own, [labels.index(x) + shift for x in own["label"]], init)
    _task_axis(ax, labels)
    ax.set_xlim(left=0)


def _differences(ax: Axes, rows: pd.DataFrame, labels: list[str]) -> None:
    ax.axvline(0, color=style.INK, lw=0.8)
    _bars(ax, rows, [labels.index(x) for x in rows["label"]], WITH)
    _task_axis(ax, labels)
    ax.set_xlabel("percentage points")


def _bars(ax: Axes, rows: pd.DataFrame, y: list[Any], init: str) -> None:
    tone = style.colour(init)
    value, low, high = (100 * rows[k].to_numpy(float) for k in ("value", "low", "high"))
    ax.hlines(y, low, high, color=tone, lw=1.6)
    ax.plot(value, y, style.mark(init), color=tone, ms=5, mec=style.PAPER, mew=0.5, ls="none")


def _task_axis(ax: Axes, labels: list[str]) -> None:
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel("percent")
    ax.grid(visible=True, axis="x")
