"""Figures as lists of panels: a panel draws itself on any axes, and says in words what it shows.

Panels and not whole figures, so that the page can lay them out for a phone or a wide screen. Each
is drawn once; the page, name.svg and name.png are put together from the same drawings.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MplFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from PIL import Image

from analysis import beside, style
from harness.ledger.files import write_bytes

_POINTS = 72.0
_PAD = 0.06
"""Inches left free around a panel."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing; `alt` says what it shows to those who cannot see it. Sizes in inches."""

    title: str
    alt: str
    draw: Callable[[Axes], None]
    width: float = 3.9
    height: float = 3.1


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


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A panel, drawn: SVG text with its size in points, and pixels [H, W, 4]."""

    svg: str
    width: float
    height: float
    pixels: np.ndarray
    alt: str = ""


def render(figure: Figure) -> tuple[Drawing, ...]:
    """Draws every panel of one figure, here and now."""
    return tuple(map(_render, figure.panels))


@contextlib.contextmanager
def renderer(figures: Sequence[Figure]) -> Iterator[Callable[[], dict[str, tuple[Drawing, ...]]]]:
    """A function that draws every panel of the figures, by figure name.

    Many panels are drawn by processes, forked where this is entered: what draws is a closure, which
    a fork has and a pickle cannot. Start threads after that, not before.
    """
    panels = [panel for figure in figures for panel in figure.panels]
    draw = [partial(_render, panel) for panel in panels]
    with beside.forked(draw, worth_it=_WORTH_FORKING, chunk=2) as run:
        yield lambda: _sorted_in(figures, run())


_WORTH_FORKING = 6


def _sorted_in(
    figures: Sequence[Figure], drawings: Iterable[Drawing]
) -> dict[str, tuple[Drawing, ...]]:
    rest = iter(drawings)
    return {figure.name: tuple(next(rest) for _ in figure.panels) for figure in figures}


def _render(panel: Panel) -> Drawing:
    with style.apply():
        drawing = MplFigure(figsize=(panel.width, panel.height))
        canvas = FigureCanvasAgg(drawing)
        ax = drawing.add_subplot()
        drawing.subplots_adjust(left=0.16, right=0.84, bottom=0.17, top=0.88)
        ax.set_title(textwrap.fill(panel.title, round(9.6 * panel.width)))
        panel.draw(ax)
        _fill(drawing, ax, canvas)
        return _finish(drawing, canvas, panel.alt)


def _fill(drawing: MplFigure, ax: Axes, canvas: FigureCanvasAgg) -> None:
    """Moves the axes so that all that belongs to them just fits.

    One measurement; matplotlib's constrained layout takes several and was most of a report's time.
    """
    around = ax.get_tightbbox(canvas.get_renderer())
    if around is None:
        return
    width, height = drawing.get_size_inches() * drawing.dpi
    box, pad = ax.get_position(), _PAD * drawing.dpi
    left = box.x0 - (around.x0 - pad) / width
    right = box.x1 + (width - pad - around.x1) / width
    bottom = box.y0 - (around.y0 - pad) / height
    top = box.y1 + (height - pad - around.y1) / height
    if right - left > 0.2 and top - bottom > 0.2:
        # In larger axes other ticks may be chosen, with labels wider than those that were measured.
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator(list(axis.get_majorticklocs())))
        drawing.subplots_adjust(left=left, right=right, bottom=bottom, top=top)


def _finish(drawing: MplFigure, canvas: FigureCanvasAgg, alt: str = "") -> Drawing:
    drawing.set_dpi(style.PNG_DPI)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).copy()
    buffer = io.StringIO()
    # No date: the same data give the same bytes.
    about = {"Date": None, "Creator": None, "Format": None, "Type": None}
    drawing.savefig(buffer, format="svg", transparent=True, metadata=about)
    width, height = drawing.get_size_inches() * _POINTS
    svg = _body(buffer.getvalue())
    return Drawing(svg=svg, width=width, height=height, pixels=pixels, alt=alt)


def _body(text: str) -> str:
    """What is inside the outermost element, without comments: those repeat text from files."""
    body = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"^<svg[^>]*>", "", body, count=1)
    return body[: body.rindex("</svg>")].strip()


def _own_ids(body: str, prefix: str) -> str:
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    return body.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")


def panel_svg(drawing: Drawing, prefix: str) -> str:
    """Inline SVG for the page: scalable, ids of its own, colours that follow the theme."""
    body = _own_ids(drawing.svg, prefix)
    for colour, variable in style.CSS_COLOURS.items():
        body = body.replace(colour, variable)
    # The namespace is needless inside HTML, and a page without addresses is easy to check.
    body = body.replace("xlink:href", "href")
    escaped = drawing.alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    frame = f"0 0 {drawing.width:g} {drawing.height:g}"
    return f'<svg role="img" aria-label="{escaped}" viewBox="{frame}">{body}</svg>'


# -- files ----------------------------------------------------------------------------------


def save(figure: Figure, drawings: tuple[Drawing, ...], folder: Path) -> list[Path]:
    """Writes name.svg and name.png with all panels and the legend."""
    folder.mkdir(parents=True, exist_ok=True)
    top = [_legend(figure.inits)] if figure.inits else []
    places, size = _grid(drawings, min(figure.columns, len(drawings)), top)
    svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
    parts = [*top, *drawings]
    write_bytes(svg, _joined_svg(figure, parts, places, size).encode())
    scale = style.PNG_DPI / _POINTS
    sheet = Image.new("RGBA", (round(size[0] * scale), round(size[1] * scale)), "white")
    for part, (x, y) in zip(parts, places, strict=True):
        image = Image.fromarray(part.pixels, "RGBA")
        sheet.alpha_composite(image, (round(x * scale), round(y * scale)))
    buffer = io.BytesIO()
    sheet.convert("RGB").save(buffer, format="PNG")
    write_bytes(png, buffer.getvalue())
    return [svg, png]


def _grid(
    drawings: tuple[Drawing, ...], columns: int, top: list[Drawing]
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Upper left corners, in points, and the size of the sheet."""
    width = max(d.width for d in drawings)
    height = max(d.height for d in drawings)
    above = sum(d.height for d in top)
    places = [(0.0, 0.0) for _ in top]
    places += [(i % columns * width, above + i // columns * height) for i in range(len(drawings))]
    rows = -(-len(drawings) // columns)
    wide = max([columns * width, *(d.width for d in top)])
    return places, (wide, above + rows * height)


def _joined_svg(
    figure: Figure,
    parts: list[Drawing],
    places: list[tuple[float, float]],
    size: tuple[float, float],
) -> str:
    wide, high = size
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{wide:g}pt" height="{high:g}pt" viewBox="0 0 {wide:g} {high:g}" version="1.1">',
        f'<rect width="{wide:g}" height="{high:g}" fill="#ffffff"/>',
    ]
    for number, (part, (x, y)) in enumerate(zip(parts, places, strict=True)):
        body = _own_ids(part.svg, f"{figure.name}-{number}")
        lines.append(f'<g transform="translate({x:g} {y:g})">{body}</g>')
    return "\n".join([*lines, "</svg>\n"])


def _legend(inits: tuple[str, ...]) -> Drawing:
    with style.apply():
        handles = [
            Line2D([], [], color=style.colour(i), marker=style.mark(i), label=style.init_label(i))
            for i in inits
        ]
        width = 0.3 + sum(0.7 + 0.1 * len(str(handle.get_label())) for handle in handles)
        drawing = MplFigure(figsize=(width, 0.36))
        canvas = FigureCanvasAgg(drawing)
        drawing.legend(handles=handles, loc="center left", ncols=len(handles), frameon=False)
        return _finish(drawing, canvas)
