"""What no stage will read again: found from the files, removed only where nobody is at work.

Kept are results, weights and whatever else a finished stage left for others, every attempt's
records, and the last complete checkpoint of a stage that may go on from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.ledger import cell_rows
from harness.ledger.attempts import last_checkpoint
from harness.ledger.claim import is_as_seen
from harness.ledger.files import leftovers
from harness.ledger.lease import exclusive, is_long_silent, owner_is_dead, read_lease
from harness.ledger.states import ACTIVE, Node, StageState, graph_of_rows
from harness.ledger.tree import StageFolder, Tree

Why = Literal["checkpoint of a done stage", "left by an attempt that was killed"]


@dataclass(frozen=True, kw_only=True)
class Waste:
    """A file or folder that can go."""

    stage: str
    kind: str
    path: Path
    why: Why
    size: int
    """Bytes."""


def graph_of_all(tree: Tree) -> dict[str, Node]:
    """Stages of every study of the root: one may feed cells of several."""
    return graph_of_rows(row for name in tree.studies() for row in cell_rows.read_cells(tree, name))


def stages_of(tree: Tree, study: str | None) -> set[str]:
    """Ids of the stages of a study, or of all. Raises NotFoundError for an unknown study."""
    names = [study] if study else tree.studies()
    rows = (row for name in names for row in cell_rows.read_cells(tree, name))
    return {stage for row in rows for stage in row["stages"].values()}


def find(
    tree: Tree, graph: Mapping[str, Node], states: Mapping[str, StageState], wanted: set[str]
) -> list[Waste]:
    """What can go of the `wanted` stages; `states` are those of the whole graph.

    A stage that is done but would run again, as its upstream did, is not done.
    """
    found = []
    for stage, node in graph.items():
        if stage in wanted and states[stage].state not in ACTIVE:
            folder = tree.stage(node.kind, stage)
            found += [
                Waste(stage=stage, kind=node.kind, path=path, why=why, size=_size(path))
                for path, why in _of_stage(folder, states[stage]).items()
            ]
    return found


def remove(tree: Tree, waste: list[Waste], states: Mapping[str, StageState]) -> list[Waste]:
    """Removes it, stage by stage and as nobody else can begin one; the part that is gone.

    A stage that is no longer as it was in `states` is left alone.
    """
    gone = []
    for stage in dict.fromkeys(w.stage for w in waste):
        own = [w for w in waste if w.stage == stage]
        folder = tree.stage(own[0].kind, stage)
        with exclusive(folder.claim):
            if not _is_at_rest(folder) or not is_as_seen(folder, states[stage]):
                continue
            still = _of_stage(folder, states[stage])
            for one in (w for w in own if w.path in still):
                _remove(one.path)
                gone.append(one)
    return gone


def _is_at_rest(folder: StageFolder) -> bool:
    """True if no worker owns the stage, as far as anybody here can tell."""
    lease = read_lease(folder.lease)
    return lease is None or owner_is_dead(lease) is True or is_long_silent(folder.lease)


def _of_stage(folder: StageFolder, state: StageState) -> dict[Path, Why]:
    found: dict[Path, Why] = {}
    if state.state == "done" and folder.checkpoints.is_dir():
        found[folder.checkpoints] = "checkpoint of a done stage"
    elif (last := last_checkpoint(folder)) is not None or folder.checkpoints.is_dir():
        # One that was being written, or about to be removed, when its process was killed.
        kept = f"step_{last}"
        for path in sorted(folder.checkpoints.iterdir()):
            if path.name != kept:
                found[path] = "left by an attempt that was killed"
    for path in leftovers(folder.path):
        found[path] = "left by an attempt that was killed"
    return found


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # First what makes a checkpoint count: a removal that is cut short leaves none that is broken.
    for mark in [*path.glob("COMPLETE"), *path.glob("*/COMPLETE")]:
        mark.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if f.is_file())
