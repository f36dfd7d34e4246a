"""What several verbs need: the run root, the plan, a submission with its exit code."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

import harness
from harness.cli import show_study
from harness.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UserError
from harness.launch import queue, settings
from harness.launch.hostfile import machine_of_hostfile
from harness.launch.machine import Machine, detect, this_machine
from harness.launch.modes import Mode
from harness.ledger import cell_rows, drift, states, store
from harness.ledger.speeds import measured_speeds
from harness.ledger.tree import Tree
from harness.study.cells import Ablation, Grid
from harness.study.plan import Plan, make_plan
from harness.study.stage_set import outlines

_COMMAND_S = 600.0

Cluster = Annotated[
    str | None,
    typer.Option(
        help="Where stages run: local, slurm, or a profile of the settings file."
        " Default: HARNESS_CLUSTER, the settings, or local.",
        show_default=False,
    ),
]


def machine_of(cluster: str | None, grid: Grid) -> Machine:
    """What a cluster offers; of a Slurm cluster, room for the largest stage of the grid."""
    _, profile = settings.find_profile(cluster)
    if isinstance(profile, settings.Hosts):
        return machine_of_hostfile(profile.hostfile.expanduser(), profile.device)
    if isinstance(profile, settings.Slurm):
        return this_machine(profile.device, _most_ranks(grid))
    return detect()


def _most_ranks(grid: Grid) -> int:
    known = outlines(grid.stages).values()
    return max((outline.like.execution.ranks for outline in known), default=1)


def plan(
    tree: Tree,
    grid: Grid,
    device: Literal["cpu", "cuda"] | None = None,
    cluster: str | None = None,
) -> tuple[Machine, Plan]:
    """The grid with states and cost on a cluster, or on a machine just large enough of a device."""
    machine = machine_of(cluster, grid)
    if device is not None and device != machine.device:
        machine = this_machine(device, _most_ranks(grid))
    found = {k: v.state for k, v in queue.read_states(tree, grid.stages).items()}
    speeds = measured_speeds(tree, machine.device)
    return machine, make_plan(grid, found, speeds, len(machine.slots))


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
    lines = drift.check_drift(tree, grid)
    if lines:
        raise UserError(
            *lines, "an id stands for its config: restore the stage folders above or remove them"
        )


def check_records() -> None:
    """Raises UserError if a record is asked for whose package is missing."""
    wanted = {"HARNESS_MONGO_URL": ("pymongo", "mongo")}
    wanted["HARNESS_TENSORBOARD"] = ("tensorboard", "tensorboard")
    for variable, (package, extra) in wanted.items():
        if os.environ.get(variable) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{variable} is set, but {package} is not installed; unset it, or"
                f" pip install 'vision-scaling-harness[{extra}]'"
            )


def register(tree: Tree, grid: Grid, ablations: list[Ablation]) -> None:
    """Writes the study down; says which stages still run that are in no study any more."""
    dropped = store.register(tree, grid, ablations)
    needed = cell_rows.stages_needed(tree, tree.studies()) if dropped else set()
    graph = {s: states.PlainNode(k, ()) for s, k in dropped.items() if s not in needed}
    found = queue.read_graph(tree, graph)
    active = [s for s, state in found.items() if state.state in states.ACTIVE]
    if active:
        shown = ", ".join(active[:5]) + (" ..." if len(active) > 5 else "")
        print(
            f"{len(active)} stages that are no longer in the study still run or wait: {shown};"
            " `harness cancel ID` stops them",
            file=sys.stderr,
        )


def submit(
    tree: Tree,
    grid: Grid,
    machine: Machine,
    plan: Plan,
    mode: Mode,
    cluster: str | None = None,
    *,
    write: Callable[[], None] = lambda: None,
    fail_fast: bool = False,
) -> int:
    """Runs what is missing of `grid`, a study or a part of one; returns the exit code.

    `write`: called before anything runs, unless mode is read-only, to write down what is to be a
    part of the study. On a Slurm cluster it only submits: the study then finishes by itself.
    """
    name, profile = settings.find_profile(cluster)
    if fail_fast and isinstance(profile, settings.Slurm):
        raise UserError(
            f"--fail-fast: on cluster '{name}' jobs outlive this command, and nobody would stop"
            " the others; leave it out, or choose another --cluster"
        )
    if mode != "read-only":
        check_records()
        write()
    if isinstance(profile, settings.Slurm) and mode != "read-only":
        return _to_slurm(tree, grid, name, profile, mode)
    from harness.launch.driver import Driver  # a plan does without

    ssh = profile.ssh if isinstance(profile, settings.Hosts) else ["ssh"]
    with show_study.Live(plan, machine) as live:
        driver = Driver(grid, tree, machine, plan.speeds, live.update, ssh=ssh, fail_fast=fail_fast)
        summary = driver.run(mode)
    show_study.summary(summary, grid, tree, mode)
    if summary.interrupted:
        return EXIT_INTERRUPTED
    incomplete = mode == "read-only" and summary.left
    bad = summary.failed or summary.blocked or summary.held or incomplete
    return EXIT_FAILED if bad else EXIT_OK


def _to_slurm(tree: Tree, grid: Grid, name: str, profile: settings.Slurm, mode: Mode) -> int:
    from harness.launch import slurm  # submitit is slow to import, and only needed here
    from harness.launch.driver import reset

    study = grid.loaded.study
    # The plan has asked the queue; what it said is good for all of this command.
    found = queue.read_states(tree, grid.stages, max_age_s=_COMMAND_S)
    reset(tree, grid.stages, found, mode, study.retry)
    done = slurm.submit(tree, study.name, grid.stages, profile, study.retry)
    found = queue.read_states(tree, grid.stages, max_age_s=_COMMAND_S)
    show_study.submitted(done, grid, name, found)
    bad = [s for s in found.values() if s.state in states.FAILED]
    is_short = done.left and done.caretaker is None
    return EXIT_FAILED if bad or is_short else EXIT_OK
