"""`harness tune`: search hyper-parameters on one cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from harness.cli import shared
from harness.cli.run import find_in_studies
from harness.errors import UserError
from harness.ledger import store
from harness.ledger.files import read_json
from harness.study.cells import Ablation, Cell, Grid, build_grid, only
from harness.study.schema import load_study


def tune(
    cell: Annotated[str, typer.Argument(help="Name or id of a cell; a small one.")],
    params: Annotated[
        list[str], typer.Option("--param", help="wsp.lr=1e-4..1e-2:log or wsp.batch=64|128.")
    ],
    metric: Annotated[
        str, typer.Option(help="Stage and metric; less is better if its name has loss.")
    ] = "wsp.val_loss",
    trials: Annotated[int, typer.Option(min=1, help="Trials to add.")] = 8,
    study: Annotated[str | None, typer.Option(help="Study, if several have the cell.")] = None,
    root: shared.Root = None,
) -> int:
    """Search hyper-parameters on one cell with optuna; every trial is a cell of the study.

    Example:

      harness tune d32x3-16k-random-s0 --param wsp.lr=3e-4..1e-2:log --trials 8
    """
    # optuna takes half a second to import; the other verbs must not wait for it
    from harness import tune as tuner

    tree = shared.tree(root)
    name, row = find_in_studies(tree, cell, study)
    role, _, key = metric.partition(".")
    if role not in row["stages"] or not key:
        raise UserError(
            f"--metric {metric!r}: expected stage.metric; stages: {', '.join(row['stages'])}"
        )
    space = dict(tuner.parse_space(p) for p in params)
    loaded = load_study(tree.study(name) / "study.yaml", store.base_folders(tree, name))
    machine = shared.detect()

    def run(round_: Sequence[dict[str, Any]]) -> list[float | None]:
        ablations = store.read_ablations(tree, name)
        new = [
            Ablation(parent=row["id"], values=row["axes"], set=dict(values), tag="tune")
            for values in round_
        ]
        ablations += [a for a in new if a not in ablations]
        full = build_grid(loaded, ablations)
        cells = [_cell_of(full, a) for a in new]
        # The metric's stage and what it starts from; other tasks would only cost time.
        needed = {"mae", "wsp", role}
        parts = {
            c.id: replace(c, stages={r: s for r, s in c.stages.items() if r in needed})
            for c in cells
        }
        grid = only(full, list(parts.values()))
        _, plan = shared.plan(tree, grid)
        shared.submit(tree, full, ablations, grid, machine, plan, "cached")
        found = []
        for wanted in cells:
            stage = grid.stages[wanted.stages[role]]
            result = read_json(tree.stage(stage.kind, stage.id).result) or {}
            found.append(result.get("metrics", {}).get(key))
        return found

    best = tuner.search(
        tree.root / "tune" / f"{name}.journal",
        f"{row['name']} {metric} {' '.join(sorted(space))}",
        space,
        maximize="loss" not in key,
        trials=trials,
        parallel=len(machine.slots),
        seed=0,
        run=run,
    )
    print(f"best of {best.finished} trials: {metric} {best.metric:.4f} with")
    for field, value in best.values.items():
        print(f"  {field}: {value}")
    return 0


def _cell_of(grid: Grid, ablation: Ablation) -> Cell:
    return next(c for c in grid.cells if c.parent == ablation.parent and c.set == ablation.set)
