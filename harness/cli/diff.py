"""`harness diff`: two cells side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.cli import base, show
from harness.cli.run import find_in_studies
from harness.errors import EXIT_OK
from harness.launch import queue
from harness.ledger import states
from harness.ledger.compare import StageDiff, compare
from harness.study.identity import field_diff


def diff(
    first: Annotated[
        str, typer.Argument(help="Name or id of a cell, or id of a stage.", metavar="A")
    ],
    second: Annotated[str, typer.Argument(help="Name or id of another.", metavar="B")],
    study: Annotated[str | None, typer.Option(help="Study, if several have the cells.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    root: base.Root = None,
) -> int:
    """Compare two cells: axes, fields of every stage, code, and metrics.

    Example:

      harness diff d32x3-4k-random-s0 d32x3-4k-mae-s0
    """
    tree = base.tree(root)
    rows = [find_in_studies(tree, cell, study, stages_too=True)[1] for cell in (first, second)]
    known = queue.read_graph(tree, states.graph_of_rows(rows))
    found = compare(tree, rows[0], rows[1], known)
    one, other = ({**row["axes"], **row.get("set", {})} for row in rows)
    axes = field_diff(one, other)
    if as_json:
        about = {"schema": 1, "cells": [r["id"] for r in rows], "axes": axes}
        print(json.dumps({**about, "stages": [asdict(d) for d in found]}, indent=1))
        return EXIT_OK
    out = show.console()
    for name, row in zip("AB", rows, strict=True):
        out.print(f"{name}  [bold]{escape(row['id'])}[/]")
    out.print("\n".join(f"   {show.plain(line)}" for line in axes) or "   no axis differs")
    for stage in found:
        _print(out, stage)
    return EXIT_OK


def _print(out: Console, one: StageDiff) -> None:
    if one.is_shared:
        out.print(f"{escape(one.role)}: both use {escape(one.stages[0])} ({one.states[0]})")
        return
    words = " | ".join(show.state_text(state) for state in one.states)
    out.print(f"{escape(one.role)}: {escape(one.stages[0])} | {escape(one.stages[1])}  ({words})")
    lines = [*one.fields]
    if None not in one.code and one.code[0] != one.code[1]:
        lines.append(f"code: {one.code[0]} -> {one.code[1]}")
    for line in lines:
        out.print(f"   {show.plain(line)}")
    if one.metrics:
        out.print(_table(one))


def _table(one: StageDiff) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 3))
    table.add_column("metric", no_wrap=True)
    for name in ("A", "B", "B - A"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (a, b) in one.metrics.items():
        delta = f"{b - a:+.4g}" if a is not None and b is not None else ""
        table.add_row(escape(name), *("" if v is None else f"{v:.6g}" for v in (a, b)), delta)
    return table
