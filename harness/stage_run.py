"""What all ranks of a stage do: find its inputs, run it under watch, leave notes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from harness import transfer
from harness.attempt import versions
from harness.errors import UpstreamGoneError, UserError
from harness.ledger.context import StageContext, StageResult
from harness.ledger.environment import environment
from harness.ledger.files import Guard, read_json, write_json
from harness.ledger.tree import StageFolder, Tree
from harness.models.weight_files import guarded
from harness.study.stages import StageFile
from harness.study.starting import content_hash
from harness.train import loop
from harness.watchdog import Watchdog


def say(what: object) -> None:
    """Prints to the attempt's log, which may lie on the very disk that is full."""
    with contextlib.suppress(OSError):
        print(what, file=sys.stderr, flush=True)


def upstream_uids(tree: Tree, stage: StageFile) -> dict[str, str]:
    """The uid of each input's result; raises UpstreamGoneError where one is gone."""
    uids = {}
    for upstream in stage.config.upstream.values():
        kind = stage.upstream_kinds[upstream]
        result = read_json(tree.stage(kind, upstream).result)
        if result is None:
            raise UpstreamGoneError(f"{stage.id}: upstream {upstream} is not done (any more)")
        uids[upstream] = result["uid"]
    return uids


def upstream_weights(tree: Tree, stage: StageFile) -> Path | None:
    """The weights to start from, if any; raises UserError where a file changed since the plan."""
    encoder = stage.config.upstream.get("encoder")
    if encoder:
        return tree.stage(stage.upstream_kinds[encoder], encoder).weights
    if not stage.config.weights:
        return None
    path = Path(stage.execution.weights_path)
    if content_hash(path) != stage.config.weights:
        raise UserError(
            f"{path}: the weights have changed since the study was planned; submit again"
        )
    return path


def upstream_folders(tree: Tree, stage: StageFile) -> dict[str, Path]:
    """The folder of the stage in each role."""
    kinds = stage.upstream_kinds
    return {role: tree.stage(kinds[s], s).path for role, s in stage.config.upstream.items()}


def write_environment(path: Path, guard: Guard) -> None:
    """Variables and versions as this process has them."""
    write_json(path, {**environment("worker"), "versions": versions()}, guard)


def tell(path: Path, state: str, reason: str, message: str) -> None:
    """Leaves a note on how a rank that owns no lease ended."""
    write_json(path, {"schema": 1, "state": state, "reason": reason, "message": message})


def call(
    stage: StageFile, context: StageContext, attempt: int, on_hung: Callable[[str], None]
) -> StageResult:
    """Trains or judges, while a watchdog looks whether it gets on."""
    run = loop.train if stage.kind in ("mae", "wsp") else transfer.run
    watchdog = Watchdog(
        StageFolder(context.folder).attempt(attempt),
        context.rank,
        context.ranks,
        context.whereabouts,
        stage.execution.hang_after_s,
        on_hung,
        context.check_lease,
    )
    context.whereabouts.at = (0, "setup")
    watchdog.start()
    try:
        with guarded(context.check_lease):
            return run(stage, context)
    finally:
        watchdog.stop()
