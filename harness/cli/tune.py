"""`harness tune`: search learning rates or any other field, the same budget for every group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import base, shared, show_study
from harness.errors import EXIT_FAILED, EXIT_OK, UserError
from harness.launch import settings
from harness.launch.driver import Driver
from harness.launch.modes import Mode
from harness.ledger import tuned
from harness.study.cells import build_grid
from harness.study.groups import groups_of
from harness.study.schema import load_study
from harness.study.select import select


def tune(
    file: Annotated[Path, typer.Argument(help="Study file (YAML) with a section `tune`.")],
    selection: Annotated[
        str | None, typer.Option("--only", help="Groups: 'axis=value[|value],axis=value'.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials of each group in all, instead of the file's.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Database URL for optuna's record. Default: a journal in the run tree."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="retry: run failed stages of open trials again.")
    ] = "cached",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    cluster: shared.Cluster = None,
    root: base.Root = None,
) -> int:
    """Search the study's `tune` section with optuna; every trial is a cell of the study.

    Kill it and run it again: it goes on. Run it several times at once: they share the work.

    Example:

      harness tune grids/tune_small.yaml
    """
    # optuna takes half a second to import; the other verbs must not wait for it
    from harness.tune import Search

    tree = base.tree(root)
    profile = _profile(cluster, mode)
    loaded = load_study(shared.study_file(file))
    grid = build_grid(loaded)
    section, groups = groups_of(grid)
    if trials is not None:
        section = section.model_copy(update={"trials": trials})
    shown = groups
    if selection:
        chosen = {c.id for c in select([g.cell for g in groups], selection)}
        shown = [g for g in groups if g.cell.id in chosen]
    shared.check_images(grid)
    shared.check_drift(tree, grid)
    slots = len(shared.machine_of(cluster, grid).slots) if mode != "read-only" else 1
    search = Search(grid, section, shown, tree, storage, slots)
    interrupted = False
    if mode != "read-only" and search.missing:
        shared.register(tree, grid, [])
        search.register()
        part = replace(grid, cells=[], stages=dict(search.stages), feeds={})
        machine, plan = shared.plan(tree, part, cluster=cluster)
        ssh = profile.ssh if isinstance(profile, settings.Hosts) else ["ssh"]
        with show_study.Live(plan, machine) as live:
            driver = Driver(part, tree, machine, plan.speeds, live.update, search, ssh)
            interrupted = driver.run(mode).interrupted
        search.register()
    # All groups, also those of an earlier call with another --only.
    whole = search if shown == groups else Search(grid, section, groups, tree, storage, 1)
    result = tuned.write(tree, loaded.study.name, section, whole.rows())
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _print(result, tree.tune(loaded.study.name, "yaml"))
    failed = search.failed()
    for stage, message in failed.items():
        print(f"{stage} failed: {message}; its trial stays open, run again with --mode retry")
    if interrupted:
        return 130
    return EXIT_FAILED if failed or search.missing else EXIT_OK


def _profile(cluster: str | None, mode: Mode) -> settings.Local | settings.Hosts | settings.Slurm:
    """Where trials run. Raises UserError for Slurm: which trial is next, a process has to say."""
    name, profile = settings.find_profile(cluster)
    if isinstance(profile, settings.Slurm) and mode != "read-only":
        raise UserError(
            f"tune: cluster '{name}' is a Slurm cluster, and a search runs its trials itself, here"
            " or on a list of hosts; start it inside of an allocation with --cluster local, or"
            " choose a profile of kind hosts"
        )
    return profile


def _print(result: Mapping[str, Any], fragment: Path) -> None:
    for group in result["groups"]:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(group["counts"].items()))
        best = group["best"]
        if best is None:
            print(f"{group['label']}: no finished trial ({counts or 'none asked'})")
            continue
        values = ", ".join(f"{k} {v}" for k, v in best["set"].items())
        print(f"{group['label']}: {values}, {result['metric']} {best['value']:.4f} ({counts})")
        for key, end in group["at_edge"].items():
            space = group["space"][key]
            print(
                f"  {key} lies at the {end} end of {space['low']:g} to {space['high']:g};"
                " widen the range"
            )
    used = ", ".join(f"{arm} {n}" for arm, n in result["budget_used"].items())
    print(f"trials used: {used}")
    print(f"overrides: {fragment}")
