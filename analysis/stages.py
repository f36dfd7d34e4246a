"""What the files of a study's stages say, each judged by those it rests on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError
from harness.ledger.states import FAILED, read_state
from harness.ledger.tree import StageFolder, Tree


def clean(text: str) -> str:
    """Text that every encoder takes: half a surrogate pair, legal in JSON, becomes a `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What the files of one stage say."""

    id: str
    kind: str
    folder: StageFolder
    state: str
    reason: str | None = None
    message: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    tries: tuple[str, ...] = ()
    """Folders of its attempts that are there."""
    attempts: int = 0


def read_stages(
    tree: Tree, rows: Iterable[Mapping[str, Any]], notes: list[str]
) -> dict[str, StageFacts]:
    """Facts by stage id; a cell lists its stages in dependency order, so upstream comes first."""
    facts: dict[str, StageFacts] = {}
    for row in rows:
        for stage_id in row["stages"].values():
            if stage_id not in facts:
                own = _read_stage(tree, stage_id, row["kinds"][stage_id], notes)
                upstream = [facts[u] for u in _upstream(row, stage_id) if u in facts]
                facts[stage_id] = _in_chain(own, upstream, facts)
    return facts


def _upstream(row: Mapping[str, Any], stage_id: str) -> list[str]:
    """Stages that a stage of the cell starts from."""
    if "upstream" in row:
        return row["upstream"][stage_id]
    # Rows of before 0.5 do not say: every stage starts from those of pretraining.
    stages = row["stages"]
    before = [stages[role] for role in ("mae", "wsp") if role in stages]
    return before[: before.index(stage_id)] if stage_id in before else before


def _read_stage(tree: Tree, stage_id: str, kind: str, notes: list[str]) -> StageFacts:
    folder = tree.stage(kind, stage_id)
    try:
        own = read_state(folder)
    except UserError as error:
        notes.append(str(error))
        return StageFacts(
            id=stage_id, kind=kind, folder=folder, state="failed", reason="unreadable"
        )
    tries = _tries(folder)
    return StageFacts(
        id=stage_id,
        kind=kind,
        folder=folder,
        state=own.state,
        reason=clean(str(own.reason)) if own.reason else None,
        message=clean(str(own.message)) if own.message else None,
        result=own.result or {},
        tries=tries,
        attempts=len(tries) or int((own.result or {}).get("attempts", 0)),
    )


def _tries(folder: StageFolder) -> tuple[str, ...]:
    base = str(folder.attempts)
    try:
        return tuple(f"{base}/{name}" for name in sorted(os.listdir(base)) if name.isdigit())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _in_chain(
    own: StageFacts, upstream: list[StageFacts], facts: Mapping[str, StageFacts]
) -> StageFacts:
    """The stage's state given its upstream: a result of an upstream run that is gone is stale."""
    uids = own.result.get("upstream_uids") or {}
    known = {u: facts[u] for u in uids if u in facts}
    fresh = all(u.state == "done" for u in upstream)
    fresh &= all(f.state == "done" and f.result.get("uid") == uids[u] for u, f in known.items())
    state, reason, message = own.state, own.reason, own.message
    if state == "done" and not fresh:
        state, reason, message = "planned", "stale", "its upstream stage was run again since"
    failed = [u for u in upstream if u.state in FAILED]
    if failed and state in ("planned", "waiting", "blocked"):
        state, reason = "blocked", "upstream"
        message = f"{failed[0].id} {failed[0].state}"
    if (state, reason) == (own.state, own.reason):
        return own
    return StageFacts(
        id=own.id,
        kind=own.kind,
        folder=own.folder,
        state=state,
        reason=reason,
        message=message,
        tries=own.tries,
        attempts=own.attempts,
    )
