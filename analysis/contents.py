"""The sections every report has: figures, tables, diagnostics, where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd

from analysis import diagnostics, figures, pictures, provenance, tables, tasks, tuning
from analysis.convergence import convergence as draw_convergence
from analysis.metrics import Metric
from analysis.panels import Figure
from analysis.sections import Analysis, Facts, Section
from analysis.tables import Table

MAX_VARIANTS = 3
"""Settings of the extra axes that get figures; all of them are in the tables and data files."""


# -- figures --------------------------------------------------------------------------------


def drawn_variants(a: Analysis) -> tuple[list[str], int]:
    """The settings of the extra axes that get figures, and how many do not.

    The first, and others with a grid to draw. A few runs added at one grid point, for a comparison
    at equal FLOPs say, are in the tables.
    """
    grid = a.data.grid
    if not len(grid):
        return [], 0
    points = grid.drop_duplicates(["variant", "size", "data"])["variant"].value_counts()
    names = list(dict.fromkeys(grid["variant"]))
    names = [name for name in names if name == names[0] or points[name] > 1]
    return names[:MAX_VARIANTS], max(0, len(names) - MAX_VARIANTS)


def _transfers(a: Analysis) -> list[Metric]:
    return [m for m in a.metrics if m.is_accuracy] or a.metrics


def _by_variant(
    a: Analysis, name: str, title: str, draw: Callable[[str], Figure | None]
) -> list[Section]:
    """A section with the figure of each drawn variant."""
    found: dict[str, Figure] = {}
    for variant in drawn_variants(a)[0]:
        figure = draw(variant)
        if figure is None:
            continue
        if variant:
            own = f"{figure.name}-{figures.slug(variant)[:60]}"
            # Settings that differ in letters that no file name has.
            own += f"-{len(found)}" if own in found else ""
            figure = replace(figure, name=own, title=f"{figure.title}: {variant}")
        found[figure.name] = figure
    return [Section(name=name, title=title, figures=tuple(found.values()))] if found else []


def convergence(a: Analysis) -> list[Section]:
    """Held-out loss along WSP."""
    title = "Convergence"
    return _by_variant(a, "convergence", title, lambda v: draw_convergence(a.data, v))


def transfer(a: Analysis) -> list[Section]:
    """Every accuracy against model size and against images."""
    shown = _transfers(a)
    found = []
    for axis in ("params", "data"):
        title = f"Transfer against {figures.AXIS_LABELS[axis]}"
        found += _by_variant(
            a,
            f"transfer-{axis}",
            title,
            lambda v, axis=axis: figures.transfer(a.data, shown, v, axis),
        )
    return found


def gains(a: Analysis) -> list[Section]:
    """Maps of what the MAE stage buys."""
    main = a.main
    if main is None or not a.compares_mae:
        return []
    return _by_variant(
        a,
        "gain",
        "Gain of the MAE stage",
        lambda v: figures.gains(v, main, a.loss, a.pairs, a.charged, a.charged_runs),
    )


def power_laws(a: Analysis) -> list[Section]:
    """Fitted curves of the headline metric and the loss."""
    if a.main is None:
        return []
    shown = [a.main, *([a.loss] if a.loss and a.loss.key != a.main.key else [])]
    return _by_variant(
        a, "power-laws", "Power laws", lambda v: figures.power_laws(a.laws, v, shown)
    )


def transfer_tasks(a: Analysis) -> list[Section]:
    """Every task at the largest grid point."""
    figure = tasks.figure(a.tasks)
    if figure is None:
        return []
    return [Section(name="tasks", title=figure.title, figures=(figure,))]


def learning_rates(a: Analysis) -> list[Section]:
    """What a search found."""
    if a.tuning is None:
        return []
    return [Section(name=f.name, title=f.title, figures=(f,)) for f in tuning.figures(a.tuning)]


def reconstructions(a: Analysis) -> list[Section]:
    """Pictures of the MAE runs."""
    strips, hidden = pictures.strips(a.data)
    if not strips:
        return []
    intro = "The same held-out images in every MAE run."
    intro += f" Rows from above: {', '.join(pictures.ROWS)}."
    if hidden:
        intro += f" {hidden} more runs are not shown."
    return [Section(name="reconstructions", title="Reconstructions", intro=intro, strips=strips)]


# -- tables ---------------------------------------------------------------------------------


def _of_table(
    table: Table | None, frames: Mapping[str, tuple[str, pd.DataFrame]] | None = None
) -> list[Section]:
    if table is None:
        return []
    name = f"table-{table.name}"
    return [Section(name=name, title=table.title, tables=(table,), frames=frames or {})]


def table_of_tasks(a: Analysis) -> list[Section]:
    """Tasks x inits."""
    what = "tasks and inits at the largest grid point, with intervals"
    return _of_table(tasks.table(a.data, a.tasks), {"tasks": (what, a.tasks)})


def table_of_gains(a: Analysis) -> list[Section]:
    """A row per grid point."""
    if a.main is None or not a.compares_mae:
        return []
    table = tables.gains(a.data, a.main, a.loss, a.pairs, a.charged, a.worth)
    frames = {
        "gains": ("MAE minus random at equal samples, a row per pair and metric", a.pairs),
        "gains_equal_flops_curves": ("at equal total FLOPs, along the curves", a.charged),
        "gains_equal_flops_runs": ("at equal total FLOPs, among finished runs", a.charged_runs),
        "gains_in_images": ("how many times the images random needs for MAE's value", a.worth),
    }
    return _of_table(table, frames)


def table_of_results(a: Analysis) -> list[Section]:
    """A row per cell, a column per metric."""
    return _of_table(tables.results(a.data, a.metrics) if len(a.data.cells) else None)


def table_of_rates(a: Analysis) -> list[Section]:
    """The best trials of a search."""
    return _of_table(tuning.table(a.tuning) if a.tuning is not None else None)


def table_of_ablations(a: Analysis) -> list[Section]:
    """Cells run with a change."""
    return _of_table(tables.ablations(a.data, a.main))


def table_of_cells(a: Analysis) -> list[Section]:
    """Every cell."""
    return _of_table(tables.cells(a.data) if len(a.data.cells) else None)


# -- evidence -------------------------------------------------------------------------------


def fits(a: Analysis) -> list[Section]:
    """Parameters of every law, and why each may be believed or not."""
    if not a.laws:
        return []
    return [
        *_of_table(tables.fits(a.laws)),
        *_of_table(diagnostics.table(a.laws)),
    ]


def origins(a: Analysis) -> list[Section]:
    """Code, versions, machines, data and the study file."""
    rows = tuple(provenance.provenance(a.data, a.origins))
    return [
        Section(
            name="provenance",
            title="Provenance",
            facts=(Facts(rows=rows),),
            listing=a.data.study_file,
        )
    ]
