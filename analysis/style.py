"""One look for every figure: colours of the inits, fonts, ticks, labels at the end of lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from harness.study.starting import label_of

INK, MUTED, RULE, PAPER = "#1c2024", "#66707b", "#d8dee4", "#fefefe"
PNG_DPI = 150

# Okabe and Ito's set for colour-blind readers; marks differ too, for print in grey.
INIT_COLOURS = {"random": "#c25200", "mae": "#0072b2"}
INIT_MARKS = {"random": "s", "mae": "o"}
INIT_LABELS = {"random": "random init", "mae": "MAE init"}
_ORDER = ("mae", "random")
_MORE = (("#00795a", "D"), ("#a8457f", "^"), ("#6a51a3", "v"), ("#7a5c00", "P"), ("#4a6274", "X"))
"""Colours and marks of further inits, in the order in which `introduce` meets them."""

_GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖"}

_others: dict[str, int] = {}

# In the page these colours follow the reader's light or dark setting: name -> (light, dark).
THEMED = {
    "ink": (INK, "#e6eaee"),
    "muted": (MUTED, "#9aa5b0"),
    "rule": (RULE, "#343c45"),
    "paper": (PAPER, "#14181c"),
    "random": (INIT_COLOURS["random"], "#f08c3c"),
    "mae": (INIT_COLOURS["mae"], "#56b4e9"),
    **{
        f"init{i}": (colour, dark)
        for i, ((colour, _), dark) in enumerate(
            zip(_MORE, ("#3fc59b", "#e58fc0", "#b3a0e8", "#d6b34a", "#9fb6c6"), strict=True)
        )
    },
}
CSS_COLOURS = {light: f"var(--{name})" for name, (light, _) in THEMED.items()}

# Ends a hair off the inits' colours: those follow the theme, a scale must not change in part.
GAIN_COLOURS = LinearSegmentedColormap.from_list(
    "gain", ["#c25201", "#f3c9a5", "#f5f5f4", "#a6cde4", "#0072b1"]
)


def introduce(inits: Iterable[str]) -> None:
    """Gives each init of a study a colour and mark of its own, the same in all its figures.

    Colours of all but random and MAE go by the order of the names; a sixth repeats the first.
    """
    _others.clear()
    for init in sorted({*inits} - {*INIT_COLOURS}):
        _others[init] = len(_others) % len(_MORE)


def colour(init: str) -> str:
    """The colour of an init, the same everywhere."""
    return INIT_COLOURS.get(init) or _MORE[_others.get(init, 0)][0]


def css_colour(init: str) -> str:
    """The same, following the page's theme."""
    return CSS_COLOURS[colour(init)]


def mark(init: str) -> str:
    """The marker of an init."""
    return INIT_MARKS.get(init) or _MORE[_others.get(init, 0)][1]


def glyph(init: str) -> str:
    """The marker as a character, for a legend in text."""
    return _GLYPHS[mark(init)]


def ordered(inits: Iterable[str]) -> tuple[str, ...]:
    """Inits as legends and columns list them: MAE, random, then the others by name."""
    found = {*inits}
    return (*(i for i in _ORDER if i in found), *sorted(found - {*_ORDER}))


def short_label(init: str) -> str:
    """Name of an init at the end of a line."""
    return "MAE" if init == "mae" else label_of(init)


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
        "figure.dpi": 100,
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


def some(values: Iterable[float], num: int) -> list[float]:
    """At most `num` of the values, evenly spread, the first and the last among them."""
    found = sorted(set(values))
    if len(found) <= num:
        return found
    return [found[round(i * (len(found) - 1) / (num - 1))] for i in range(num)]


def inits_of(rows: pd.DataFrame) -> tuple[str, ...]:
    """Inits of the rows, in the order of every legend."""
    return ordered(map(str, rows["init"].unique()))


def shade(values: list[float], value: float) -> float:
    """Opacity of a line: the larger the level, the stronger."""
    if len(values) < 2:
        return 1.0
    return 0.42 + 0.58 * values.index(value) / (len(values) - 1)


def log_x_span(ax: Axes, values: np.ndarray) -> None:
    """Log x axis from the smallest to the largest value, round ticks that do not touch."""
    ax.set_xscale("log")
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low / 1.5, high * 1.5
    ax.set_xlim(low, high)
    ticks = _log_ticks(low, high) or [
        10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    ]
    kept: list[float] = []
    for tick in ticks:
        if not kept or math.log(tick / kept[-1]) >= 0.11 * math.log(high / low):
            kept.append(tick)
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_major_formatter(FixedFormatter([short(t) for t in kept]))
    ax.xaxis.set_minor_locator(NullLocator())


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
    ax.set_ylim(low, high)
    ticks = _log_ticks(low, high)
    if ticks:
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_major_formatter(FixedFormatter([f"{t:.4g}" for t in ticks]))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        # Its own labels are formulas, which would be shown as their source: see settings().
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _log_ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers between the ends, evenly spread to the eye where they can be."""
    if high / low > 1e4:
        return []  # whole decades, which are matplotlib's own choice
    decades = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [s * d for d in decades for s in steps if low <= s * d <= high]
        if len(ticks) >= 4 and high / low > 2.5:
            return ticks
    for most in range(5, 10):
        ticks = [
            float(t) for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 4:
            break
    return ticks


def end_labels(ax: Axes, labels: Sequence[tuple[float, str, str]], size: float = 9.0) -> None:
    """Writes (y, text, colour) right of the axes, moved apart, a thin leader to each line's end."""
    low, high = (ax.transData.transform((1, y))[1] for y in ax.get_ylim())
    shown = [
        ((ax.transData.transform((1, y))[1] - low) / ((high - low) or 1.0), text, tone)
        for y, text, tone in labels
        if np.isfinite(y)
    ]
    shown.sort(key=lambda item: item[0])
    assert ax.figure is not None
    step = 1.25 * size * ax.figure.dpi / 72 / (ax.get_window_extent().height or 1.0)
    heights = _spread([y for y, _, _ in shown], step)
    across = ax.transAxes
    for (y, text, tone), at in zip(shown, heights, strict=True):
        # An artist and not a plotted line, which would stretch the axes.
        ends = ((1.0, 1.045), (y, at))
        ax.add_artist(Line2D(*ends, color=tone, lw=0.7, alpha=0.6, transform=across, clip_on=False))
        ax.text(1.055, at, text, color=tone, fontsize=size, va="center", transform=across)


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
