"""The groups of a search: each a cell of the study whose fields are tuned on their own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from harness.study.cells import TUNE, Ablation, Cell, Grid, build_ablations
from harness.study.expand import matches
from harness.study.schema import LoadedStudy
from harness.study.tuning import Space, Tune


@dataclass(frozen=True, kw_only=True)
class Group:
    """One combination of the `for_each` axes: what a trial of it starts from and may change."""

    label: str
    match: dict[str, Any]
    cell: Cell
    space: dict[str, Space]

    def trial(self, values: Mapping[str, Any], tune: Tune) -> Ablation:
        """The cell of a trial with these values; it ends with the stage of the metric."""
        return Ablation(
            parent=self.cell.id,
            values=self.cell.axes,
            set=dict(values),
            tag=TUNE,
            until=tune.role,
        )


def groups_of(grid: Grid) -> tuple[Tune, list[Group]]:
    """What the study's `tune` section asks for, in the order of the study's cells.

    Raises UserError with every problem, each with file:line: no such section, an axis nobody has,
    a group of several cells, a field no stage has.
    """
    loaded, tune = grid.loaded, grid.loaded.study.tune
    if tune is None:
        path = loaded.source.path
        raise UserError(f"{path}: has no section `tune`; add one (docs/tuning.md)")
    problems = _unknown_axes(loaded, tune, grid)
    if problems:
        raise UserError(*problems)
    found: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        if cell.parent is None and matches(tune.at, cell.axes):
            found.setdefault(_label(cell, tune), []).append(cell)
    if not found:
        where = loaded.source.where(("tune", "at"))
        raise UserError(f"{where}: tune.at matches no cell of the study")
    groups = []
    for label, cells in found.items():
        if len(cells) > 1:
            varying = [k for k in cells[0].axes if len({repr(c.axes.get(k)) for c in cells}) > 1]
            problems.append(
                f"{loaded.source.where(('tune', 'at'))}: {len(cells)} cells for {label}; fix"
                f" {', '.join(varying)} in tune.at, or add to tune.for_each"
            )
            continue
        match = {axis: cells[0].axes[axis] for axis in tune.for_each}
        space = {k: s for k, s in tune.params.items() if _touches(k, cells[0], tune)}
        groups.append(Group(label=label, match=match, cell=cells[0], space=space))
    problems += _field_problems(loaded, tune, groups)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return tune, groups


def _label(cell: Cell, tune: Tune) -> str:
    return ",".join(f"{axis}={cell.axes[axis]}" for axis in tune.for_each)


def _unknown_axes(loaded: LoadedStudy, tune: Tune, grid: Grid) -> list[str]:
    known = list(dict.fromkeys(k for c in grid.cells for k in c.axes))
    problems = []
    for key, names in (("for_each", tune.for_each), ("at", list(tune.at))):
        for name in names:
            if all(name in c.axes for c in grid.cells):
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"axes: {', '.join(known)}"
            problems.append(
                f"{loaded.source.where(('tune', key, name))}: tune.{key}: no axis '{name}'; {hint}"
            )
    return problems


def _touches(key: str, cell: Cell, tune: Tune) -> bool:
    """Whether the field belongs to a stage the cell's trials run."""
    first, _, rest = key.partition(".")
    if first == "transfer":
        return rest.partition(".")[0] == tune.role
    return first in cell.stages and not (first == "wsp" and tune.role == "mae")


def _field_problems(loaded: LoadedStudy, tune: Tune, groups: list[Group]) -> list[str]:
    """Tries every param at its ends in every group, as a trial would."""
    problems, used = [], {k for g in groups for k in g.space}
    for key in tune.params:
        if key not in used:
            stages = dict.fromkeys(r for g in groups for r in g.cell.stages)
            problems.append(
                f"{loaded.source.where(('tune', 'params', key))}: tune.params.{key}: no group has"
                f" that stage before {tune.metric}; stages: {', '.join(stages)}"
            )
    for group in groups:
        where = loaded.source.where(("tune", "metric"))
        if tune.role not in group.cell.stages:
            problems.append(
                f"{where}: tune.metric {tune.metric}: {group.label} has no stage '{tune.role}';"
                f" it has: {', '.join(group.cell.stages)}"
            )
        if not group.space:
            where = loaded.source.where(("tune", "params"))
            problems.append(f"{where}: tune.params: nothing to tune for {group.label}")
        for key, space in group.space.items():
            for value in space.ends:
                try:
                    build_ablations(loaded, [group.trial({key: value}, tune)])
                except UserError as error:
                    where = loaded.source.where(("tune", "params", key))
                    problems += [f"{where}: tune.params: {_plain(p)}" for p in error.problems]
    return problems


def _plain(problem: str) -> str:
    return problem.removeprefix("--set: ")
