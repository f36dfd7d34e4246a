"""Figures of compute-optimal training: valleys of equal compute, envelope of curves, N* and D*."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from analysis import style
from analysis.frontier import Frontier
from analysis.optimum import Array, OptimumFit
from analysis.panels import Figure, Panel

# Not the inits' colours: an approach is none of them.
COLOURS = {"envelope": "#009e73", "isoflop": "#cc79a7", "surface": "#56b4e9"}
MARKS = {"envelope": "^", "isoflop": "D", "surface": "o"}
NAMES = {
    "envelope": "1 envelope",
    "isoflop": "2 isoFLOP",
    "surface": "3 surface",
}
MAX_LABELS = 7
MAX_CURVES = 400
Fits = Mapping[str, OptimumFit | Frontier]


def isoflop_valleys(
    fit: OptimumFit, n: Array, loss: Array, *, cost_label: str = "FLOPs"
) -> Figure | None:
    """Losses of each class over N with its parabola and minimum; n and loss as given to the fit."""
    if not fit.points:
        return None
    size, height = np.asarray(n, dtype=float), np.asarray(loss, dtype=float)
    classes = sorted(fit.points, key=lambda p: p["c"])
    rows = np.concatenate([p["rows"] for p in classes])
    labelled = _spread([p["c"] for p in classes])

    def draw(ax: Axes) -> None:
        _log_axis(ax, "x", size[rows])
        style.log_y(ax, height[rows])
        for i, one in enumerate(classes):
            shade = 0.35 + 0.65 * (i + 1) / len(classes)
            at = np.asarray(one["rows"])
            tone = COLOURS["isoflop"] if one["used"] else style.MUTED
            fill = tone if one["used"] else "none"
            ax.plot(size[at], height[at], "o", color=tone, mfc=fill, ms=4, alpha=shade, ls="none")
            last = int(at[size[at].argmax()])
            end = height[last]
            if one["used"]:
                line = np.geomspace(one["n_range"][0], one["n_range"][1], 80)
                powers = (np.log(line) - one["parabola"]["centre"])[:, None] ** np.arange(3)
                curve = powers @ one["parabola"]["coefficients"]
                ax.plot(line, curve, color=tone, alpha=shade, lw=1.5)
                ax.plot(one["n"], one["loss"], "D", color=style.INK, ms=5, mec=style.PAPER)
                end = curve[-1]
            if i in labelled:
                _at_end(ax, size[last], end, _power(one["c"]), tone)
        ax.set_xlabel("model parameters N")
        ax.set_ylabel("loss")

    used = [p for p in classes if p["used"]]
    minima = "; ".join(f"C {p['c']:.3g}: N* {p['n']:.3g}, loss {p['loss']:.4g}" for p in used)
    alt = f"Loss against parameters, a valley per compute. Minima: {minima or 'none'}."
    caption = (
        f"Rows of equal compute ({cost_label}, at the right end of each valley), least-squares"
        " parabolas of the loss in ln N, and their minima (diamonds). Stronger colour: more"
        " compute. Hollow grey: no minimum inside the N sampled, not used."
    )
    panel = Panel(title="Valleys of equal compute", alt=alt, draw=draw, width=6.0, height=4.4)
    return Figure(
        name="isoflop",
        title="Compute-optimal size, approach 2",
        caption=caption,
        panels=(panel,),
        columns=1,
    )


def envelope_curves(
    fit: OptimumFit,
    n: Array,
    loss: Array,
    c: Array,
    runs: Sequence[Any] | None = None,
    *,
    cost_label: str = "FLOPs",
) -> Figure | None:
    """Every run's loss over compute with the envelope; columns as given to the fit."""
    if not fit.points:
        return None
    size, height, cost = (np.asarray(v, dtype=float) for v in (n, loss, c))
    good = np.isfinite(height) & np.isfinite(cost) & (height > 0) & (cost > 0)
    names = range(len(size)) if runs is None else runs
    places: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        if good[i]:
            places.setdefault(name, []).append(i)
    curves = sorted((sorted(p, key=lambda i: cost[i]) for p in places.values()), key=len)
    shown = sorted(curves[-MAX_CURVES:], key=lambda p: size[p[0]])
    labelled = _spread([size[p[0]] for p in shown])

    def draw(ax: Axes) -> None:
        _log_axis(ax, "x", cost[good])
        style.log_y(ax, height[good])
        for i, place in enumerate(shown):
            shade = 0.25 + 0.55 * (i + 1) / len(shown)
            mark = "." if len(place) == 1 else ""
            ax.plot(cost[place], height[place], marker=mark, color=style.MUTED, alpha=shade, lw=0.8)
            if i in labelled and runs is not None:
                text = style.short(size[place[0]])
                _at_end(ax, cost[place[-1]], height[place[-1]], text, style.MUTED)
        tone = COLOURS["envelope"]
        for used, fill in ((False, "none"), (True, tone)):
            some = [p for p in fit.points if p["used"] is used]
            x, y = [p["c"] for p in some], [p["loss"] for p in some]
            ax.plot(x, y, "o", color=tone, mfc=fill, ms=4, ls="none")
        if fit.params and fit.c_range:
            line = np.geomspace(*fit.c_range, 60)
            ax.plot(line, fit.predict(line, "loss"), color=style.INK, lw=1.4, ls=(0, (4, 3)))
        ax.set_xlabel(f"compute C ({cost_label})")
        ax.set_ylabel("loss")

    law = f"loss {fit.params['K']:.3g} C^-{fit.params['gamma']:.3g}" if fit.params else fit.reason
    alt = (
        f"Loss against compute of {len(curves)} runs with {len(fit.points)} points on their"
        f" envelope, {sum(p['used'] for p in fit.points)} of them optima: {law}."
    )
    caption = (
        "Grey: runs, labelled with some of their sizes. Filled: points of the envelope whose size"
        " was beaten from both sides, which carry the laws; hollow: on the envelope for want of a"
        " smaller or larger model, or of a longer run. Dashed: the power law through the optima."
    )
    if len(curves) > MAX_CURVES:
        caption += f" {MAX_CURVES} of {len(curves)} runs are drawn."
    panel = Panel(title="Envelope of the curves", alt=alt, draw=draw, width=6.0, height=4.4)
    return Figure(
        name="envelope",
        title="Compute-optimal size, approach 1",
        caption=caption,
        panels=(panel,),
        columns=1,
    )


