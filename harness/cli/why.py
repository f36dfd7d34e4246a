"""`harness why`: what would run of a study file, and why it is not there already."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from harness.cli import base, shared, show
from harness.errors import EXIT_OK
from harness.launch import queue
from harness.ledger import store
from harness.ledger.why import reasons
from harness.study.cells import TUNE, build_grid, only
from harness.study.schema import load_study
from harness.study.select import select

_SHOWN = 50


def why(
    file: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    selection: Annotated[
        list[str] | None,
        typer.Option("--only", help="Cells: 'axis=value[|value],axis=value'. Several add up."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    root: base.Root = None,
) -> int:
    """Say of every stage that is not done why: new (and what differs from the nearest), stale, ...

    Example:

      harness why grids/scale_study.yaml --only 'size=d32x3,init=mae'
    """
    tree = base.tree(root)
    loaded = load_study(shared.study_file(file))
    full = build_grid(loaded, store.read_ablations(tree, loaded.study.name))
    own = [c for c in full.cells if c.tag != TUNE]
    grid = only(full, select(own, None if selection is None else ",".join(selection)))
    states = queue.read_states(tree, grid.stages)
    found = reasons(tree, grid.stages, states)
    if as_json:
        print(json.dumps({"schema": 1, "stages": [asdict(w) for w in found]}, indent=1))
        return EXIT_OK
    out = show.console()
    for w in itertools.islice(found, _SHOWN):
        lines = [f"{escape(w.stage)}  ({show.state_text(w.state)}) {show.plain(w.text)}"]
        if w.nearest is not None:
            lines.append(f"  nearest: {escape(w.nearest)}")
            lines += [f"    {show.plain(line)}" for line in w.diff]
        out.print("\n".join(lines), soft_wrap=True)
    count = sum(state.state != "done" for state in states.values())
    if count > _SHOWN:
        out.print(f"... and {count - _SHOWN} more: --only AXIS=VALUE, or --json for all")
    if not count:
        out.print("nothing would run: all stages are done")
    return EXIT_OK
