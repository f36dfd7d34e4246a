"""Sections on scaling: laws over two axes, frontier, worth of MAE, task laws, advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from analysis import design, design_cells, optimum_figures, published, task_laws
from analysis.forms import CHINCHILLA
from analysis.joint import reach_of
from analysis.load import axis_label
from analysis.sections import Analysis, Section
from analysis.style import init_label, short
from analysis.surface import InitWorth, Surface
from analysis.tables import NONE, Source, Table
from analysis.which_parameter import CHANGES
from harness.errors import UserError


def _number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _with_ends(value: float | None, ends: Sequence[float] | None, digits: int = 3) -> str:
    text = _number(value, digits)
    if text == NONE or ends is None or not all(map(math.isfinite, ends)):
        return text
    return f"{text} [{_number(ends[0], digits)} to {_number(ends[1], digits)}]"


def _cells(surface: Surface) -> tuple[Source, ...]:
    found = [Source(cells=tuple(dict.fromkeys(map(str, surface.rows["cell"]))), label="used")]
    reasons: dict[str, list[str]] = {}
    for cell, reason in surface.dropped:
        reasons.setdefault(reason, []).append(cell)
    found += [Source(cells=tuple(c), label=f"dropped, {why}") for why, c in reasons.items()]
    return tuple(s for s in found if s.cells)


# -- laws over N and D ----------------------------------------------------------------------


def laws_over_both(a: Analysis) -> list[Section]:
    """L(N, D) per init, forms compared by what they predict, and the frontier."""
    found = a.scaling.surfaces
    if not found:
        return []
    sections = [
        Section(
            name="surfaces",
            title="Laws over model size and data",
            intro="L = E + A / N^alpha + B / D^beta over the finished runs of the main setting: N"
            " model parameters, D distinct images. A law that the runs cannot identify is refused,"
            " or its search ends at a bound: no numbers then.",
            tables=(_surface_table(found), _form_table(found)),
            numbers={"surfaces": [s.to_json() for s in found]},
        )
    ]
    shown = [s for s in found if any(fit.params for fit in s.optima.values())]
    figures = []
    for surface in shown:
        figure = optimum_figures.frontiers(surface.optima)
        if figure is not None:
            name = f"frontier-{surface.metric.kind}-{surface.init}".replace("_", "-").lower()
            title = f"{surface.metric.error_label}, {init_label(surface.init)}"
            figures.append(replace(figure, name=name, title=title))
    sections.append(
        Section(
            name="frontier",
            title="Compute-optimal models",
            intro="N* = G C^a and D* = H C^b by three approaches: the lower hull of the runs, runs"
            " of equal compute, and L(N, D) minimised at each cost. C is the FLOPs of pretraining,"
            " the MAE stage charged in full.",
            figures=tuple(figures),
            tables=(_approach_table(found),),
        )
    )
    return sections


def _surface_table(found: Sequence[Surface]) -> Table:
    rows = []
    for surface in found:
        fit, held = surface.fit, surface.held_out
        names = ("E", "A", "B", "alpha", "beta")
        numbers = [NONE for _ in names]
        if fit.is_number:
            numbers = [_with_ends(fit.params.get(k), fit.ci95.get(k)) for k in names]
        if "log_rmse" in held:
            last, line = (held["baselines_log_rmse"][k] for k in ("last_value", "log_log_line"))
            error = f"{held['log_rmse']:.4f} (last value {last:.4f}, log-log plane {line:.4f})"
        else:
            error = f"refused: {held.get('reason', 'no rows')}"
        rows.append(
            (
                surface.metric.error_label,
                surface.init,
                fit.status.replace("_", " "),
                *numbers,
                str(fit.rows_used),
                _evidence(surface),
                error,
                "; ".join(filter(None, [fit.reason, *fit.warnings])),
            )
        )
    return Table(
        name="surfaces",
        title="L(N, D)",
        note="95 % percentile intervals over bootstrapped runs. Evidence: starts that reached the"
        " optimum, norm of the gradient there, condition number. Held out: log RMSE on the largest"
        " model, beside two baselines.",
        header=(
            *("y", "init", "status", "E", "A", "B", "alpha", "beta"),
            *("rows", "evidence", "held out", "remarks"),
        ),
        rows=tuple(rows),
        numeric=frozenset({8}),
        wide=frozenset({9, 10, 11}),
        state_column=2,
        sources=tuple(map(_cells, found)),
        file="fits.json",
    )


def _evidence(surface: Surface) -> str:
    fit = surface.fit
    if not fit.starts:
        return NONE
    return (
        f"{fit.starts_at_best} of {fit.starts} starts; gradient {_number(fit.gradient_norm, 1)};"
        f" condition {_number(fit.condition_number, 2)}"
    )


def _form_table(found: Sequence[Surface]) -> Table:
    rows, sources = [], []
    for surface in found:
        for over, forms in (("N and D", surface.forms), ("N at most data", surface.size_forms)):
            for form in forms:
                rows.append(
                    (
                        surface.metric.error_label,
                        surface.init,
                        over,
                        str(form["law"]).replace("_", " "),
                        str(form["parameters"]),
                        _with_ends(form.get("log_rmse"), form.get("log_rmse_interval"), 2),
                        _number(form.get("extrapolation_factor"), 3),
                        str(form.get("reason") or ""),
                    )
                )
                sources.append(_cells(surface))
    return Table(
        name="forms",
        title="Forms by what they predict",
        note="Each form fitted without the largest model and judged there; best first. A form with"
        " more parameters than the sizes can tell apart is refused.",
        header=("y", "init", "over", "form", "parameters", "held-out log RMSE", "times N", "why"),
        rows=tuple(rows),
        numeric=frozenset({4, 6}),
        wide=frozenset({7}),
        sources=tuple(sources),
        file="fits.json",
    )


def _approach_table(found: Sequence[Surface]) -> Table:
    rows, sources = [], []
    for surface in found:
        for row in surface.approaches.rows:
            rows.append(
                (
                    surface.metric.error_label,
                    surface.init,
                    optimum_figures.NAMES.get(row.approach, row.approach),
                    row.status.replace("_", " "),
                    _with_ends(row.a, row.a_ci95),
                    _with_ends(row.b, row.b_ci95),
                    _number(row.total),
                    "; ".join(filter(None, [row.reason, *row.warnings])),
                )
            )
            sources.append(_cells(surface))
    note = "a and b: exponents of N* and D* in compute; where cost is N times D their sum is 1."
    apart = [text for surface in found for text in surface.approaches.disagreements]
    if apart:
        note += f" Approaches that disagree beyond their intervals: {'; '.join(apart)}."
    return Table(
        name="approaches",
        title="Three approaches",
        note=note,
        header=("y", "init", "approach", "status", "a", "b", "a + b", "remarks"),
        rows=tuple(rows),
        wide=frozenset({7}),
        state_column=3,
        sources=tuple(sources),
        file="fits.json",
    )


# -- what MAE is worth ------------------------------------------------------------------------


def worth_of_mae(a: Analysis) -> list[Section]:
    """Which parameter of the law MAE changes, and what that is worth in data and compute."""
    if not a.compares_mae:
        return []
    found = a.scaling.worth
    return [
        Section(
            name="worth",
            title="What the MAE stage is worth",
            intro="Images and FLOPs that random init would need for what MAE init reaches, read off"
            " the laws of both inits and never beyond random's own range; and a joint law of both"
            " inits, with the parameters that may differ between them.",
            tables=(_which_table(found), _multiplier_table(a, found)),
            numbers={
                "worth": [
                    {
                        "y": w.metric.error_label,
                        "which_parameter": w.which.to_json(),
                        **w.table.to_json(),
                    }
                    for w in found
                ]
            },
        )
    ]


def change_text(name: str, value: float, ends: tuple[float, float] | None) -> str:
    """A change with its interval, or that the search for it ended nowhere."""
    reach = 0.99 * reach_of(name, CHINCHILLA)
    if abs(value) >= reach:
        return "at a limit of the search"
    if ends is None or max(map(abs, ends)) < reach:
        return _with_ends(value, ends)
    low, high = (_number(end) if abs(end) < reach else "no end" for end in ends)
    return f"{_number(value)} [{low} to {high}]"


def _which_table(found: Sequence[InitWorth]) -> Table:
    rows = []
    for item in found:
        label = item.metric.error_label
        if item.which.status == "refused":
            rows.append((label, "refused", *[NONE] * 5, item.which.reason))
        for row in item.which.rows:
            if row.changes == tuple(CHANGES):
                name, what = "all five", item.which.verdict
            elif not row.changes:
                name, what = "nothing", ""
            else:
                name, what = row.changes[0], CHANGES[row.changes[0]]
            one = row.changes[0] if len(row.changes) == 1 else ""
            rows.append(
                (
                    label,
                    name,
                    str(row.parameters),
                    change_text(one, row.values[one], row.ci95.get(one)) if one else NONE,
                    _number(row.p_against_none, 2),
                    _number(row.p_against_all, 2),
                    _number(row.cv_log_rmse, 3),
                    what,
                )
            )
    return Table(
        name="which-parameter",
        title="Which parameter of the law MAE changes",
        note="Both inits share E, A, alpha, B, beta but for what is changed. Change: ln of MAE over"
        " random for E, A, B, difference for exponents, 95 % interval over pairs. F tests: against"
        " nothing changed (small: the change is real), against all five changed (large: it is"
        " enough). Left out: log RMSE on pairs the fit did not see.",
        header=("y", "changed", "parameters", "change", "p (none)", "p (all)", "left out", "what"),
        rows=tuple(rows),
        numeric=frozenset({2, 4, 5, 6}),
        wide=frozenset({7}),
        file="fits.json",
    )


def _multiplier_table(a: Analysis, found: Sequence[InitWorth]) -> Table:
    rows, sources = [], []
    for item in found:
        label = item.metric.error_label
        if item.table.status == "refused":
            rows.append((label, NONE, NONE, NONE, NONE, f"refused: {item.table.reason}"))
            sources.append(())
        for row in item.table.rows:
            remark = row.why or ("ossified: fewer images do as well" if row.ossified else "")
            if row.draws_beyond > 0.025:
                remark += f"{row.draws_beyond:.0%} of draws beyond random's range"
            rows.append(
                (
                    label,
                    f"{short(row.n)}, {axis_label(int(row.d))}",
                    _number(row.effective_d),
                    _with_ends(row.multiplier, row.multiplier_ci95),
                    _with_ends(row.flops_multiplier, row.flops_multiplier_ci95),
                    remark,
                )
            )
            grid = a.data.grid
            at = grid[(grid["params"] == row.n) & (grid["data"] == row.d)]
            sources.append((Source(cells=tuple(map(str, at["cell"]))),))
    return Table(
        name="multipliers",
        title="Data and compute that MAE stands for",
        note="Effective images: those random init needs for MAE's value at the same model, by the"
        " two laws. Data multiplier: these over the images used. FLOPs multiplier: what random then"
        " costs over what the MAE cell cost, MAE stage in full; above 1 MAE saves. Ossified: below"
        " 1 with its interval.",
        header=("y", "params, images", "effective images", "data", "FLOPs", "remarks"),
        rows=tuple(rows),
        numeric=frozenset({2}),
        wide=frozenset({5}),
        sources=tuple(sources),
        file="fits.json",
    )


# -- tasks, published points, advice ------------------------------------------------------------


def laws_of_tasks(a: Analysis) -> list[Section]:
    """Pretraining loss to error, task by task, and both steps chained."""
    found = a.scaling.task_laws
    table, figure = task_laws.table(found), task_laws.figure(found)
    if table is None:
        return []
    return [
        Section(
            name="task-laws",
            title="From pretraining loss to task error",
            figures=(figure,) if figure is not None else (),
            tables=(table,),
            numbers={"task_laws": [law.to_json() for law in found]},
        )
    ]


def published_points(a: Analysis) -> list[Section]:
    """The paper's own numbers beside the study's, for tasks that both have."""
    results = a.data.grid_results
    if not len(published.shared(results)):
        return []
    figure = published.figure(results)
    return [Section(name="published", title=figure.title, figures=(figure,))]


def next_cells(a: Analysis) -> list[Section]:
    """Cells that would shrink the exponents' intervals most per hour, as a study file."""
    advice = a.scaling.advice
    if advice is None:
        return []
    if isinstance(advice, UserError):
        text = f"No advice: the study's own file no longer reads ({advice})."
        return [Section(name="next-cells", title="Cells to run next", intro=text)]
    files: Mapping[str, str] = {}
    intro = "Nothing to advise."
    if advice.steps:
        loaded = design_cells.load_registered(a.data)
        files = {"next_cells.yaml": design_cells.fragment(advice, loaded)}
        intro = (
            "Cells that would shrink the intervals of the exponents most per hour, one after the"
            " other. next_cells.yaml has them as a study file: harness grid next_cells.yaml plans"
            " them, with --submit it runs them."
        )
    return [
        Section(
            name="next-cells",
            title="Cells to run next",
            intro=intro,
            tables=(design.table(advice),),
            files=files,
        )
    ]