def frontiers(fits: Fits, *, cost_label: str = "FLOPs") -> Figure | None:
    """N*(C) and D*(C) of all approaches with 95 % bands; names of `fits` as in `COLOURS`."""
    shown = {name: fit for name, fit in fits.items() if fit.params}
    if not shown:
        return None
    panels = tuple(_frontier_panel(shown, what, cost_label) for what in ("n", "d"))
    caption = (
        "Lines: power laws of each approach over the compute its optima span, with 95 % bootstrap"
        " bands; marks: the optima themselves. N* = G C^a, D* = H C^b."
    )
    without = [f"{NAMES.get(n, n)} ({f.reason})" for n, f in fits.items() if not f.params]
    if without:
        caption += f" Without a law: {'; '.join(without)}."
    return Figure(
        name="frontier",
        title="Compute-optimal frontier",
        caption=caption,
        panels=panels,
        columns=2,
    )


def _frontier_panel(fits: Fits, what: Literal["n", "d"], cost_label: str) -> Panel:
    title = {"n": "Optimal parameters N*", "d": "Optimal samples D*"}[what]
    power = {"n": "a", "d": "b"}[what]
    lines = {name: _line(fit, what) for name, fit in fits.items()}

    def draw(ax: Axes) -> None:
        _log_axis(ax, "x", np.concatenate([c for c, _, _ in lines.values()]))
        _log_axis(
            ax,
            "y",
            np.concatenate([v for _, y, band in lines.values() for v in (y, *(band or ()))]),
        )
        labels = []
        for name, (c, y, band) in lines.items():
            tone = COLOURS.get(name, style.MUTED)
            if band:
                ax.fill_between(c, *band, color=tone, alpha=0.16, lw=0)
            ax.plot(c, y, color=tone)
            fit = fits[name]
            if isinstance(fit, OptimumFit):
                ax.plot(
                    *_marks(fit, what),
                    MARKS.get(name, "o"),
                    color=tone,
                    ms=4,
                    mec=style.PAPER,
                    mew=0.5,
                    ls="none",
                )
            text = f"{NAMES.get(name, name)}, {power} {fit.params[power]:.2f}"
            labels.append((float(y[-1]), text, tone))
        ax.set_xlabel(f"compute C ({cost_label})")
        style.end_labels(ax, labels, size=8.5)

    words = []
    for name, fit in fits.items():
        low, high = fit.ci95.get(power, (math.nan, math.nan))
        interval = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
        words.append(f"{NAMES.get(name, name)}: {power} {fit.params[power]:.3f}{interval}")
    alt = f"{title} against compute. {'; '.join(words)}."
    return Panel(title=title, alt=alt, draw=draw, width=5.3, height=3.8)


