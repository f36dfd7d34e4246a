"""`harness run`: one cell, here, now; with --set an ablation of it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from harness.cli import base, shared
from harness.errors import UserError
from harness.launch.modes import Mode
from harness.ledger import cell_rows, store
from harness.ledger.tree import Tree
from harness.study.cells import Ablation, build_grid, only
from harness.study.schema import check_name, load_study
from harness.study.select import find_cell, spellings
from harness.study.source import parse_value


def run(
    cell: Annotated[str, typer.Argument(help="Name or id of a cell; the start of an id will do.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Field to change: wsp.lr=3e-4. Repeatable.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Name of the ablation.")] = None,
    study: Annotated[str | None, typer.Option(help="Study, if several have the cell.")] = None,
    mode: Annotated[Mode, typer.Option(help="As in `harness grid`.")] = "cached",
    cluster: shared.Cluster = None,
    root: base.Root = None,
) -> int:
    """Run one cell of a submitted study. With --set, run a changed copy that remembers its parent.

    Stages that the change does not touch are reused.

    Example:

      harness run d32x3-4k-mae-s0 --set wsp.lr=3e-4 --tag low-lr
    """
    tree = base.tree(root)
    name, row = find_in_studies(tree, cell, study)
    loaded = load_study(tree.study(name) / "study.yaml", store.base_folders(tree, name))
    ablations = store.read_ablations(tree, name)
    wanted, own = row["id"], []
    if changes or tag:
        new = Ablation(
            parent=row["id"], values=row["axes"], set=_parse(changes or []), tag=_tag(tag)
        )
        before = {c.id for c in build_grid(loaded, ablations).cells}
        own = [new]
        if new not in ablations:
            ablations = [*ablations, new]
        added = [c for c in build_grid(loaded, ablations).cells if c.id not in before]
        same = [c for c in build_grid(loaded, [new]).cells if c.parent == row["id"]]
        if not added and not same:
            raise UserError(f"--set changes nothing: {row['id']} has these values already")
        wanted = (added or same)[0].id
    full = build_grid(loaded, ablations)
    grid = only(full, [c for c in full.cells if c.id == wanted])
    machine, plan = shared.plan(tree, grid, cluster=cluster)
    shared.check_drift(tree, grid)
    print(f"cell {wanted}")
    write = partial(store.add_ablations, tree, name, own)
    return shared.submit(tree, grid, machine, plan, mode, cluster, write=write)


def find_in_studies(
    tree: Tree, cell: str, study: str | None, stages_too: bool = False
) -> tuple[str, dict[str, Any]]:
    """Study and row of a cell. Raises NotFoundError or, if several cells are meant, UserError.

    `stages_too`: of a cell of several studies the first will do, as its stages are the same; and
    the id of a stage, as progress and failures name it, is a cell of that stage only.
    """
    names = [study] if study else tree.studies()
    rows = [{**row, "study": name} for name in names for row in cell_rows.read_cells(tree, name)]
    of_stage = next((r for r in rows if cell in r["stages"].values()), None)
    if stages_too and of_stage is not None:
        roles = {role: s for role, s in of_stage["stages"].items() if s == cell}
        return of_stage["study"], {**of_stage, "stages": roles}
    exact = [r for r in rows if cell in (r["id"], r["name"], *spellings(r["name"], r.get("tag")))]
    if len({r["id"] for r in exact}) > 1 and len({r["study"] for r in exact}) > 1:
        raise UserError(f"cell '{cell}' is {_in_studies(exact)}")
    each = {row["id"]: row for row in reversed(rows)}  # of the first study that has it
    row = find_cell([*reversed(each.values())], cell)
    same = [r for r in rows if r["id"] == row["id"]]
    if len(same) > 1 and not stages_too:
        raise UserError(f"cell '{row['id']}' is {_in_studies(same)}")
    return row["study"], row


def _in_studies(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["study"] for row in rows))
    return f"in studies {' and '.join(names)}; add --study {names[0]}"


def _tag(tag: str | None) -> str | None:
    try:
        return check_name(tag) if tag else None
    except ValueError as error:
        raise UserError(f"--tag {error}") from None


def _parse(changes: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {change!r}: expected field=value, such as wsp.lr=3e-4")
        parsed[key.strip()] = parse_value(text)
    return parsed
