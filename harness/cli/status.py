"""`harness status`: where the studies of a run root are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from harness.cli import base, show
from harness.launch import queue
from harness.ledger import summary
from harness.ledger.states import RESUMABLE, Node, StageState
from harness.ledger.tree import Tree
from harness.units import format_seconds, format_si

_QUIET_S = 20.0
"""`--watch` ends when nobody has run anything for so long."""
_MOST_LINES = 10
"""Stages of one state that are shown one by one."""


def status(
    study: Annotated[str | None, typer.Argument(help="Name of the study; all by default.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until all is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    root: base.Root = None,
) -> int:
    """Show cells and stages by state, progress of running stages, failures with their reason.

    Example:

      harness status scale_study --watch
    """
    tree = base.tree(root)
    if as_json:
        with base.no_collection():
            base.print_json(summary.summarise(tree, study, _read))
        return 0
    if not watch:
        with base.no_collection():
            found = summary.summarise(tree, study, _read, _MOST_LINES)
        out = show.console()
        for part in _render(found):
            out.print(part)
        return 0
    quiet_since: float | None = None
    with Live(console=show.console(), refresh_per_second=2) as live:
        while True:
            now = summary.summarise(tree, study, queue.read_graph, _MOST_LINES)
            live.update(Group(*_render(now)))
            if any(s["active"] for s in now["studies"]):
                quiet_since = None
            else:
                # Between two stages, or two attempts, nobody runs for a moment.
                quiet_since = quiet_since or time.monotonic()
                is_open = any(r["state"] in RESUMABLE for s in now["studies"] for r in s["stages"])
                if not is_open or time.monotonic() - quiet_since > _QUIET_S:
                    return 0
            # A scheduler serves many: its queue is not asked every second.
            rows = (r for s in now["studies"] for r in s["running"])
            in_queue = any(r.get("job") or r.get("token") for r in rows)
            time.sleep(10.0 if in_queue else 1.0)


def _read(tree: Tree, graph: Mapping[str, Node]) -> dict[str, StageState]:
    return base.hold((graph, queue.read_graph(tree, graph)))[1]


def _render(found: dict[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if not found["studies"]:
        parts.append(f"no study in {escape(found['root'])}; run `harness grid FILE --submit`")
    for study in found["studies"]:
        parts += _study(study)
    if queue.is_silent():
        parts.append(
            "squeue does not answer here: what was in its queue is shown as in it; `harness cancel`"
            " and `resume` give a job up"
        )
    return parts


def _study(study: dict[str, Any]) -> list[RenderableType]:
    cells = ", ".join(f"{n} {show.state_text(s)}" for s, n in study["cells"].items())
    parts: list[RenderableType] = [f"[bold]{escape(study['name'])}[/]  cells: {cells}"]
    table = Table(box=None, pad_edge=False)
    for name in ("stages", "done", "running", "waiting", "failed", "blocked", "other"):
        table.add_column(name, justify="left" if name == "stages" else "right")
    for kind, states in study["kinds"].items():
        known = {
            "done": states.get("done", 0),
            "running": states.get("running", 0) + states.get("submitted", 0),
            "waiting": states.get("planned", 0) + states.get("waiting", 0),
            "failed": sum(states.get(s, 0) for s in ("failed", "diverged")),
            "blocked": states.get("blocked", 0),
        }
        other = sum(states.values()) - sum(known.values())
        table.add_row(kind, *(str(v) if v else "" for v in known.values()), str(other or ""))
    parts.append(table)
    for stage in study["running"]:
        step, steps = stage.get("step") or 0, stage.get("steps") or 0
        rate, loss = stage.get("samples_per_s"), stage.get("loss")
        bits = [
            f"{step / steps:.0%}" if steps else "",
            f"{format_si(rate)} samples/s" if rate else "",
            f"{format_seconds(stage['eta_s'])} left" if stage.get("eta_s") is not None else "",
            f"loss {loss:.4f}" if loss is not None else "",
            f"{stage['memory_gib']:.1f} GiB" if stage.get("memory_gib") else "",
            f"attempt {stage['attempt']}" if (stage["attempt"] or 1) > 1 else "",
            f"job {stage['job']}" if stage.get("job") else "",
            f"({show.plain(stage['queue_reason'])})" if stage.get("queue_reason") else "",
            f"on {stage['host'].partition(':')[0]}" if stage.get("job") and stage["host"] else "",
        ]
        line = f"  {stage['state']} {escape(stage['id'])}  " + "  ".join(b for b in bits if b)
        if stage["stands_still_s"] is not None:
            since = format_seconds(stage["stands_still_s"])
            line += f"  (no sign of process {stage['pid']} for {since}: stopped, or its disk hangs)"
        if stage["last_failure"] is not None:
            last = stage["last_failure"]
            line += show.plain(f"  (attempt {last['attempt']} ended: {_why(last)})")
        parts.append(line)
    parts += _more(study, "submitted")
    for stage in study["failed"]:
        said = show.plain(_tries(stage) + _why(stage))
        parts.append(f"  {show.state_text(stage['state'])} {escape(stage['id'])}  {said}")
    parts += _idle(study)
    cost = study["harness_s"]
    if cost is not None:
        parts.append(
            f"  time per finished stage: {cost['total']:.2f} s, of it {cost['harness']:.2f} s"
            f" outside training and evaluation ({cost['share']:.0%} of all time)"
        )
    return parts


def _tries(row: Mapping[str, Any]) -> str:
    """How many there were, of a stage that was tried more than once."""
    return f"after {row['attempt']} attempts: " if (row["attempt"] or 1) > 1 else ""


def _why(row: Mapping[str, Any]) -> str:
    """Reason and message, each if there is one, once if they are the same."""
    return ": ".join(dict.fromkeys(str(w) for w in (row["reason"], row["message"]) if w))


def _idle(study: dict[str, Any]) -> list[RenderableType]:
    """Stages that nobody runs now and that have not failed, and why."""
    parts: list[RenderableType] = []
    for state in ("preempted", "timeout", "cancelled", "blocked", "waiting"):
        rows = [r for r in study["stages"] if r["state"] == state]
        for row in rows[:_MOST_LINES]:
            why = _tries(row) + _why(row) if state != "waiting" else ""
            if row["waits_for"] and state in ("blocked", "waiting"):
                why += f"{' ' if why else ''}waits for {', '.join(row['waits_for'])}"
            name = escape(row["id"])
            parts.append(f"  {show.state_text(state)} {name}  {show.plain(why)}".rstrip())
        parts += _more(study, state)
    return parts


def _more(study: dict[str, Any], state: str) -> list[RenderableType]:
    count = sum(states.get(state, 0) for states in study["kinds"].values())
    if count <= _MOST_LINES:
        return []
    return [f"  ... and {count - _MOST_LINES} more {state}; --json has all"]