def _line(
    fit: OptimumFit | Frontier, what: Literal["n", "d"]
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """C ascending, N* or D*, and the two ends of its band where there is an interval."""
    if isinstance(fit, Frontier):
        order = np.argsort(fit.c)
        band = fit.bands.get(what)
        ends = None if band is None else (band[0][order], band[1][order])
        return fit.c[order], getattr(fit, what)[order], ends
    assert fit.c_range is not None
    c = np.geomspace(*fit.c_range, 60)
    return c, fit.predict(c, what), fit.band(c, what)


def _marks(fit: OptimumFit, what: Literal["n", "d"]) -> tuple[Array, Array]:
    """The optima; on an envelope the geometric mean of each size's, which is what counts."""
    used = [p for p in fit.points if p["used"]]
    x, y = (np.log([p[key] for p in used]) for key in ("c", what))
    if fit.law == "envelope" and fit.settings["points"] == "interior":
        _, size = np.unique([p["n"] for p in used], return_inverse=True)
        x, y = (np.bincount(size, v) / np.bincount(size) for v in (x, y))
    return np.exp(x), np.exp(y)


# -- axes and labels ------------------------------------------------------------------------


def _power(value: float) -> str:
    """'3e18': short, and the same for FLOPs and GPU-hours."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if abs(int(exponent)) > 3 else f"{value:.3g}"


def _log_axis(ax: Axes, side: Literal["x", "y"], values: Array) -> None:
    """Log axis with ticks at powers of ten, or at 1, 2 and 5 where it spans few."""
    low, high = float(values.min()), float(values.max())
    margin = max((high / low) ** 0.05, 1.02)
    low, high = low / margin, high * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**k for k in decades if low <= 10.0**k <= high]
    if len(whole) < 3:
        whole = [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    ticks = whole[:: -(-len(whole) // 6)] if whole else [low, high]
    if side == "x":
        ax.set_xscale("log")
        ax.set_xlim(low, high)
    else:
        ax.set_yscale("log")
        ax.set_ylim(low, high)
    axis = ax.xaxis if side == "x" else ax.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    names = [_power(t) if t >= 1e12 else style.short(t) for t in ticks]
    axis.set_major_formatter(FixedFormatter(names))
    axis.set_minor_locator(NullLocator())


def _spread(values: Sequence[float]) -> set[int]:
    """Places of at most `MAX_LABELS` lines to label, the first and the last among them."""
    num = len(values)
    few = min(num, MAX_LABELS)
    return {round(i * (num - 1) / max(few - 1, 1)) for i in range(few)}


def _at_end(ax: Axes, x: float, y: float, text: str, tone: str) -> None:
    ax.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        color=tone,
        fontsize=8.5,
        va="center",
        annotation_clip=False,
        path_effects=[withStroke(linewidth=2.5, foreground=style.PAPER)],
    )
