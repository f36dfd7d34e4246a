"""Which stages `harness cancel`, `resume` and `retry` mean, over all studies of a run root."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.cli import base
from harness.errors import NotFoundError, UserError
from harness.launch import queue
from harness.ledger import cell_rows, store
from harness.ledger.states import Node, StageState, graph_of, graph_of_rows, read_state
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Cell, Grid, build_grid
from harness.study.schema import load_study
from harness.study.select import Chosen, choose
from harness.study.stages import StageFile


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the selectors mean in one study."""

    study: str
    grid: Grid | None
    """None if it cannot be built: then its cells are what was written down of them."""
    cells: Sequence[Cell]
    nodes: Mapping[str, Node]
    """Of its stages."""
    states: Mapping[str, StageState]
    parts: dict[str, Chosen]
    """By selector, of those that mean something here."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A stage to act on; where several studies have it, of the first of them."""

    study: str | None
    """None if no study, of those that can be read, has the stage."""
    folder: StageFolder
    stage: StageFile | None
    """None as above, or if none of them can be built: what can be said to it is said in its
    folder."""
    state: StageState

    @property
    def id(self) -> str:
        """Of the stage."""
        return self.folder.path.name

    @property
    def kind(self) -> str:
        """Of the stage."""
        return self.folder.path.parent.name


@base.no_collection()
def choices(
    tree: Tree,
    study: str | None,
    selectors: list[str],
    known: Collection[str] = (),
    *,
    or_rows: bool = False,
) -> list[Choice]:
    """The studies in which a selector means something.

    Raises NotFoundError or UserError if one means nothing in any of them and is not `known` to
    mean something besides. `or_rows`: of studies that cannot be built any more, too.
    """
    if study is not None:
        cell_rows.read_cells(tree, study)  # raises if there is none of that name
    known_cells, problems = _studies(tree, [study] if study else tree.studies(), or_rows)
    asked = [s for s in dict.fromkeys(selectors) if s not in known]
    if problems and asked and not known_cells:
        raise UserError(*problems)
    for problem, then in problems.items():
        print(f"{problem}; {then}", file=sys.stderr)
    # Of all at once: a scheduler is asked once.
    everything = {s: node for _, _, nodes in known_cells.values() for s, node in nodes.items()}
    all_states = queue.read_graph(tree, everything)
    found = [
        Choice(
            study=name,
            grid=grid,
            cells=cells,
            nodes=nodes,
            states={s: all_states[s] for s in nodes},
            parts={},
        )
        for name, (grid, cells, nodes) in known_cells.items()
    ]
    words = [{s: v.state for s, v in choice.states.items()} for choice in found]
    for selector in dict.fromkeys(selectors):
        errors: list[UserError] = []
        for choice, state in zip(found, words, strict=True):
            try:
                choice.parts[selector] = choose(choice.cells, state, selector)
            except UserError as error:
                errors.append(error)
        if len(errors) == len(found) and selector in asked:
            raise _nearest(tree, errors)
    return [choice for choice in found if choice.parts]


_Study = tuple[Grid | None, Sequence[Cell], Mapping[str, Node]]


def _studies(
    tree: Tree, studies: list[str], or_rows: bool
) -> tuple[dict[str, _Study], dict[str, str]]:
    """Studies by name; what is wrong with those that cannot be built, and what is done about it."""
    found: dict[str, _Study] = {}
    problems: dict[str, str] = {}
    for name in studies:
        try:
            loaded = load_study(tree.study(name) / "study.yaml", store.base_folders(tree, name))
            grid = build_grid(loaded, store.read_ablations(tree, name))
            found[name] = (grid, grid.cells, graph_of(grid.stages))
        except UserError as error:
            first, *rest = error.problems
            more = f" (and {len(rest)} more)" if rest else ""
            then = "it is passed over"
            if or_rows:
                with contextlib.suppress(UserError):
                    rows = cell_rows.read_cells(tree, name)
                    found[name] = (None, [_cell_of(row) for row in rows], graph_of_rows(rows))
                    then = "its cells are taken as they were submitted"
            problems[f"study {name} cannot be read: {first}{more}"] = then
    return found, problems


def _cell_of(row: dict[str, Any]) -> Cell:
    """A cell as its row names it; nobody knows whether it uses all images there are."""
    known = {name: row.get(name) for name in Cell._fields}
    return Cell(**{**known, "is_full": False})  # type: ignore[arg-type]


def _nearest(tree: Tree, errors: list[UserError]) -> UserError:
    """What is wrong with a selector, told as where it was understood, if it was."""
    if not errors:
        return NotFoundError(f"no study in {tree.root}")
    missing = [e for e in errors if isinstance(e, NotFoundError)]
    problems = list(dict.fromkeys(p for e in missing or errors for p in e.problems))
    return NotFoundError(*problems) if missing else UserError(*problems)


def targets(tree: Tree, found: list[Choice], wanted: Callable[[StageState], bool]) -> list[Target]:
    """Chosen stages in a wanted state, each once."""
    kept: dict[str, Target] = {}
    for choice in sorted(found, key=lambda choice: choice.grid is None):
        for stage in (s for part in choice.parts.values() for s in part.stages):
            state = choice.states[stage]
            if stage not in kept and wanted(state):
                own = choice.grid.stages[stage] if choice.grid else None
                folder = tree.stage(choice.nodes[stage].kind, stage)
                kept[stage] = Target(study=choice.study, folder=folder, stage=own, state=state)
    return list(kept.values())


def folders_of(tree: Tree, selectors: list[str]) -> dict[str, list[StageFolder]]:
    """Selectors that are the id of a stage with a folder, or its beginning, and these folders.

    A stage that was left out of its study since has nothing else.
    """
    found: dict[str, list[StageFolder]] = {}
    for path in sorted(tree.root.glob("stages/*/*")):
        for selector in dict.fromkeys(selectors):
            if selector.strip() and path.name.startswith(selector):
                found.setdefault(selector, []).append(StageFolder(path))
    return found


def in_no_study(folders: Mapping[str, list[StageFolder]], found: list[Choice]) -> list[Target]:
    """Stages with a folder that a selector means which means nothing in any study."""
    loose = {
        folder.path: folder
        for selector, own in folders.items()
        if not any(selector in choice.parts for choice in found)
        for folder in own
    }
    return [
        Target(study=None, folder=folder, stage=None, state=read_state(folder))
        for folder in loose.values()
    ]


def free(tree: Tree, found: list[Choice]) -> set[str]:
    """Chosen stages that no cell needs but selected ones, or that were asked for themselves.

    A selector by state selects cells for what it says of their stages: they count as selected for
    these stages only, cells that were selected whole for those of every selector.
    """
    others = set(tree.studies()) - {choice.study for choice in found}
    elsewhere = cell_rows.stages_needed(tree, others)
    kept: set[str] = set()
    for selector in dict.fromkeys(s for choice in found for s in choice.parts):
        along: set[str] = set()
        for part in (c.parts[selector] for c in found if selector in c.parts):
            (kept if part.is_asked else along).update(part.stages)
        if along:
            kept |= along - elsewhere - _needed_besides(found, selector)
    return kept


def _needed_besides(found: list[Choice], selector: str) -> set[str]:
    """Stages of cells that neither this selector selects nor another one whole."""
    needed: set[str] = set()
    for choice in found:
        parts = choice.parts.items()
        inside = {c for s, part in parts if s == selector or part.is_whole for c in part.cells}
        outside = (c for c in choice.cells if c.id not in inside)
        needed.update(stage for cell in outside for stage in cell.stages.values())
    return needed
