"""`harness gc`: gives back the space of what no stage will read again."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from harness.cli import base, show
from harness.errors import EXIT_OK
from harness.launch import queue
from harness.ledger import gc as waste_of

_SHOWN = 50


def gc(
    study: Annotated[str | None, typer.Argument(help="Only this study; all by default.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove it; without, only say what would go.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    root: base.Root = None,
) -> int:
    """Remove checkpoints of done stages and what killed attempts left; dry without --yes.

    Weights, results and the last checkpoint of every stage that may go on from it stay.

    Example:

      harness gc scale_study
    """
    tree = base.tree(root)
    wanted = waste_of.stages_of(tree, study)
    graph = waste_of.graph_of_all(tree)
    states = queue.read_graph(tree, graph)
    found = waste_of.find(tree, graph, states, wanted)
    if yes:
        found = waste_of.remove(tree, found, states)
    total = sum(w.size for w in found)
    if as_json:
        rows = [
            {"stage": w.stage, "kind": w.kind, "path": str(w.path), "why": w.why, "bytes": w.size}
            for w in found
        ]
        answer: dict[str, Any] = {"schema": 1, "applied": yes, "bytes": total, "removed": rows}
        print(json.dumps(answer, indent=1))
        return EXIT_OK
    out = show.console()
    for one in found[:_SHOWN]:
        name = one.path.relative_to(tree.root)
        out.print(f"{one.size:>15,}  {escape(str(name))}  ({one.why})", soft_wrap=True)
    if len(found) > _SHOWN:
        out.print(f"... and {len(found) - _SHOWN} more")
    if not found:
        out.print("nothing to remove")
    elif yes:
        out.print(f"removed {total:,} bytes")
    else:
        out.print(f"would remove {total:,} bytes; add --yes to do it")
    return EXIT_OK
