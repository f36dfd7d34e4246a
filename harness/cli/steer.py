"""`harness cancel`, `resume`, `retry`: change what is to become of stages, from any host."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape

from harness.cli import base, shared, show
from harness.errors import EXIT_OK, EXIT_USAGE, NotFoundError
from harness.launch import queue
from harness.ledger import cell_rows, store
from harness.ledger.claim import ask_to_stop, clear_stop, start_over
from harness.ledger.lease import this_host
from harness.ledger.states import ACTIVE, StageState
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Ablation, Grid, build_grid, only
from harness.study.schema import load_study
from harness.study.select import choose

_MANY = 10

Selectors = Annotated[
    list[str],
    typer.Argument(
        help="Cells or stages: a name, an id or its beginning, or a filter such as"
        " 'size=d64x4,init=mae', 'state=failed', 'stage=probe'. Several add up."
    ),
]
Study = Annotated[str | None, typer.Option(help="Only this study; all by default.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help=f"Needed for more than {_MANY} stages.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What the selectors mean in one study."""

    study: str
    grid: Grid
    ablations: list[Ablation]
    states: Mapping[str, StageState]
    chosen: list[str]

    def folder(self, tree: Tree, stage: str) -> StageFolder:
        """The folder of a stage."""
        return tree.stage(self.grid.stages[stage].kind, stage)


@base.no_collection()
def _choices(tree: Tree, study: str | None, selectors: list[str]) -> list[_Choice]:
    if study is not None:
        cell_rows.read_cells(tree, study)  # raises if there is none of that name
    found: list[_Choice] = []
    problems: list[str] = []
    grids: dict[str, tuple[Grid, list[Ablation]]] = {}
    for name in [study] if study else tree.studies():
        loaded = load_study(tree.study(name) / "study.yaml", store.base_folders(tree, name))
        ablations = store.read_ablations(tree, name)
        grids[name] = build_grid(loaded, ablations), ablations
    # Of all at once: a scheduler is asked once.
    everything = {s: stage for grid, _ in grids.values() for s, stage in grid.stages.items()}
    all_states = queue.read_states(tree, everything)
    for name, (grid, ablations) in grids.items():
        states = {s: all_states[s] for s in grid.stages}
        words = {k: v.state for k, v in states.items()}
        try:
            chosen = choose(grid.cells, words, selectors)
        except NotFoundError as error:
            problems += error.problems
            continue
        found.append(
            _Choice(study=name, grid=grid, ablations=ablations, states=states, chosen=chosen)
        )
    if not found:
        raise NotFoundError(*(problems or [f"no study in {tree.root}"]))
    return found


def _apply(
    verb: str,
    wanted: list[tuple[_Choice, list[str]]],
    act: Callable[[_Choice, str], None],
    *,
    yes: bool,
    dry: bool,
    as_json: bool,
    none: str,
) -> int | None:
    """Does it, or says what it would do; an exit code if that is the end of the command."""
    count = sum(len(stages) for _, stages in wanted)
    held_back = count > _MANY and not yes
    applied = bool(count) and not dry and not held_back
    if applied:
        for choice, stages in wanted:
            for stage in stages:
                act(choice, stage)
    if as_json:
        rows = [
            {"study": c.study, "id": s, "kind": c.grid.stages[s].kind, "state": c.states[s].state}
            for c, stages in wanted
            for s in stages
        ]
        print(json.dumps({"schema": 1, "verb": verb, "applied": applied, "stages": rows}, indent=1))
    else:
        out = show.console()
        word = verb if applied else f"would {verb}"
        for choice, stages in wanted:
            for stage in stages[: 50 if applied else 1000]:
                state = show.state_text(choice.states[stage].state)
                out.print(f"{word} {escape(stage)}  ({state})")
        if not count:
            out.print(none)
        elif held_back and not dry:
            out.print(f"{count} stages: add --yes to {verb} more than {_MANY}")
    if held_back and not dry:
        return EXIT_USAGE
    return None if applied else EXIT_OK


def cancel(
    selectors: Selectors,
    shared_too: Annotated[
        bool, typer.Option("--shared", help="Also stages that feed cells not selected.")
    ] = False,
    study: Study = None,
    yes: Yes = False,
    dry: Dry = False,
    as_json: Json = False,
    root: base.Root = None,
) -> int:
    """Stop stages at a checkpoint, wherever they run, and hold those that wait, until `resume`.

    Example:

      harness cancel 'size=d64x4,init=mae' --dry-run
    """
    tree = base.tree(root)
    wanted, spared = [], 0
    for choice in _choices(tree, study, selectors):
        chosen = set(choice.chosen)
        inside = {c.id for c in choice.grid.cells if chosen.issuperset(c.stages.values())}
        needed = {s for c in choice.grid.cells if c.id not in inside for s in c.stages.values()}
        open_ = [s for s in choice.chosen if not choice.states[s].is_over]
        # A stage that was named itself is meant; one that came along with its cell may be needed.
        named = {s for s in open_ if any(s.startswith(w) for w in selectors) or _asks(selectors)}
        kept = [s for s in open_ if shared_too or s in named or s not in needed]
        spared += len(open_) - len(kept)
        wanted.append((choice, kept))
    why = f"cancelled by {getpass.getuser()} on {this_host().partition(':')[0]}"
    jobs: list[str] = []

    def act(choice: _Choice, stage: str) -> None:
        # Also of a stage that nobody has begun: readers of the tree know only what is in it.
        ask_to_stop(store.write_stage(tree, choice.grid.stages[stage]), why)
        status = choice.states[stage].status
        if choice.states[stage].state == "submitted" and status.get("job"):
            jobs.append(str(status["job"]))

    code = _apply(
        "cancel", wanted, act, yes=yes, dry=dry, as_json=as_json, none="nothing to cancel"
    )
    if jobs:
        queue.cancel_jobs(jobs)
    if spared and not as_json:
        print(f"{spared} stages feed cells that were not selected; --shared cancels them too")
    return EXIT_OK if code is None else code


