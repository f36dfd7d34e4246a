"""`harness grid`: plan a study, or run what is missing of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli import base, shared, show_study
from harness.errors import UserError
from harness.launch.machine import Machine
from harness.launch.modes import Mode
from harness.ledger import store
from harness.ledger.tree import Tree
from harness.study.cells import TUNE, Ablation, Grid, build_grid, only
from harness.study.plan import Plan, check_budget
from harness.study.schema import load_study
from harness.study.select import select

Device = Literal["cpu", "cuda"]

_EXAMPLE = """Example:

  harness grid grids/scale_study.yaml

  harness grid grids/scale_study.yaml --only 'size=d32x3,init=mae' --submit
"""


def grid(
    file: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    submit: Annotated[bool, typer.Option("--submit", help="Run what is missing.")] = False,
    selection: Annotated[
        list[str] | None,
        typer.Option("--only", help="Cells: 'axis=value[|value],axis=value'. Several add up."),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="cached: run what is missing; retry: failed ones too; force: all anew;"
            " read-only: run nothing."
        ),
    ] = "cached",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    device: Annotated[
        Device | None, typer.Option(help="Estimate times for this device, not for this machine.")
    ] = None,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Stop everything once a stage has failed for good.")
    ] = False,
    cluster: shared.Cluster = None,
    root: base.Root = None,
) -> int:
    """Plan a study file: cells, shared stages, cost. With --submit, run what is missing."""
    tree = base.tree(root)
    if device and submit:
        raise UserError("--device is for estimates; where stages run is the machine's own matter")
    if as_json and submit:
        raise UserError(
            "--json prints the plan; with --submit use `harness status --json` afterwards"
        )
    if mode != "cached" and not submit:
        raise UserError(f"--mode {mode} says how to run; add --submit, or leave it out for a plan")
    only_these = None if selection is None else ",".join(selection)
    with base.no_collection():
        full, ablations, grid, machine, plan = _planned(tree, file, only_these, device, cluster)
        if not submit:
            base.hold((full, plan))
            if as_json:
                base.print_json(plan.to_json())
            else:
                show_study.plan(plan, tree, len(machine.slots))
            return 0
    check_budget(plan)
    shared.check_images(grid)
    shared.check_drift(tree, grid)
    write = partial(shared.register, tree, full, ablations)
    return shared.submit(tree, grid, machine, plan, mode, cluster, write=write, fail_fast=fail_fast)


def _planned(
    tree: Tree, file: Path, selection: str | None, device: Device | None, cluster: str | None
) -> tuple[Grid, list[Ablation], Grid, Machine, Plan]:
    """The whole grid with its ablations, the part that was selected, and the plan of that part."""
    loaded = load_study(shared.study_file(file))
    # What `harness run` added stays a part of the study when its file is submitted again.
    ablations = store.read_ablations(tree, loaded.study.name)
    full = build_grid(loaded, ablations)
    # Trials of a search are cells too, but theirs is `harness tune`: a pruned one stays pruned.
    own = [c for c in full.cells if c.tag != TUNE]
    grid = only(full, select(own, selection))
    return full, ablations, grid, *shared.plan(tree, grid, device, cluster)


grid.__doc__ = f"{grid.__doc__}\n\n{_EXAMPLE}"
