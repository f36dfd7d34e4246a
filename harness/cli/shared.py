"""What several verbs need: the run root, the plan, a submission with its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import harness
from harness.cli import show
from harness.errors import EXIT_FAILED, EXIT_OK, UserError
from harness.launch.driver import Driver, Mode
from harness.launch.machine import Machine, detect, this_machine
from harness.ledger import states, store
from harness.ledger.tree import Tree, default_root
from harness.study.cells import Ablation, Grid
from harness.study.plan import Plan, make_plan

Root = Annotated[
    Path | None,
    typer.Option("--root", help="Run root. Default: HARNESS_ROOT, or ./runs.", show_default=False),
]


def tree(root: Path | None) -> Tree:
    """The run tree a verb works on."""
    return Tree(root.absolute() if root else default_root())


def known_ablations(tree: Tree, study: str) -> list[Ablation]:
    """Ablations of the study so far: they stay cells of it when the file is submitted again."""
    return store.read_ablations(tree, study)


def plan(
    tree: Tree, grid: Grid, device: Literal["cpu", "cuda"] | None = None
) -> tuple[Machine, Plan]:
    """The grid with states and cost on this machine, or on one just large enough of a device."""
    machine = detect()
    if device is not None and device != machine.device:
        most = max(s.execution.ranks for s in grid.stages.values())
        machine = this_machine(device, most)
    found = {k: v.state for k, v in states.read_states(tree, grid.stages).items()}
    speeds = states.measured_speeds(tree, machine.device)
    return machine, make_plan(grid, found, speeds, len(machine.slots))


def slots() -> int:
    """Stages this machine runs at a time, if each needs one core or GPU."""
    return len(detect().slots)


def study_file(path: Path) -> Path:
    """The file itself, or the shipped study of that name (`grids/smoke.yaml`)."""
    package = Path(harness.__file__).parent
    # Inside the package when installed from a wheel, beside it in a checkout.
    for folder in (package, package.parent):
        shipped = folder / "grids" / path.name
        if not path.exists() and path.parent.name == "grids" and shipped.is_file():
            return shipped
    return path


def check_images(grid: Grid) -> None:
    """Raises UserError if the study's images are only described, not here."""
    for spec, meta in grid.datasets.items():
        if meta.is_planned:
            raise UserError(
                f"{spec}: describes {meta.name} for planning; pack your own images with"
                " `harness data pack SRC --out DIR` and set `dataset: DIR`"
            )


def check_drift(tree: Tree, grid: Grid) -> None:
    """Raises UserError if a stored stage is not what its id says it is."""
    lines = states.check_drift(tree, grid)
    if lines:
        raise UserError(
            *lines, "an id stands for its config: restore the stage folders above or remove them"
        )


def submit(
    tree: Tree,
    full: Grid,
    ablations: list[Ablation],
    grid: Grid,
    machine: Machine,
    plan: Plan,
    mode: Mode,
) -> int:
    """Runs what is missing of `grid`, a part of the study `full`; returns the exit code."""
    if mode != "read-only":
        store.register(tree, full, ablations)
    with show.Live(plan, machine) as live:
        summary = Driver(grid, tree, machine, plan.speeds, live.update).run(mode)
    show.summary(summary, grid, tree, mode)
    if summary.interrupted:
        return 130
    incomplete = mode == "read-only" and summary.left
    return EXIT_FAILED if summary.failed or summary.blocked or incomplete else EXIT_OK