def _asks(selectors: list[str]) -> bool:
    """True if stages, not whole cells, were asked for."""
    return any(part.strip().startswith("stage=") for w in selectors for part in w.split(","))


def resume(
    selectors: Selectors,
    submit: Annotated[bool, typer.Option(help="Run them now.")] = True,
    study: Study = None,
    yes: Yes = False,
    dry: Dry = False,
    as_json: Json = False,
    cluster: shared.Cluster = None,
    root: base.Root = None,
) -> int:
    """Let cancelled stages run again, from their last checkpoint, and run them.

    Example:

      harness resume state=cancelled --dry-run
    """
    tree = base.tree(root)
    wanted = [
        (c, [s for s in c.chosen if c.states[s].held or c.states[s].state == "cancelled"])
        for c in _choices(tree, study, selectors)
    ]

    def act(choice: _Choice, stage: str) -> None:
        folder = choice.folder(tree, stage)
        clear_stop(folder)
        store.add_event(folder, "resumed")

    none = "nothing to resume: none of these is cancelled"
    code = _apply("resume", wanted, act, yes=yes, dry=dry, as_json=as_json, none=none)
    if code is not None or not submit:
        return code or EXIT_OK
    return _submit(tree, wanted, cluster)


def retry(
    selectors: Selectors,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Set aside what was produced, and begin at step 0."),
    ] = False,
    submit: Annotated[bool, typer.Option(help="Run them now.")] = True,
    study: Study = None,
    yes: Yes = False,
    dry: Dry = False,
    as_json: Json = False,
    cluster: shared.Cluster = None,
    root: base.Root = None,
) -> int:
    """Run failed and diverged stages again, from their last checkpoint.

    With --from-scratch also finished ones, anew; what rests on them runs again too.

    Example:

      harness retry state=failed --dry-run
    """
    tree = base.tree(root)
    wanted: list[tuple[_Choice, list[str]]] = []
    for choice in _choices(tree, study, selectors):
        state = {s: choice.states[s].state for s in choice.chosen}
        bad = [s for s in choice.chosen if state[s] in ("failed", "diverged")]
        anew = [s for s in choice.chosen if state[s] not in (*ACTIVE, "planned", "waiting")]
        wanted.append((choice, anew if from_scratch else bad))

    def act(choice: _Choice, stage: str) -> None:
        folder = choice.folder(tree, stage)
        why = "from-scratch" if from_scratch else "retry"
        if not start_over(folder, choice.states[stage], why, from_scratch=from_scratch):
            late = f"{stage}: another command has taken it meanwhile; see `harness status`"
            print(late, file=sys.stderr)

    none = "nothing to retry: none of these has failed or diverged"
    code = _apply("retry", wanted, act, yes=yes, dry=dry, as_json=as_json, none=none)
    if from_scratch and not as_json:
        _tell_dependants(wanted)
    if code is not None or not submit:
        return code or EXIT_OK
    return _submit(tree, wanted, cluster)


def _tell_dependants(wanted: list[tuple[_Choice, list[str]]]) -> None:
    for choice, stages in wanted:
        again = set(stages)
        for stage in choice.grid.stages.values():
            if again & set(stage.config.upstream.values()):
                again.add(stage.id)
        more = [s for s in choice.grid.stages if s in again and s not in stages]
        if more:
            shown = ", ".join(more[:5]) + (" ..." if len(more) > 5 else "")
            print(f"{len(more)} stages rest on these and run again too: {shown}")


def _submit(tree: Tree, wanted: list[tuple[_Choice, list[str]]], cluster: str | None) -> int:
    """Runs the cells that the stages belong to, study by study."""
    worst = EXIT_OK
    for choice, stages in wanted:
        again = set(stages)
        cells = [c for c in choice.grid.cells if not again.isdisjoint(c.stages.values())]
        if not cells:
            continue
        part = only(choice.grid, cells)
        machine, plan = shared.plan(tree, part, cluster=cluster)
        code = shared.submit(
            tree, choice.grid, choice.ablations, part, machine, plan, "cached", cluster
        )
        worst = max(worst, code)
    return worst
