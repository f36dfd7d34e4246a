"""Figures as lists of panels: a panel draws itself on any axes, and says in words what it shows.

Panels and not whole figures, so that the page can lay them out for a phone or a wide screen.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MplFigure
from matplotlib.lines import Line2D

from analysis import style


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing; `alt` says what it shows to those who cannot see it."""

    title: str
    alt: str
    draw: Callable[[Axes], None]
    width: float = 4.3
    height: float = 3.3


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that belong together. `name` is its file name and anchor."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 4
    inits: tuple[str, ...] = ()
    """Inits whose colours need a legend."""


def _draw(panel: Panel, ax: Axes) -> None:
    ax.set_title(textwrap.fill(panel.title, round(9.2 * panel.width)))
    panel.draw(ax)


def panel_svg(panel: Panel, prefix: str) -> str:
    """Inline SVG for the page: scalable, ids of its own, colours that follow the theme."""
    with style.apply():
        drawing = plt.figure(figsize=(panel.width, panel.height))
        _draw(panel, drawing.add_subplot())
        text = _svg(drawing, transparent=True)
    return _inline(text, prefix, panel.alt)


def save(figure: Figure, folder: Path) -> list[Path]:
    """Writes name.svg and name.png with all panels."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = min(figure.columns, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    width = max(p.width for p in figure.panels)
    height = max(p.height for p in figure.panels)
    with style.apply():
        drawing = plt.figure(figsize=(columns * width, rows * height))
        axes = drawing.subplots(rows, columns, squeeze=False).ravel()
        for panel, ax in zip(figure.panels, axes, strict=False):
            _draw(panel, ax)
        for ax in axes[len(figure.panels) :]:
            ax.set_axis_off()
        handles = [
            Line2D([], [], color=style.colour(i), marker=style.mark(i), label=style.init_label(i))
            for i in figure.inits
        ]
        if handles:
            drawing.legend(
                handles=handles, loc="outside upper left", ncols=len(handles), frameon=False
            )
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        drawing.savefig(png)
        # The layout is the slow part and would be the same again.
        drawing.set_layout_engine("none")
        svg.write_text(_svg(drawing, transparent=False), encoding="utf-8")
    return [svg, png]


def _svg(drawing: MplFigure, transparent: bool) -> str:
    buffer = io.StringIO()
    # No date: the same data give the same bytes.
    drawing.savefig(
        buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None}
    )
    plt.close(drawing)
    return buffer.getvalue()


def _inline(text: str, prefix: str, alt: str) -> str:
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = body.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for colour, variable in style.CSS_COLOURS.items():
        body = body.replace(colour, variable)
    # The namespace is needless inside HTML, and a page without addresses is easy to check.
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]*)"', body)
    body = re.sub(r"<svg[^>]*>", "", body, count=1)
    escaped = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    frame = box[1] if box else "0 0 300 220"
    return f'<svg role="img" aria-label="{escaped}" viewBox="{frame}">{body}'
