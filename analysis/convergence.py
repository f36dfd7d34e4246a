"""The figure of convergence: held-out WSP loss against images seen, a panel per data size."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.curves import wsp_curves
from analysis.figures import MAX_PANELS
from analysis.forms import Array
from analysis.load import StudyData, axis_label
from analysis.panels import Figure, Panel

_MAX_LINES = 6
_MAX_SEEDS = 5
_MAX_POINTS = 120
"""Of a panel: model sizes, thin lines of each, points of a line."""
_FACTS = ["cell", "size", "params", "data", "init", "seed", "variant"]

Line = tuple[Array, Array]
"""Images seen and loss, ascending."""


def convergence(study: StudyData, variant: str) -> Figure | None:
    """Of the study's finished runs; None if there are none."""
    rows = wsp_curves(study)
    if not len(rows):
        return None
    # A row per run, with its place among the rows: they are millions, those of a cell together.
    starts = np.flatnonzero(np.diff(rows["cell"].cat.codes.to_numpy(), prepend=-1))
    runs = rows[_FACTS].iloc[starts].assign(start=starts, end=np.append(starts[1:], len(rows)))
    x, y = rows["samples"].to_numpy(float), rows["val_loss"].to_numpy(float)
    runs = runs[(runs["variant"] == variant) & (x[runs["end"] - 1] > 0)]
    if not len(runs):
        return None
    levels = style.some(runs["data"].unique(), MAX_PANELS)
    sizes = style.some(runs["params"].unique(), _MAX_LINES)
    panels = tuple(
        _panel(runs[(runs["data"] == d) & runs["params"].isin(sizes)], d, x, y) for d in levels
    )
    caption = (
        "Held-out WSP loss over the images seen in WSP, for finished runs, log axes; each panel has"
        " its own scale. Thick lines: mean over seeds; thin lines: single seeds; stronger colour:"
        " larger model. The MAE stage comes before sample 0 of the MAE runs; its cost is charged in"
        " the figure of gains."
    )
    left = [(runs["data"].nunique() - len(levels), "data sizes")]
    left += [(runs["params"].nunique() - len(sizes), "model sizes")]
    hidden = " and ".join(f"{number} {word}" for number, word in left if number)
    if hidden:
        caption += f" {hidden} are in the curves files only."
    most = runs.groupby(["params", "data", "init"], observed=True)["seed"].nunique().max()
    if most > _MAX_SEEDS:
        caption += f" Single seeds: {_MAX_SEEDS} of {most}."
    return Figure(
        name="convergence",
        title="Convergence",
        caption=caption,
        panels=panels,
        inits=style.inits_of(runs),
    )


def _panel(runs: pd.DataFrame, data: float, x: Array, y: Array) -> Panel:
    ends = runs.assign(loss=y[runs["end"].to_numpy() - 1])
    shown = "; ".join(
        f"{style.init_label(str(i))} {g['loss'].min():.3f} to {g['loss'].max():.3f}"
        for i, g in ends.groupby("init", observed=True)
    )
    title = f"{axis_label(int(data))} images"
    alt = f"WSP validation loss against images seen, {title}. Final loss over sizes: {shown}."
    draw = partial(_draw, runs, x, y)
    return Panel(title=title, alt=alt, draw=draw, width=4.2, height=3.3)


def _draw(runs: pd.DataFrame, x: Array, y: Array, ax: Axes) -> None:
    params, labels, seen = sorted(runs["params"].unique()), [], []
    for (p, init), family in runs.groupby(["params", "init"], sort=True, observed=True):
        tone, alpha = style.colour(str(init)), style.shade(params, float(p))  # type: ignore[arg-type]
        lines = [
            # Sample 0 has no place on a log axis.
            (x[a:b][x[a:b] > 0], y[a:b][x[a:b] > 0])
            for a, b in zip(family["start"], family["end"], strict=True)
        ]
        seen += lines
        for line in lines[:_MAX_SEEDS] if len(lines) > 1 else []:
            ax.plot(*_thinned(line), color=tone, alpha=alpha * 0.45, lw=0.6)
        mean = _mean(lines)
        if len(mean[0]):
            ax.plot(*_thinned(mean), color=tone, alpha=alpha)
            name = f"{family['size'].iloc[0]} {style.short_label(str(init))}"
            labels.append((float(mean[1][-1]), name, tone))
    style.log_x_span(ax, np.concatenate([line[0] for line in seen]))
    style.log_y(ax, np.concatenate([line[1] for line in seen]))
    ax.set_xlabel("images seen in WSP")
    ax.set_ylabel("validation loss")
    style.end_labels(ax, labels, size=8.5)


def _mean(lines: list[Line]) -> Line:
    """Mean loss where all of the lines have a point."""
    x = lines[0][0]
    if all(np.array_equal(x, other) for other, _ in lines[1:]):
        return x, np.mean([y for _, y in lines], axis=0)
    points, place, counts = np.unique(
        np.concatenate([line[0] for line in lines]), return_inverse=True, return_counts=True
    )
    sums = np.bincount(place, weights=np.concatenate([line[1] for line in lines]))
    common = counts == len(lines)
    return points[common], sums[common] / len(lines)


def _thinned(line: Line) -> Line:
    """At most `_MAX_POINTS` points, evenly spread on the log axis, the ends among them."""
    x, y = line
    if len(x) <= _MAX_POINTS:
        return line
    wanted = np.geomspace(max(x[0], x[-1] * 1e-6), x[-1], _MAX_POINTS)
    places = np.unique(np.clip(np.searchsorted(x, wanted), 0, len(x) - 1))
    places = np.union1d(places, [0, len(x) - 1])
    return x[places], y[places]
