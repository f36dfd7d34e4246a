"""index.html: one file that opens from disk, asks for nothing, and links numbers to their cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from analysis import style
from analysis.figures import slug
from analysis.panels import Drawing, panel_svg
from analysis.sections import Analysis, Section
from analysis.stages import clean
from analysis.tables import Source, Table

MAX_ROWS = 400
"""Rows of a table on the page; a browser lays out ten thousand only after seconds."""
MAX_CELLS = 1000
"""Rows of the table of cells, which the other tables link into."""
MAX_LINKS = 40
"""Links behind one number; the data files have all."""
NOT_RECORDED = "not recorded"
_TALL = 14


@dataclass(frozen=True, kw_only=True)
class _Behind:
    """One source of a row: label, (anchor or None, name) of cells, and how many more there are."""

    label: str
    cells: tuple[tuple[str | None, str], ...]
    more: int


@dataclass(frozen=True, kw_only=True)
class _Row:
    anchor: str | None
    cells: tuple[str, ...]
    link: str | None
    """Anchor of the one cell that the whole row is about."""
    behind: tuple[_Behind, ...]
    num_behind: int
    folders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A table with the rows that the page has."""

    table: Table
    rows: tuple[_Row, ...]
    cut: str
    """Says that there are more rows, and where."""
    is_tall: bool


def page(
    a: Analysis,
    sections: Sequence[Section],
    drawings: Mapping[str, tuple[Drawing, ...]],
    notes: Iterable[str],
    files: Iterable[tuple[str, str]],
) -> str:
    """The HTML text. `drawings` by figure name; `files`: (name, what it holds) beside the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = _choose_rows(a, sections)
    text = environment.get_template("page.html.j2").render(
        a=a,
        sections=sections,
        tables={t.name: shown[t.name] for s in sections for t in s.tables},
        svgs={
            name: [panel_svg(d, f"{name}-{i}") for i, d in enumerate(found)]
            for name, found in drawings.items()
        },
        inits={i: _legend_entry(i) for s in sections for f in s.figures for i in f.inits},
        theme=style.THEMED,
        notes=[*notes],
        files=[*files],
        not_recorded=NOT_RECORDED,
        behind=[t for s in sections for t in s.tables if t.name in ("gains", "fits", "results")],
    )
    return clean(text)


def _legend_entry(init: str) -> tuple[str, str, str]:
    """(label, colour, glyph) of an init."""
    return style.init_label(init), style.css_colour(init), style.glyph(init)


# -- rows and links -------------------------------------------------------------------------


def _choose_rows(a: Analysis, sections: Sequence[Section]) -> dict[str, _Shown]:
    """Every table, cut to what a page can hold; the cells that others name are kept first."""
    names = {
        str(c): str(n) for c, n in zip(a.data.cells["cell"], a.data.cells["name"], strict=True)
    }
    tables = [table for section in sections for table in section.tables]
    wanted: dict[str, None] = {}
    for table in tables:
        for sources in table.sources[:MAX_ROWS]:
            for source in sources:
                wanted |= dict.fromkeys(source.cells[:MAX_LINKS])
    order = [*(c for c in wanted if c in names), *(c for c in names if c not in wanted)]
    anchors = _anchors(order[:MAX_CELLS])
    return {table.name: _shown(table, names, anchors) for table in tables}


def _anchors(cells: Iterable[str]) -> dict[str, str]:
    """Cell id -> anchor; ids that differ in odd characters only are told apart by a number."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for cell in cells:
        anchor = f"cell-{slug(cell)}"
        while anchor in taken:
            anchor += f"-{len(taken)}"
        taken.add(anchor)
        found[cell] = anchor
    return found


def _shown(table: Table, names: Mapping[str, str], anchors: Mapping[str, str]) -> _Shown:
    if table.cells:
        places = [i for i, cell in enumerate(table.cells) if cell in anchors]
    else:
        places = list(range(min(len(table.rows), MAX_ROWS)))
    rows = []
    for i in places:
        sources = table.sources[i] if table.sources else ()
        single = sources[0].cells if len(sources) == 1 and len(sources[0].cells) == 1 else ()
        rows.append(
            _Row(
                anchor=anchors[table.cells[i]] if table.cells else None,
                cells=table.rows[i],
                link=anchors.get(single[0]) if single else None,
                behind=() if single else tuple(_behind(s, names, anchors) for s in sources),
                num_behind=len({cell for source in sources for cell in source.cells}),
                folders=table.folders[i] if table.folders else (),
            )
        )
    cut = ""
    if len(places) < len(table.rows):
        where = f" All are in {table.file}." if table.file else ""
        cut = f"{len(places):,} of {len(table.rows):,} rows.{where}"
    return _Shown(table=table, rows=tuple(rows), cut=cut, is_tall=len(rows) > _TALL)


def _behind(source: Source, names: Mapping[str, str], anchors: Mapping[str, str]) -> _Behind:
    cells = source.cells[:MAX_LINKS]
    return _Behind(
        label=source.label,
        cells=tuple((anchors.get(cell), names.get(cell, cell)) for cell in cells),
        more=len(source.cells) - len(cells),
    )
