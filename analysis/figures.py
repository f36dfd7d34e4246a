"""Figures of a report: transfer, gains, power laws."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from analysis import gain, style
from analysis.laws import AXIS_LABELS, Law
from analysis.load import StudyData, axis_label
from analysis.metrics import Metric
from analysis.panels import Figure, Panel

MAX_PANELS = 12
"""Panels of one figure; what is beyond is in the CSV files, and the caption says so."""

_MAX_SEEDS = 5
"""Points of single seeds."""
_LEAST_TEXT = 5.5
"""Points: numbers in a map that would be smaller are left to the tables."""


def slug(text: str) -> str:
    """A name that is safe as a file and an anchor."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).strip("-")


# -- transfer -------------------------------------------------------------------------------


def transfer(study: StudyData, metrics: list[Metric], variant: str, axis: str) -> Figure | None:
    """Each metric against model size or data size, both inits, a line per level of the other."""
    results = study.grid_results
    rows = results[(results["variant"] == variant) & np.isfinite(results["value"])]
    rows = rows[rows[axis].notna()]
    # All values of the axis, so that a line breaks where a cell has no number.
    ticks = sorted(results.loc[results["variant"] == variant, axis].unique())
    shown = [m for m in metrics if len(m.rows(rows))][:MAX_PANELS]
    if not shown or rows[axis].nunique() < 2:
        return None
    other = "data" if axis == "params" else "params"
    panels = tuple(_transfer_panel(m, m.rows(rows), axis, other, ticks) for m in shown)
    word = "pretraining images" if other == "data" else "model size"
    caption = (
        f"Dots: single seeds; lines: their mean, bars: smallest to largest seed. Stronger colour:"
        f" larger {word}, labelled at the end of its line. Unfinished cells are left out."
    )
    title = f"Transfer against {AXIS_LABELS[axis]}"
    return Figure(
        name=f"transfer-{axis}",
        title=title,
        caption=caption,
        panels=panels,
        inits=style.inits_of(rows),
    )


def _transfer_panel(
    metric: Metric, rows: pd.DataFrame, axis: str, other: str, ticks: list[float]
) -> Panel:
    levels = sorted(rows[other].unique())
    kept = style.some(levels, 4)

    def draw(ax: Axes) -> None:
        labels = []
        style.log_x(ax, ticks)
        for (level, init), family in rows.groupby([other, "init"], sort=True, observed=True):
            if level not in kept:
                continue
            tone, alpha = style.colour(str(init)), style.shade(levels, float(level))  # type: ignore[arg-type]
            by_x = family.groupby(axis)["value"].agg(["mean", "min", "max"]).reindex(ticks)
            ax.plot(by_x.index, by_x["mean"], color=tone, alpha=alpha, lw=1.6)
            ax.vlines(by_x.index, by_x["min"], by_x["max"], color=tone, alpha=alpha, lw=1.2)
            few = family[family.groupby(axis).cumcount() < _MAX_SEEDS]
            ax.plot(
                few[axis],
                few["value"],
                style.mark(str(init)),
                color=tone,
                alpha=alpha,
                ms=4.5,
                mec=style.PAPER,
                mew=0.5,
                ls="none",
            )
            name = axis_label(int(level)) if other == "data" else str(family["size"].iloc[0])  # type: ignore[arg-type]
            labels.append((float(by_x["mean"].dropna().iloc[-1]), name, tone))
        if metric.is_accuracy:
            ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
        else:
            style.log_y(ax, rows["value"].to_numpy(float))
        ax.set_xlabel(AXIS_LABELS[axis])
        style.end_labels(ax, labels, size=8.5)

    at = rows[rows[axis] == rows[axis].max()]
    best = ", ".join(
        f"{style.init_label(str(i))} {g['value'].mean():.3f}" for i, g in at.groupby("init")
    )
    alt = f"{metric.label} against {AXIS_LABELS[axis]}; mean at the largest: {best}."
    return Panel(title=metric.label, alt=alt, draw=draw)


# -- gains ----------------------------------------------------------------------------------


