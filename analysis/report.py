"""A study's report: a page that opens from disk, the same in Markdown, figures, CSV and JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from analysis import figures, gain, laws, panels, pictures, tables, tasks, tuning
from analysis.finding import Counts, count, paragraph
from analysis.load import StudyData, load
from analysis.metrics import Metric, headline, metrics_of
from analysis.style import colour, init_label
from harness.ledger.files import write_bytes

MAX_VARIANTS = 6
"""Settings of the extra axes that get figures; all of them are in the tables and CSV files."""


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What was written."""

    index: Path
    finding: str
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A figure as the page shows it."""

    name: str
    title: str
    caption: str
    svgs: tuple[str, ...]
    inits: tuple[tuple[str, str, str], ...]
    """(init, label, colour) of the legend."""


def build(root: Path, study: str, out: Path) -> ReportResult:
    """Writes out/<study>/: index.html, report.md, figures/, curves.csv, results.csv, fits.json.

    Raises NotFoundError, naming the studies there are, for one that is not.
    """
    data = load(root, study)
    folder = out / study
    folder.mkdir(parents=True, exist_ok=True)
    metrics = metrics_of(data)
    main = headline(metrics)
    loss = next((m for m in metrics if m.kind == "wsp"), None)
    pairs = gain.paired(data, metrics)
    charged = gain.charged_curves(data)
    charged_runs = gain.charged_results(data, metrics)
    fitted = laws.fit_all(data, metrics)
    text = paragraph(data, main, pairs, charged, charged_runs, fitted)

    drawn: list[figures.Figure] = []
    variants = _drawn_variants(data)
    for variant in variants[:MAX_VARIANTS]:
        drawn += _figures(data, variant, metrics, main, loss, pairs, charged, charged_runs, fitted)
    measured = tasks.measure(data, metrics)
    compared = tasks.figure(measured)
    drawn += [compared] if compared else []
    searched = tuning.load_tuning(root, study)
    if searched is not None:
        drawn += tuning.figures(searched)
    for figure in drawn:
        panels.save(figure, folder / "figures")
    strips = pictures.strips(data)
    pictures.save(strips, folder / "figures")

    all_tables = _tables(data, metrics, main, loss, pairs, charged, fitted)
    of_tasks = tasks.table(data, measured)
    all_tables[:0] = [of_tasks] if of_tasks else []
    if searched is not None:
        all_tables.append(tuning.table(searched))
    counts = count(data)
    context: dict[str, Any] = {
        "study": data,
        "finding": text,
        "counts": counts,
        "tables": all_tables,
        "strips": strips,
        "rows": pictures.ROWS,
        "provenance": tables.provenance(data),
        "hidden_variants": len(variants) - MAX_VARIANTS,
    }
    sections = [_section(figure) for figure in drawn]
    _write_page(folder, context | {"sections": sections})
    _write_markdown(folder, context | {"figures": drawn})
    _write_data(folder, data, fitted, pairs, charged, charged_runs)
    _write_csv(folder / "tasks.csv", measured)
    return ReportResult(index=folder / "index.html", finding=text, counts=counts)


def _drawn_variants(data: StudyData) -> list[str]:
    """The settings of the extra axes that get figures: the first, and all with a grid to draw.

    A few runs added at one grid point, for a comparison at equal FLOPs say, are in the tables.
    """
    if not len(data.grid):
        return []
    points = data.grid.drop_duplicates(["variant", "size", "data"])["variant"].value_counts()
    names = list(dict.fromkeys(data.grid["variant"]))
    return [name for name in names if name == names[0] or points[name] > 1]


def _inits(data: StudyData) -> list[str]:
    return list(dict.fromkeys(data.grid["init"])) if len(data.grid) else []


def _figures(
    data: StudyData,
    variant: str,
    metrics: list[Metric],
    main: Metric | None,
    loss: Metric | None,
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    charged_runs: pd.DataFrame,
    fitted: list[laws.Law],
) -> list[figures.Figure]:
    transfers = [m for m in metrics if m.is_accuracy] or metrics
    found: list[figures.Figure | None] = [figures.convergence(data, variant)]
    found += [figures.transfer(data, transfers, variant, axis) for axis in ("params", "data")]
    if main is not None:
        if {gain.WITH, gain.WITHOUT} <= set(_inits(data)):
            found.append(figures.gains(variant, main, loss, pairs, charged, charged_runs))
        shown = [main, *([loss] if loss and loss.key != main.key else [])]
        found.append(figures.power_laws(fitted, variant, shown))
    if not variant:
        return [f for f in found if f is not None]
    suffix = figures.slug(variant)
    return [
        replace(f, name=f"{f.name}-{suffix}", title=f"{f.title}: {variant}")
        for f in found
        if f is not None
    ]


def _tables(
    data: StudyData,
    metrics: list[Metric],
    main: Metric | None,
    loss: Metric | None,
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    fitted: list[laws.Law],
) -> list[tables.Table]:
    found: list[tables.Table | None] = []
    if main is not None and {gain.WITH, gain.WITHOUT} <= set(_inits(data)):
        multipliers = gain.data_multiplier(pairs, metrics)
        found.append(tables.gains(main, loss, pairs, charged, multipliers))
    if fitted:
        found.append(tables.fits(fitted))
    if len(data.cells):
        found += [tables.results(data, metrics), tables.ablations(data, main), tables.cells(data)]
    return [t for t in found if t is not None]


def _section(figure: figures.Figure) -> _Section:
    svgs = tuple(
        panels.panel_svg(panel, f"{figure.name}-{i}") for i, panel in enumerate(figure.panels)
    )
    return _Section(
        name=figure.name,
        title=figure.title,
        caption=figure.caption,
        svgs=svgs,
        inits=tuple((i, init_label(i), colour(i)) for i in figure.inits),
    )


# -- writing --------------------------------------------------------------------------------


def _write_page(folder: Path, context: Mapping[str, Any]) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(context)
    write_bytes(folder / "index.html", page.encode("utf-8"))


def _write_markdown(folder: Path, context: Mapping[str, Any]) -> None:
    data: StudyData = context["study"]
    counts: Counts = context["counts"]
    lines = [f"# {_md(data.name)}", ""]
    if data.question:
        lines += [f"*{_md(data.question.strip())}*", ""]
    lines += [_md(context["finding"]), ""]
    lines += [
        f"Cells: {counts.expected} expected, {counts.done} done, {counts.failed} failed,"
        f" {counts.diverged} diverged, {counts.missing} missing.",
        "",
    ]
    for figure in context["figures"]:
        lines += [
            f"## {_md(figure.title)}",
            "",
            f"![{_md(figure.title)}](figures/{figure.name}.png)",
        ]
        lines += ["", _md(figure.caption), ""]
    strips: list[pictures.Strip] = context["strips"]
    if any(s.pixels is not None for s in strips):
        lines += ["## Reconstructions", "", "![Reconstructions](figures/reconstructions.png)", ""]
        lines += [f"Rows: {', '.join(context['rows'])}.", ""]
    for table in context["tables"]:
        lines += [f"## {_md(table.title)}", "", _md(table.note), "", _md_row(table.header)]
        lines += [_md_row(["---"] * len(table.header)), *map(_md_row, table.rows), ""]
    lines += ["## Provenance", ""]
    lines += [f"- {_md(name)}: {_md(value)}" for name, value in context["provenance"]]
    write_bytes(folder / "report.md", ("\n".join(lines) + "\n").encode("utf-8"))


def _md(text: str) -> str:
    """Text from files, harmless in Markdown: no HTML, no table breaks, no links."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for char in ("|", "[", "]", "`", "*"):
        escaped = escaped.replace(char, f"\\{char}")
    return escaped


def _md_row(row: Any) -> str:
    return "| " + " | ".join(_md(cell) if cell != "---" else cell for cell in row) + " |"


def _write_data(
    folder: Path,
    data: StudyData,
    fitted: list[laws.Law],
    pairs: pd.DataFrame,
    charged: pd.DataFrame,
    charged_runs: pd.DataFrame,
) -> None:
    hidden = [c for c in ("pair", "parent") if c in data.results]
    _write_csv(folder / "results.csv", data.results.drop(columns=hidden))
    _write_csv(folder / "curves.csv", data.curves)
    report = {
        "schema": 1,
        "study": data.name,
        "fits": [law.to_json() for law in fitted],
        "gains": pairs.to_dict("records"),
        "gains_equal_flops_curves": charged.to_dict("records"),
        "gains_equal_flops_runs": charged_runs.to_dict("records"),
    }
    write_bytes(
        folder / "fits.json",
        (json.dumps(_plain(report), indent=1, allow_nan=False) + "\n").encode(),
    )


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_bytes(path, frame.to_csv(index=False).encode("utf-8"))


def _plain(value: Any) -> Any:
    """JSON types only; what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
