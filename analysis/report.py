"""A study's report: a page that opens from disk, the same in Markdown, figures, data files.

The report is the list `SECTIONS`. To add a section, write a function from an `Analysis` to a list
of `Section` (see `analysis.sections`) and put it where it is to be read; page, Markdown, figures
and files follow from that. What is computed once for several sections belongs into `Analysis`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from analysis import checklist, contents, export, panels, pictures, scaling_sections, style
from analysis.finding import Counts
from analysis.load import load
from analysis.markdown import markdown
from analysis.page import page
from analysis.sections import Analysis, Section, analysed
from harness.ledger.files import write_bytes

SECTIONS: tuple[Callable[[Analysis], list[Section]], ...] = (
    # Figures.
    contents.convergence,
    contents.transfer,
    contents.gains,
    contents.power_laws,
    scaling_sections.laws_over_both,
    scaling_sections.worth_of_mae,
    scaling_sections.laws_of_tasks,
    contents.transfer_tasks,
    scaling_sections.published_points,
    contents.learning_rates,
    contents.reconstructions,
    # Tables.
    contents.table_of_tasks,
    contents.table_of_gains,
    contents.table_of_results,
    contents.table_of_rates,
    contents.table_of_ablations,
    contents.table_of_cells,
    scaling_sections.next_cells,
    # Why to believe it.
    contents.fits,
    checklist.checklist,
    contents.origins,
)
"""The report from top to bottom, after the finding."""

_FILES = (
    ("report.md", "this page as text"),
    ("results.csv, results.parquet", "a row per cell and metric"),
    ("cells.csv, cells.parquet", "a row per cell, with the folders of its stages"),
    ("curves.csv, curves.parquet", "a row per logged step of every stage"),
    ("fits.json", "laws and gains with everything they rest on"),
    ("figures/", "every figure as SVG and PNG"),
)


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What was written."""

    index: Path
    finding: str
    counts: Counts


def build(root: Path, study: str, out: Path) -> ReportResult:
    """Writes out/<study>/: index.html, report.md, figures/, data as CSV, Parquet and JSON.

    Raises NotFoundError, naming the studies there are, for one that is not.
    """
    data = load(root, study)
    folder = out / study
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Future[None]] = []
    with ThreadPoolExecutor(1) as aside:

        def write_curves() -> None:
            """The largest files. Arrow writes without the interpreter's lock, beside all else."""
            written.append(aside.submit(export.write_frame, folder, "curves", data.curves))

        with analysed(data, root, write_curves) as a:
            style.introduce(a.inits)
            sections = [section for build_section in SECTIONS for section in build_section(a)]
        for future in written:
            future.result()
    _check(sections)

    own = {n: f for section in sections for n, f in section.frames.items() if len(f[1])}
    frames = {name: frame for name, (_, frame) in own.items()}
    frames |= {"results": export.results_frame(data), "cells": export.cells_frame(data)}
    drawn = [figure for section in sections for figure in section.figures]
    with panels.renderer(drawn) as render, ThreadPoolExecutor(1) as aside:
        files_written = [aside.submit(export.write_frame, folder, n, f) for n, f in frames.items()]
        drawings = render()
        for future in files_written:
            future.result()
    for figure in drawn:
        panels.save(figure, drawings[figure.name], folder / "figures")
    for section in sections:
        pictures.save(section.strips, folder / "figures", section.name)
    texts = {name: text for section in sections for name, text in section.files.items()}
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    notes = _notes(a)
    files = [*_FILES, *((name, "a study file") for name in texts)]
    files += [(f"{n}.csv, {n}.parquet", what) for n, (what, _) in own.items()]
    text = page(a, sections, drawings, notes, files)
    write_bytes(folder / "index.html", text.encode())
    write_bytes(folder / "report.md", markdown(a, sections, notes).encode())
    export.write_json(folder / "fits.json", _numbers(a, sections))
    return ReportResult(index=folder / "index.html", finding=" ".join(a.finding), counts=a.counts)


def _check(sections: list[Section]) -> None:
    """Anchors and file names are unique, or one part would hide another."""
    names = [section.name for section in sections]
    names += [f.name for s in sections for f in s.figures if f.name != s.name]
    names += [f"table-{t.name}" for s in sections for t in s.tables if f"table-{t.name}" != s.name]
    assert len(names) == len({*names}), f"two parts of the report share a name: {sorted(names)}"


def _notes(a: Analysis) -> list[str]:
    """What the reader must know of what the page leaves out."""
    notes = []
    hidden = contents.drawn_variants(a)[1]
    if hidden:
        notes.append(
            f"{hidden} more settings of the study's extra axes have no figures here; they are in"
            " the tables and in results.csv."
        )
    if len(a.data.curves) > export.MAX_CSV_ROWS:
        notes.append(
            f"curves.csv has every k-th of the {len(a.data.curves):,} logged rows, the ends of each"
            f" curve among them, {export.MAX_CSV_ROWS:,} at most; curves.parquet has all."
        )
    results = [s.result for s in a.data.stages.values() if s.kind == "wsp"]
    passes = [float(r.get("passes") or 1.0) for r in results]
    partial = sum(p < 1 for p in passes)
    if partial:
        notes.append(
            f"{partial} of {len(passes)} WSP runs were over before they had seen every image of"
            f" theirs ({min(passes):.2g} passes at least): of their data size that part counts."
        )
    return notes


def _numbers(a: Analysis, sections: list[Section]) -> dict[str, object]:
    found: dict[str, object] = {
        "schema": 1,
        "study": a.data.name,
        "fits": [law.to_json() for law in a.laws],
        "gains": a.pairs.to_dict("records"),
        "gains_equal_flops_curves": a.charged.to_dict("records"),
        "gains_equal_flops_runs": a.charged_runs.to_dict("records"),
    }
    for section in sections:
        found |= section.numbers
    return found
