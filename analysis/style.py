"""One look for every figure: colours of the inits, fonts, ticks, labels at the end of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from harness.study.starting import label_of

INK, MUTED, RULE, PAPER = "#1c2024", "#66707b", "#d8dee4", "#fefefe"

# Okabe and Ito's set for colour-blind readers; marks differ too, for print in grey.
INIT_COLOURS = {"random": "#d55e00", "mae": "#0072b2"}
_MORE_COLOURS = ("#009e73", "#cc79a7", "#56b4e9")
INIT_MARKS = {"random": "s", "mae": "o"}
INIT_LABELS = {"random": "random init", "mae": "MAE init"}

# In the page these colours follow the reader's light or dark setting.
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    INIT_COLOURS["random"]: "var(--random)",
    INIT_COLOURS["mae"]: "var(--mae)",
}

# Ends a hair off the inits' colours: those follow the theme, a scale must not change in part.
GAIN_COLOURS = LinearSegmentedColormap.from_list(
    "gain", ["#d45e00", "#f3c9a5", "#f5f5f4", "#a6cde4", "#0072b1"]
)


def colour(init: str) -> str:
    """The colour of an init, the same everywhere."""
    if init in INIT_COLOURS:
        return INIT_COLOURS[init]
    return _MORE_COLOURS[sum(map(ord, init)) % len(_MORE_COLOURS)]


def mark(init: str) -> str:
    """The marker of an init."""
    return INIT_MARKS.get(init, "D")


def init_label(init: str) -> str:
    """Name of an init as shown."""
    return INIT_LABELS.get(init, f"{label_of(init)} init")


def settings() -> dict[str, Any]:
    """rcParams of all figures."""
    return {
        **sns.axes_style("ticks"),
        **sns.plotting_context("notebook", font_scale=0.92),
        # Never a font of this machine only: the glyphs are drawn as paths.
        "font.family": ["DejaVu Sans"],
        "svg.fonttype": "path",
        "svg.hashsalt": "analysis",
        "figure.facecolor": "white",
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "text.color": INK,
        # $ is legal in a study's own words and must not start a formula.
        "text.parse_math": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "hatch.color": MUTED,
        "hatch.linewidth": 0.7,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
    }


def apply() -> Any:
    """Context in which figures are drawn and saved."""
    rc: Any = settings()
    return mpl.rc_context(rc)


def short(number: float) -> str:
    """Three digits with k, M, B, T: 117456 -> '117k'."""
    for suffix, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor * 0.9995:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def log_x(ax: Axes, values: Sequence[float]) -> None:
    """Log x axis with ticks at the grid's own values, thinned until they do not touch."""
    ax.set_xscale("log")
    found = sorted({float(v) for v in values if v > 0})
    if not found:
        return
    span = math.log10(found[-1] / found[0]) or 1.0
    kept = [found[0]]
    for value in found[1:]:
        if math.log10(value / kept[-1]) >= 0.13 * span:
            kept.append(value)
    if kept[-1] != found[-1]:
        kept[-1] = found[-1]
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_major_formatter(FixedFormatter([short(v) for v in kept]))
    ax.xaxis.set_minor_locator(NullLocator())
    if len(found) > 1:
        margin = (found[-1] / found[0]) ** 0.06
        ax.set_xlim(found[0] / margin, found[-1] * margin)


def log_y(ax: Axes, values: np.ndarray) -> None:
    """Log y axis with round ticks, also when it spans less than a decade."""
    ax.set_yscale("log")
    good = values[np.isfinite(values) & (values > 0)]
    if not len(good):
        return
    low, high = float(good.min()), float(good.max())
    if high / low < 1.02:
        low, high = low * 0.97, high * 1.03
    margin = (high / low) ** 0.08
    low, high = low / margin, high * margin
    if high / low < 12:
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        ax.yaxis.set_major_locator(FixedLocator(list(ticks)))
        ax.yaxis.set_major_formatter(FixedFormatter([f"{t:.4g}" for t in ticks]))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        # Its own labels are formulas, which would be shown as their source: see settings().
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.set_ylim(low, high)


def end_labels(ax: Axes, labels: Sequence[tuple[float, str, str]], size: float = 9.5) -> None:
    """Writes (y, text, colour) right of the axes, moved apart, a thin leader to each line's end."""
    low, high = (ax.transData.transform((1, y))[1] for y in ax.get_ylim())
    shown = [
        ((ax.transData.transform((1, y))[1] - low) / ((high - low) or 1.0), text, tone)
        for y, text, tone in labels
        if np.isfinite(y)
    ]
    shown.sort(key=lambda item: item[0])
    assert ax.figure is not None
    step = 1.2 * size * ax.figure.dpi / 72 / (ax.get_window_extent().height or 1.0)
    heights = _spread([y for y, _, _ in shown], step)
    for (y, text, tone), at in zip(shown, heights, strict=True):
        ax.annotate(
            text,
            xy=(1.0, y),
            xytext=(1.055, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=tone,
            fontsize=size,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": tone,
                "lw": 0.7,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _spread(wanted: list[float], step: float) -> list[float]:
    """Ascending heights at least `step` apart, near the wanted ones, inside 0..1 if they fit."""
    # Groups of labels that touch move as one to the mean of what they want.
    groups: list[list[float]] = []
    for y in wanted:
        groups.append([y])
        while len(groups) > 1 and _bottom(groups[-1], step) < _top(groups[-2], step) + step:
            last = groups.pop()
            groups[-1] += last
    out = [_bottom(g, step) + i * step for g in groups for i in range(len(g))]
    if out and out[-1] > 1:
        for i in range(len(out) - 1, -1, -1):
            out[i] = min(out[i], 1 - (len(out) - 1 - i) * step)
    for i in range(len(out)):
        out[i] = max(out[i], i * step)
    return out


def _bottom(group: list[float], step: float) -> float:
    return sum(group) / len(group) - step * (len(group) - 1) / 2


def _top(group: list[float], step: float) -> float:
    return sum(group) / len(group) + step * (len(group) - 1) / 2


def note(ax: Axes, text: str) -> None:
    """A sentence where a figure would be."""
    ax.set_axis_off()
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED, wrap=True
    )
