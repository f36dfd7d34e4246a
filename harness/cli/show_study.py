"""A study for people: tables and live progress; plain text when piped."""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.cli.show import console, one_line, plain, state_text
from harness.launch.machine import Machine
from harness.launch.modes import Mode
from harness.ledger.states import StageState
from harness.ledger.tree import Tree
from harness.study.cells import Cell, Grid
from harness.study.plan import Plan, unseen_images
from harness.study.stage_set import families, outlines
from harness.units import format_count, format_seconds, format_si

if TYPE_CHECKING:
    # What a plan does without.
    from harness.launch.progress import Progress, Summary
    from harness.launch.slurm import Submitted


def plan(plan: Plan, tree: Tree, slots: int) -> None:
    """The plan: cells, stages by what they feed, totals."""
    out, grid = console(), plan.grid
    study = grid.loaded.study
    out.print(f"[bold]{escape(study.name)}[/]  {len(grid.cells)} cells, {len(grid.stages)} stages")
    if study.question:
        out.print(plain(study.question.strip()))
    out.print(_cell_table(plan))
    out.print(_stage_table(plan))
    _print_totals(out, plan, tree, slots)
    for note in unseen_images(grid):
        out.print(f"note: {note}")


def _cell_table(plan: Plan) -> Table:
    table = Table(title="cells", title_justify="left", box=None, pad_edge=False)
    table.add_column("cell", no_wrap=True)
    table.add_column("axes", overflow="fold")
    for name in ("params", "images", "samples", "FLOPs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    shown = _rows_of(len(plan.grid.cells))
    # What all cells have in common stands in the study file, not in every row.
    cells = plan.grid.cells
    axes = dict.fromkeys(itertools.chain.from_iterable([cell.axes for cell in cells]))
    varied = [axis for axis in axes if _varies(axis, cells)]
    for cell in cells[:shown]:
        stages = [plan.grid.stages[s] for s in cell.stages.values()]
        table.add_row(
            escape(cell.id),
            escape(one_line(" ".join(_axis(cell, axis) for axis in varied if axis in cell.axes))),
            format_si(cell.params),
            format_count(cell.images),
            format_si(sum(s.config.samples for s in stages)),
            format_si(cell.flops),
            format_seconds(sum(plan.seconds[s.id] for s in stages)),
            state_text(plan.cell_state(cell.stages)),
        )
    more = len(cells) - shown
    if more > 0:
        table.add_row(f"... and {more} more: --only AXIS=VALUE, or --json for all of them")
    return table


def _varies(axis: str, cells: list[Cell]) -> bool:
    """Whether cells that have the axis differ in it."""
    values = [cell.axes[axis] for cell in cells if axis in cell.axes]
    first, shown = values[0], str(values[0])
    return any(value is not first and str(value) != shown for value in values)


def _axis(cell: Cell, axis: str) -> str:
    value = cell.axes[axis]
    is_count = axis == "data" and isinstance(value, int)
    return f"{axis}={format_count(value) if is_count else value}"


def _stage_table(plan: Plan) -> Table:
    """One row per kind of stage, and one per stage that feeds several cells."""
    table = Table(title="stages", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("feeds cells", "samples", "FLOPs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    kinds: dict[str, list[str]] = defaultdict(list)
    known, feeds = outlines(plan.grid.stages), plan.grid.feeds
    for stage_id, outline in known.items():
        kinds[outline.kind].append(stage_id)
    for kind, ids in kinds.items():
        done = list(map(plan.states.__getitem__, ids)).count("done")
        fed = list(map(feeds.__getitem__, ids))
        least, most = min(fed), max(fed)
        own = families(map(known.__getitem__, ids))
        table.add_row(
            f"{kind} x {len(ids)}",
            str(least) if least == most else f"{least}-{most}",
            format_si(sum([number * like.config.samples for like, number in own])),
            format_si(sum([number * like.flops for like, number in own])),
            format_seconds(sum([number * plan.seconds.of(like) for like, number in own])),
            f"{done}/{len(ids)} done",
            style="bold",
        )
        shared = [i for i, cells in zip(ids, fed, strict=True) if cells > 1] if most > 1 else []
        shown = shared[: _rows_of(max(len(shared), len(plan.grid.cells)))]
        for stage_id in shown:
            like = known[stage_id].like
            table.add_row(
                f"  {escape(stage_id)}",
                str(feeds[stage_id]),
                format_si(like.config.samples),
                format_si(like.flops),
                format_seconds(plan.seconds[stage_id]),
                state_text(plan.states[stage_id]),
            )
        if len(shared) > len(shown):
            table.add_row(f"  ... and {len(shared) - len(shown)} more: --json for all of them")
    return table


def _print_totals(out: Console, plan: Plan, tree: Tree, slots: int) -> None:
    totals = plan.totals
    saved = 1 - totals.flops_shared / totals.flops_naive if totals.flops_naive else 0.0
    out.print(
        f"FLOPs: {format_si(totals.flops_naive)} if every cell paid for all its stages,"
        f" {format_si(totals.flops_shared)} with shared stages run once ({saved:.0%} saved),"
        f" {format_si(totals.flops_remaining)} still to do"
    )
    basis = f"{totals.measured_share:.0%} of it at speeds measured in {tree.root}"
    if totals.measured_share == 0:
        basis = "speed guessed: nothing was measured here yet"
    unit = "GPU hours" if plan.speeds.device == "cuda" else "core hours"
    out.print(
        f"time: about {format_seconds(totals.seconds_remaining)} on {slots} x"
        f" {plan.speeds.device}, {totals.process_hours_remaining:.3g} {unit} ({escape(basis)});"
        f" disk: at most {format_si(totals.disk_bytes, 'B')}"
    )


_MOST_ROWS = 400
"""A table longer than this nobody reads, and it takes seconds to lay out."""
_OF_MANY = 10


def _rows_of(count: int) -> int:
    """Rows to show of so many: all, or a few as examples."""
    return count if count <= _MOST_ROWS else _OF_MANY


class Live:
    """Progress of a submission: a live panel on a terminal, a line now and then otherwise."""

    _EVERY_S = 15.0

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self.plan, self.machine = plan, machine
        self.console = console(error=True)
        self.live = RichLive(console=self.console, refresh_per_second=4, transient=True)
        self._last_line = 0.0
        self._known: dict[str, str] | None = None

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, progress: Progress) -> None:
        """Shows where the submission is."""
        if self._known is not None:
            for stage in sorted(progress.bad.keys() - self._known.keys()):
                line = f"{state_text(progress.bad[stage])} {escape(stage)}"
                self.console.print(line, soft_wrap=True)
        self._known = progress.bad
        if self.console.is_terminal:
            self.live.update(self._panel(progress))
            return
        done = progress.counts.get("done", 0)
        now = time.monotonic()
        if now - self._last_line >= self._EVERY_S or done == progress.total:
            self._last_line = now
            self.console.print(self._headline(progress), soft_wrap=True)

    def _headline(self, progress: Progress) -> str:
        counts = progress.counts
        bad = [f"{n} {s}" for s, n in counts.items() if s in ("failed", "diverged", "blocked")]
        elapsed = time.monotonic() - progress.started
        parts = [
            f"{counts.get('done', 0)}/{progress.total} stages done",
            f"{len(progress.running)} running",
            *bad,
            f"{format_seconds(elapsed)} so far",
            f"about {format_seconds(progress.seconds_left)} left",
        ]
        names = ", ".join(_progress_text(r.stage.id, progress.live) for r in progress.running)
        stopping = "; stopping: saving checkpoints" if progress.interrupted else ""
        stopping += _elsewhere(progress)
        return ", ".join(parts) + (f": {escape(names)}" if names else "") + stopping

    def _panel(self, progress: Progress) -> Group:
        done = progress.counts.get("done", 0)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_row(
            "all stages",
            ProgressBar(total=progress.total, completed=done, width=30),
            f"{done}/{progress.total}",
            f"about {format_seconds(progress.seconds_left)} left",
            f"{format_seconds(time.monotonic() - progress.started)} so far",
        )
        for running in progress.running:
            live: dict[str, Any] = dict(progress.live.get(running.stage.id, {}))
            step, steps = live.get("step") or 0, live.get("steps") or 0
            rate, loss = live.get("samples_per_s"), live.get("loss")
            table.add_row(
                escape(running.stage.id),
                ProgressBar(total=steps or None, completed=step, width=30, pulse=not steps),
                f"{step}/{steps}" if steps else running.stage.kind,
                f"{format_si(rate)} samples/s" if rate else "",
                f"loss {loss:.4f}" if loss is not None else "",
            )
        lines: list[Any] = [table]
        if progress.elsewhere:
            lines.append(Text(_elsewhere(progress).removeprefix("; ")))
        if progress.interrupted:
            lines.append(Text("stopping: saving checkpoints (Ctrl-C again to stop at once)"))
        return Group(*lines)


def _elsewhere(progress: Progress) -> str:
    gpus = ", ".join(progress.elsewhere)
    return f"; another command uses GPU {gpus}" if gpus else ""


def _progress_text(stage: str, live: dict[str, dict[str, Any]]) -> str:
    status = live.get(stage, {})
    step, steps = status.get("step"), status.get("steps")
    return f"{stage} {step / steps:.0%}" if step and steps else stage


def summary(summary: Summary, grid: Grid, tree: Tree, mode: Mode) -> None:
    """How it ended: what ran, every failure by name, what to do next."""
    out, total = console(), len(grid.stages)
    name = grid.loaded.study.name
    if not summary.ran and not summary.failed and not summary.left and not summary.blocked:
        out.print(f"{name}: nothing to do, all {total} stages are done")
    else:
        out.print(
            f"{name}: {len(summary.done)} of {total} stages done,"
            f" {len(set(summary.ran))} run now in {format_seconds(summary.wall_s)}"
        )
    if mode == "read-only" and summary.left:
        out.print(f"  {len(summary.left)} stages are not done; --mode read-only runs none")
    for stage, what in summary.failed.items():
        kind = grid.stages[stage].kind
        log = escape(str(tree.stage(kind, stage).attempts))
        out.print(f"  {escape(stage)}: {plain(what)}; log: {log}", soft_wrap=True)
    if summary.held:
        out.print(
            f"  {len(summary.held)} stages are cancelled; run them with: harness resume SELECTOR"
        )
    if summary.blocked:
        out.print(f"  {len(summary.blocked)} stages are blocked by these")
    if summary.failed and mode == "cached":
        out.print("  run failed stages again with --mode retry")
    if summary.interrupted:
        again = "the same command"
        if mode == "force":  # it would set aside what it has done so far, and begin anew
            again += " without --mode force"
        out.print(f"  stopped; {again} goes on from the last checkpoints")


def submitted(done: Submitted, grid: Grid, cluster: str, found: Mapping[str, StageState]) -> None:
    """What went into a scheduler's queue, and how to follow it."""
    out, name = console(), grid.loaded.study.name
    states = Counter(s.state for s in found.values())
    if done.jobs:
        jobs = list(dict.fromkeys(j.partition("_")[0] for j in done.jobs.values()))
        shown = ", ".join(jobs[:6]) + (" ..." if len(jobs) > 6 else "")
        out.print(
            f"{escape(name)}: {len(done.jobs)} stages submitted to {escape(cluster)} in"
            f" {done.arrays} jobs ({shown})"
        )
    elif states["done"] == len(found):
        out.print(f"{escape(name)}: nothing to do, all {len(found)} stages are done")
    else:
        out.print(f"{escape(name)}: nothing to submit")
    out.print("  " + ", ".join(f"{n} {state_text(s)}" for s, n in states.items()))
    for stage, state in found.items():
        if state.state in ("failed", "diverged"):
            what = f"{state.state}: {state.message or state.reason}"
            line = f"  {escape(stage)}: {plain(what)}; run it again with --mode retry"
            out.print(line, soft_wrap=True)
    if done.left:
        then = "the caretaker submits them when these are over"
        if done.caretaker is None:
            then = "submit again when these are over"
        out.print(f"  {done.left} stages were not taken; {then}")
        out.print(f"    {plain(done.refused or '')}")
    if done.jobs and done.no_caretaker is not None:
        what = "no caretaker was taken: submit again if a node is lost, or a job cannot requeue"
        out.print(f"  {what}; {plain(done.no_caretaker)}", soft_wrap=True)
    if done.jobs:
        out.print(f"  the study finishes by itself; follow it with: harness status {name} --watch")
