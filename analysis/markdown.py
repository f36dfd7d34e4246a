"""report.md: the page's sections as plain Markdown, figures by reference."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from analysis.page import MAX_ROWS, NOT_RECORDED
from analysis.sections import Analysis, Section
from analysis.stages import clean
from analysis.tables import Table

_MAX_NAMES = 12
"""Cells listed behind a row; all of them are in the data files."""


def markdown(a: Analysis, sections: Sequence[Section], notes: Iterable[str]) -> str:
    """The whole report as text."""
    c = a.counts
    names = dict(zip(a.data.cells["cell"], a.data.cells["name"], strict=True))
    lines = [f"# {escaped(a.data.name)}", ""]
    if a.data.question:
        lines += [f"*{escaped(a.data.question)}*", ""]
    lines += [escaped(" ".join(a.finding)), ""]
    lines += [
        f"Cells: {c.expected} expected, {c.done} done, {c.failed} failed, {c.diverged} diverged,"
        f" {c.missing} missing.",
        "",
    ]
    for note in notes:
        lines += [escaped(note), ""]
    for section in sections:
        lines += _section(section, names)
    return clean("\n".join(lines).rstrip() + "\n")


def _section(section: Section, names: Mapping[str, str]) -> list[str]:
    lines = [f"## {escaped(section.title)}", ""]
    lines += [escaped(section.intro), ""] if section.intro else []
    for figure in section.figures:
        lines += _heading(figure.title, section)
        lines += [f"![{escaped(figure.title)}](figures/{figure.name}.png)", ""]
        lines += [escaped(figure.caption), ""]
    if any(strip.pixels is not None for strip in section.strips):
        lines += [f"![{escaped(section.title)}](figures/{section.name}.png)", ""]
    for strip in section.strips:
        if strip.pixels is None:
            lines += [f"- {escaped(strip.caption)}: no pictures ({escaped(strip.problem)})"]
    for table in section.tables:
        lines += [*_heading(table.title, section), *_table(table, names)]
    for facts in section.facts:
        lines += [f"### {escaped(facts.title)}", ""] if facts.title else []
        lines += [f"- {escaped(k)}: {escaped(v or NOT_RECORDED)}" for k, v in facts.rows]
        lines.append("")
    if section.listing:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", section.listing)), default=0))
        lines += [fence, section.listing.rstrip(), fence, ""]
    return lines


def _heading(title: str, section: Section) -> list[str]:
    return [] if title == section.title else [f"### {escaped(title)}", ""]


def _table(table: Table, names: Mapping[str, str]) -> list[str]:
    lines = [escaped(table.note), "", _row(table.header)]
    rule = ("---:" if i in table.numeric else "---" for i in range(len(table.header)))
    lines += ["| " + " | ".join(rule) + " |"]
    lines += [*map(_row, table.rows[:MAX_ROWS]), ""]
    if len(table.rows) > MAX_ROWS:
        where = f"; all are in {table.file}" if table.file else ""
        lines += [f"{MAX_ROWS} of {len(table.rows):,} rows{where}.", ""]
    behind = [
        (row[0], sources)
        for row, sources in zip(table.rows[:MAX_ROWS], table.sources, strict=False)
        if len(sources) > 1 or any(len(source.cells) > 1 for source in sources)
    ]
    if behind:
        lines += ["Cells behind each row:", ""]
    for label, sources in behind:
        parts = []
        for source in sources:
            shown = [names.get(cell, cell) for cell in source.cells[:_MAX_NAMES]]
            more = len(source.cells) - len(shown)
            text = ", ".join(shown) + (f" and {more} more" if more else "")
            parts.append(f"{source.label}: {text}" if source.label else text)
        lines.append(f"- **{escaped(label)}**: {escaped('; '.join(parts))}")
    return [*lines, ""] if behind else lines


def escaped(text: str) -> str:
    """Text from files, harmless in Markdown: no HTML, no table breaks, no links, no emphasis."""
    flat = html.escape(" ".join(text.split()), quote=False)
    flat = re.sub(r"([\\`*\[\]|~$])", r"\\\1", flat)
    # Within a word an underscore is a letter; at its edge it would start emphasis.
    flat = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)
    flat = re.sub(r"^(#|[+-](?= ))", r"\\\1", flat)
    return re.sub(r"^(\d+)([.)] )", r"\1\\\2", flat)


def _row(row: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, row)) + " |"