def gains(
    variant: str,
    metric: Metric,
    loss: Metric | None,
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    charged_runs: pd.DataFrame,
) -> Figure | None:
    """Heat maps over size x data: equal samples, and equal total FLOPs with MAE charged."""
    panels = []
    for judged in [metric, *([loss] if loss and loss.key != metric.key else [])]:
        rows = pairs[pairs["metric"] == judged.key]
        title = f"Equal samples: {judged.label}"
        panels.append(_heat_map(gain.by_point(rows), variant, title, judged.gain_scale))
    runs = charged_runs[charged_runs["metric"] == metric.key]
    if len(runs):
        # On the whole grid, so that it reads beside the other maps.
        whole = pairs[pairs["metric"] == metric.key].drop_duplicates(gain.POINT)[gain.POINT]
        points = whole.merge(gain.by_point(runs), "left", on=gain.POINT)
        panels.append(
            _heat_map(points, variant, f"Equal total FLOPs: {metric.label}", metric.gain_scale)
        )
    if len(charged):
        points = gain.by_point(charged)
        # Where nothing at all can be compared the text says so; a hatched map adds nothing.
        if points.loc[points["variant"] == variant, "mean"].notna().any():
            panels.append(_heat_map(points, variant, "Equal total FLOPs: WSP loss", 1.0))
        ratio = charged.assign(why=charged["why_ratio"])
        points = gain.by_point(ratio, "ratio")
        panels.append(
            _heat_map(points, variant, "FLOPs to random's final loss", 1.0, is_ratio=True)
        )
    panels = [p for p in panels if p is not None]
    if not panels:
        return None
    caption = (
        "Blue: MAE is better; orange: random is better. Equal WSP samples: MAE minus random (points"
        " of accuracy; nats of loss, turned so that plus is better). Equal total FLOPs: the MAE"
        " stage charged in full to each cell, WSP loss read off the MAE cell's curve where both"
        " have cost the same, before the end of its schedule, which speaks against MAE. Last map:"
        " FLOPs the MAE cell has spent, MAE stage included, when it stays at or below random's"
        " final loss, over random's; below 1 MAE is cheaper. Hatched:"
        " missing or not comparable, with the reason in the table of gains."
    )
    return Figure(
        name="gain", title="Gain of the MAE stage", caption=caption, panels=tuple(panels), columns=2
    )


def _heat_map(
    points: pd.DataFrame, variant: str, title: str, scale: float, is_ratio: bool = False
) -> Panel | None:
    points = points[points["variant"] == variant]
    if not len(points):
        return None
    sizes = points.sort_values("params")["size"].drop_duplicates().tolist()[::-1]
    table = points.pivot_table(
        index="size", columns="data", values="mean", sort=True, dropna=False, observed=False
    ).reindex(sizes)
    values = table.to_numpy(float) * scale
    # On a ratio, twice as dear and half as dear are equally far from even; less is better.
    tint = -np.log2(values) if is_ratio else values
    finite = tint[np.isfinite(tint)]
    # Never full colour for a trifle: at least 1 point, 0.02 nats, a tenth of a doubling.
    least = 0.1 if is_ratio else 1.0 if scale == 100 else 0.02
    reach = max(least, float(np.abs(finite).max()) if len(finite) else 0.0)
    digits = 2 if is_ratio else 1 if scale == 100 else 3

    height = max(2.3, min(9.0, 1.1 + 0.5 * len(sizes)))
    width = min(9.0, max(3.9, 1.4 + 0.68 * table.shape[1]))
    texts = [[f"{v:.2f}x" if is_ratio else f"{v:+.{digits}f}" for v in row] for row in values]
    longest = max(len(text) for row in texts for text in row)
    room = min((width - 1.2) / table.shape[1] * 110 / longest, (height - 1.0) / len(sizes) * 36)

    def draw(ax: Axes) -> None:
        ax.grid(False)
        for (i, j), value in np.ndenumerate(tint):
            if not math.isfinite(value):
                box = Rectangle((j, i), 1, 1, fill=False, hatch="////", ec=style.RULE, lw=0)
                ax.add_patch(box)
                continue
            # Gaps instead of white lines: the paper may be dark.
            shade = style.GAIN_COLOURS((value / reach + 1) / 2)
            ax.add_patch(Rectangle((j + 0.015, i + 0.02), 0.97, 0.96, fc=shade, lw=0))
            if room < _LEAST_TEXT:
                continue
            # Black and white, not ink: the cell keeps its colour in the dark.
            tone = "#ffffff" if abs(value) > 0.72 * reach else "#111111"
            where = {"ha": "center", "va": "center", "fontsize": min(10.0, room)}
            ax.text(j + 0.5, i + 0.5, texts[i][j], color=tone, **where)
        rows, columns = tint.shape
        ax.set_xlim(0, columns)
        ax.set_ylim(rows, 0)
        step = -(-columns // 12)
        ax.set_xticks(
            np.arange(0, columns, step) + 0.5, [axis_label(int(d)) for d in table.columns[::step]]
        )
        ax.set_yticks(np.arange(rows) + 0.5, [str(s) for s in table.index])
        ax.set_xlabel("pretraining images")
        ax.set_ylabel("model size")
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)

    cells = [
        f"{s} {axis_label(int(d))}: {'none' if math.isnan(v) else f'{v:.{digits}f}'}"
        for s, row in zip(table.index, values, strict=True)
        for d, v in zip(table.columns, row, strict=True)
    ]
    alt = f"{title}, by model size and pretraining images. {'; '.join(cells[:40])}."
    return Panel(title=title, alt=alt, draw=draw, width=width, height=height)


