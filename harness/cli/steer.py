"""`harness cancel`, `resume`, `retry`: change what is to become of stages, from any host."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from harness.cli import base, selection, shared, show
from harness.cli.selection import Choice, Target
from harness.errors import EXIT_OK, EXIT_USAGE
from harness.launch import commands
from harness.ledger import store
from harness.ledger.claim import ask_to_stop, clear_stop, start_over
from harness.ledger.lease import this_host
from harness.ledger.states import ACTIVE
from harness.ledger.tree import Tree
from harness.study.cells import only

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


def _apply(
    verb: str,
    targets: list[Target],
    act: Callable[[Target], None],
    *,
    yes: bool,
    dry: bool,
    as_json: bool,
    none: str,
) -> int | None:
    """Does it, or says what it would do; an exit code if that is the end of the command."""
    held_back = len(targets) > _MANY and not yes
    applied = bool(targets) and not dry and not held_back
    if applied:
        for target in targets:
            act(target)
    if as_json:
        rows = [
            {"study": t.study, "id": t.id, "kind": t.kind, "state": t.state.state} for t in targets
        ]
        print(json.dumps({"schema": 1, "verb": verb, "applied": applied, "stages": rows}, indent=1))
    else:
        out = show.console()
        word = verb if applied else f"would {verb}"
        for target in targets[: 50 if applied else 1000]:
            state = show.state_text(target.state.state)
            out.print(f"{word} {escape(target.id)}  ({state})")
        if not targets:
            out.print(none)
        elif held_back and not dry:
            out.print(f"{len(targets)} stages: add --yes to {verb} more than {_MANY}")
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
    folders = {} if study else selection.folders_of(tree, selectors)
    found = selection.choices(tree, study, selectors, folders, or_rows=True)
    open_ = selection.targets(tree, found, lambda state: not state.is_over)
    free = {t.id for t in open_} if shared_too else selection.free(tree, found)
    wanted = [t for t in open_ if t.id in free]
    spared = len(open_) - len(wanted)
    wanted += [t for t in selection.in_no_study(folders, found) if not t.state.is_over]
    why = f"cancelled by {commands.user_name()} on {this_host().partition(':')[0]}"
    jobs: list[Mapping[str, Any]] = []

    def act(target: Target) -> None:
        if target.stage is not None and not target.folder.stage.exists():
            # Also of a stage that nobody has begun: readers of the tree know only what is in it.
            store.write_stage(tree, target.stage)
        ask_to_stop(target.folder, why)
        status = target.state.status
        if target.state.state == "submitted" and status.get("job"):
            jobs.append(status)

    code = _apply(
        "cancel", wanted, act, yes=yes, dry=dry, as_json=as_json, none="nothing to cancel"
    )
    _tell_left(commands.cancel_jobs(jobs))
    if spared and not as_json:
        print(f"{spared} stages feed cells that were not selected; --shared cancels them too")
    return EXIT_OK if code is None else code


def _tell_left(statuses: Sequence[Mapping[str, Any]]) -> None:
    """Of jobs that stay in a queue though their stages are cancelled."""
    for site in dict.fromkeys(status.get("site") for status in statuses):
        own = [str(status["job"]) for status in statuses if status.get("site") == site]
        jobs = list(dict.fromkeys(own))
        shown = " ".join(jobs[:_MANY]) + (" ..." if len(jobs) > _MANY else "")
        where = f"the queue of {site}" if site else "its queue"
        until = f"in {where} until started, and over at once then"
        print(f"job {shown}: {until}; or `scancel {shown}` there", file=sys.stderr)


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
    found = selection.choices(tree, study, selectors)
    candidates = selection.targets(
        tree, found, lambda state: state.held or state.state in ("cancelled", "running")
    )
    # A running stage may have a note that its worker has not obeyed yet.
    wanted = [t for t in candidates if t.state.state != "running" or t.folder.stop.exists()]

    def act(target: Target) -> None:
        clear_stop(target.folder)
        store.add_event(target.folder, "resumed")

    none = "nothing to resume: none of these is cancelled"
    code = _apply("resume", wanted, act, yes=yes, dry=dry, as_json=as_json, none=none)
    if code is not None or not submit:
        return code or EXIT_OK
    return _submit(tree, found, wanted, cluster)


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
    found = selection.choices(tree, study, selectors)
    not_ended = (*ACTIVE, "planned", "waiting")
    wanted = selection.targets(
        tree,
        found,
        lambda state: (
            state.state not in not_ended if from_scratch else state.state in ("failed", "diverged")
        ),
    )

    def act(target: Target) -> None:
        why = "from-scratch" if from_scratch else "retry"
        if not start_over(target.folder, target.state, why, from_scratch=from_scratch):
            late = "another command has taken it meanwhile; see `harness status`"
            print(f"{target.id}: {late}", file=sys.stderr)

    none = "nothing to retry: none of these has failed or diverged"
    code = _apply("retry", wanted, act, yes=yes, dry=dry, as_json=as_json, none=none)
    if from_scratch and not as_json:
        _tell_dependants(found, wanted)
    if code is not None or not submit:
        return code or EXIT_OK
    return _submit(tree, found, wanted, cluster)


def _tell_dependants(found: list[Choice], wanted: list[Target]) -> None:
    named = {target.id for target in wanted}
    again, more = set(named), dict[str, None]()
    for choice in found:
        for stage, node in choice.nodes.items():
            if not again.isdisjoint(node.upstream):
                again.add(stage)
        more |= dict.fromkeys(s for s in choice.nodes if s in again and s not in named)
    if more:
        shown = ", ".join([*more][:5]) + (" ..." if len(more) > 5 else "")
        print(f"{len(more)} stages rest on these and run again too: {shown}")


def _submit(tree: Tree, found: list[Choice], wanted: list[Target], cluster: str | None) -> int:
    """Runs the cells that the stages belong to, study by study."""
    worst, again = EXIT_OK, {target.id for target in wanted}
    for grid in (choice.grid for choice in found):
        cells = [c for c in grid.cells if not again.isdisjoint(c.stages.values())] if grid else []
        if not (grid and cells):
            continue
        part = only(grid, cells)
        machine, plan = shared.plan(tree, part, cluster=cluster)
        worst = max(worst, shared.submit(tree, part, machine, plan, "cached", cluster))
    return worst
