"""What several verbs need: the run root, the plan, a submission with its exit code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import harness
from harness.cli import show
from harness.errors import EXIT_FAILED, EXIT_OK, UserError
from harness.launch import queue, settings
from harness.launch.driver import Driver, Mode, reset
from harness.launch.hostfile import machine_of_hostfile
from harness.launch.machine import Machine, detect, this_machine
from harness.ledger import states, store
from harness.ledger.tree import Tree, default_root
from harness.study.cells import Ablation, Grid
from harness.study.plan import Plan, make_plan

_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"


def printable(text: str) -> str:
    """Without what a name from elsewhere could tell the terminal to do; tabs and lines stay."""
    return re.sub(f"[{_CONTROLS}]", _escaped, text)


def one_line(text: str) -> str:
    """The same of a name, which is no place for tabs and lines either."""
    return re.sub(rf"[{_CONTROLS}\t\n\u2028\u2029]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


Root = Annotated[
    Path | None,
    typer.Option("--root", help="Run root. Default: HARNESS_ROOT, or ./runs.", show_default=False),
]


def tree(root: Path | None) -> Tree:
    """The run tree a verb works on: the flag, HARNESS_ROOT, the settings, or ./runs."""
    if root:
        return Tree(root.absolute())
    named = None if os.environ.get("HARNESS_ROOT") else settings.load_settings().root
    return Tree(named.expanduser().absolute() if named else default_root())


def known_ablations(tree: Tree, study: str) -> list[Ablation]:
    """Ablations of the study so far: they stay cells of it when the file is submitted again."""
    return store.read_ablations(tree, study)


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
        most = max((s.execution.ranks for s in grid.stages.values()), default=1)
        return this_machine(profile.device, most)
    return detect()


def plan(
    tree: Tree,
    grid: Grid,
    device: Literal["cpu", "cuda"] | None = None,
    cluster: str | None = None,
) -> tuple[Machine, Plan]:
    """The grid with states and cost on a cluster, or on a machine just large enough of a device."""
    machine = machine_of(cluster, grid)
    if device is not None and device != machine.device:
        most = max(s.execution.ranks for s in grid.stages.values())
        machine = this_machine(device, most)
    found = {k: v.state for k, v in queue.read_states(tree, grid.stages).items()}
    speeds = states.measured_speeds(tree, machine.device)
    return machine, make_plan(grid, found, speeds, len(machine.slots))


def slots() -> int:
    """Stages this machine runs at a time, if each needs one core or GPU."""
    return len(detect().slots)


def print_json(value: dict[str, Any]) -> None:
    """JSON on stdout, indented as long as a person may read it: that takes seconds for a lot."""
    parts = [value, *(v for k, v in value.items() if k == "studies" for v in v)]
    is_large = any(isinstance(v, list) and len(v) > 1000 for p in parts for v in p.values())
    print(json.dumps(value, indent=None if is_large else 1))


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
    cluster: str | None = None,
) -> int:
    """Runs what is missing of `grid`, a part of the study `full`; returns the exit code.

    On a Slurm cluster it only submits: the study then finishes by itself.
    """
    name, profile = settings.find_profile(cluster)
    if mode != "read-only":
        store.register(tree, full, ablations)
    if isinstance(profile, settings.Slurm) and mode != "read-only":
        return _to_slurm(tree, grid, name, profile, mode)
    ssh = profile.ssh if isinstance(profile, settings.Hosts) else ["ssh"]
    with show.Live(plan, machine) as live:
        summary = Driver(grid, tree, machine, plan.speeds, live.update, ssh=ssh).run(mode)
    show.summary(summary, grid, tree, mode)
    if summary.interrupted:
        return 130
    incomplete = mode == "read-only" and summary.left
    bad = summary.failed or summary.blocked or summary.held or incomplete
    return EXIT_FAILED if bad else EXIT_OK


def _to_slurm(tree: Tree, grid: Grid, name: str, profile: settings.Slurm, mode: Mode) -> int:
    from harness.launch import slurm  # submitit is slow to import, and only needed here

    study = grid.loaded.study
    reset(tree, grid.stages, queue.read_states(tree, grid.stages), mode, study.retry)
    done = slurm.submit(tree, study.name, grid.stages, profile, study.retry)
    found = queue.read_states(tree, grid.stages)
    show.submitted(done, grid, name, found)
    bad = [s for s in found.values() if s.state in states.FAILED]
    return EXIT_FAILED if bad else EXIT_OK