# -- power laws -----------------------------------------------------------------------------


def power_laws(laws: list[Law], variant: str, shown: list[Metric]) -> Figure | None:
    """Fitted laws with bootstrap bands and the held-out point, a panel per metric and axis."""
    panels = []
    for metric in shown:
        for axis in ("params", "data"):
            own = [
                w
                for w in laws
                if w.variant == variant and w.metric.key == metric.key and w.axis == axis
            ]
            if any(len(w.x) for w in own):
                panels.append(_law_panel(own))
    if not panels:
        return None
    caption = (
        "y = a x^-b + c, log axes. Solid: fit to all points, with its 95 % bootstrap band over"
        " runs. Dashed: fit without the largest x, ending in its prediction (cross) of the held-out"
        " points (ringed). No line: the fit was refused, with the reason in the table of fits."
    )
    return Figure(
        name="power-laws",
        title="Power laws",
        caption=caption,
        panels=tuple(panels[:MAX_PANELS]),
        columns=2,
        inits=style.ordered(w.init for w in laws),
    )


def _law_panel(laws: list[Law]) -> Panel:
    first = laws[0]
    xs = np.concatenate([w.x for w in laws])
    ys = np.concatenate([w.y for w in laws])

    def draw(ax: Axes) -> None:
        style.log_x(ax, list(xs))
        style.log_y(ax, ys)
        labels = []
        for law in laws:
            if len(law.x):
                _draw_law(ax, law)
                mean = float(np.exp(np.log(law.y[law.x == law.x.max()]).mean()))
                labels.append((mean, style.short_label(law.init), style.colour(law.init)))
        ax.set_xlabel(f"{AXIS_LABELS[first.axis]} ({first.fixed})")
        style.end_labels(ax, labels)

    alt = (
        f"{first.metric.error_label} against {AXIS_LABELS[first.axis]}, {first.fixed}. "
        + " ".join(f"{style.init_label(w.init)}: {_law_words(w)}." for w in laws)
    )
    return Panel(title=first.metric.error_label, alt=alt, draw=draw, width=4.2, height=3.2)


def _draw_law(ax: Axes, law: Law) -> None:
    tone = style.colour(law.init)
    line = np.geomspace(law.x.min(), law.x.max(), 80)
    if law.fit.params:
        band = law.fit.band({"x": line})
        if band is not None:
            ax.fill_between(line, *band, color=tone, alpha=0.16, lw=0)
        ax.plot(line, law.fit.predict({"x": line}), color=tone)
    held = law.held_out
    if "predicted" in held:
        p = held["params"]
        ax.plot(line, p["c"] + p["a"] * line ** -p["b"], color=tone, ls=(0, (4, 3)), lw=1.2)
        ax.plot(held["x"], held["predicted"], "x", color=tone, ms=8, mew=2)
        out = law.x > 0.5 * held["x"]
        ax.plot(law.x[out], law.y[out], "o", mfc="none", mec=tone, ms=10, mew=1.0, ls="none")
    mark = style.mark(law.init)
    ax.plot(law.x, law.y, mark, color=tone, ms=5, mec=style.PAPER, mew=0.5, ls="none")


def _law_words(law: Law) -> str:
    if not law.fit.params:
        return f"fit refused, {law.fit.reason}"
    p = law.fit.params
    return f"a {p['a']:.3g}, b {p['b']:.3g}, c {p['c']:.3g}, {law.fit.status}"
