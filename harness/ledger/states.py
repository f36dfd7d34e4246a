"""The state of every stage, read from the files and never from memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from harness.errors import UserError
from harness.ledger.files import read_json
from harness.ledger.index import Row, results
from harness.ledger.lease import MOST_SKEW_S, is_long_silent, owner_is_dead, read_lease
from harness.ledger.tree import StageFolder, Tree

if TYPE_CHECKING:
    # What a stage is made of takes half a second to import, and states do not ask.
    from harness.study.stages import StageFile

RESUMABLE = frozenset({"planned", "waiting", "preempted", "timeout", "cancelled", "lost"})
"""States that `--submit` runs in mode cached."""
FAILED = frozenset({"failed", "diverged", "blocked"})
ACTIVE = frozenset({"submitted", "running"})
_STALE = "its upstream stage was run again or removed since"
TOKEN = "token"
"""Key of status.json: the submission to a scheduler that a stage belongs to; its job's comment."""


class StageState(NamedTuple):
    """What the files say of one stage. A tuple: there are tens of thousands at a time."""

    state: str
    status: Mapping[str, Any]
    kept: Mapping[str, Any] | Row | None = None
    """What there is of the last run's result.json: the whole of it, or its row in the index."""
    reason: str | None = None
    message: str | None = None
    held: bool = False
    """Cancelled by somebody, until somebody says `harness resume`."""

    @property
    def result(self) -> Mapping[str, Any] | None:
        """Of the last run: it counts only for a stage that is `done`."""
        return self.kept.result if isinstance(self.kept, Row) else self.kept

    @property
    def uid(self) -> Any:
        """Of the last run, if it has a result."""
        if isinstance(self.kept, Row):
            return self.kept.uid
        return None if self.kept is None else self.kept.get("uid")

    @property
    def is_over(self) -> bool:
        """True if a submission has nothing to do about it: done, failed, or not to be run."""
        return self.held or self.state == "done" or self.state in FAILED


def read_state(
    folder: StageFolder, over: str | None = None, waiting: str | None = None
) -> StageState:
    """State of one stage on its own, dependencies aside.

    A scheduler's word, if there is one: `over` is a job (or the token of a submission) that has
    left its queue, `waiting` one that is in it.
    """
    result = read_json(folder.result)
    status = read_json(folder.status) or {}
    if not result and status.get("state") == "done":  # both were written since
        result = read_json(folder.result)
    if result:
        reason, message = status.get("reason"), status.get("message")
        return StageState("done", status, result, reason, message)
    return _without_result(folder, status, None, over, waiting)


def _stale(
    folder: StageFolder, own: StageState, over: str | None, waiting: str | None
) -> StageState:
    """Of a stage that is done, but from an upstream run that counts no longer.

    The result stays until its next attempt sets it aside; what became of that one is in the status.
    """
    status, result = own.status, own.result or {}
    is_later = int(status.get("attempt") or 0) > int(result.get("attempts") or 0)
    if not is_later or status.get("state") == "done":
        status = {**status, "state": "planned", "reason": "stale", "message": _STALE}
    found = _without_result(folder, status, result, over, waiting)
    return found._replace(status=own.status)


def _without_result(
    folder: StageFolder,
    status: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    over: str | None,
    waiting: str | None,
) -> StageState:
    state, reason, message = (status.get(key) for key in ("state", "reason", "message"))
    # Without its result, which somebody took away, a stage is done no more.
    state = "planned" if state in (None, "done") else state
    if state != "failed":
        state, message = _as_of_now(folder, state, message, status, over, waiting)
    held = state not in ("done", "failed", "diverged", "running") and folder.stop.exists()
    if held:
        note = read_json(folder.stop) or {}
        state, reason = "cancelled", note.get("reason")
    return StageState(
        state=state, reason=reason, message=message, status=status, kept=result, held=held
    )


def _as_of_now(
    folder: StageFolder,
    state: str,
    message: str | None,
    status: Mapping[str, Any],
    over: str | None,
    waiting: str | None,
) -> tuple[str, str | None]:
    """State and message, if the one in the file says that somebody is at work who is not."""
    job = status.get("job") or status.get(TOKEN)
    lease = read_lease(folder.lease) if state == "running" else None
    is_dead = lease is None or owner_is_dead(lease)
    if job is not None and job == waiting:
        # Stopped, in good order or not, and in the queue again: the scheduler will start it.
        is_back = state in ("preempted", "timeout") or (state == "running" and is_dead)
        return ("submitted" if is_back else state), message
    if state == "running":
        if is_dead or (job is not None and job == over):
            return "lost", "its process is gone without a word"
        if is_dead is None and job is None and is_long_silent(folder.lease):
            host = str(status.get("host")).partition(":")[0]
            return "lost", f"its host {host} has given no sign for {MOST_SKEW_S / 60:.0f} minutes"
    elif state == "submitted" and job is not None:
        if job == over:
            has_job = status.get("job") is not None
            what = "its job left the queue before it started" if has_job else "was never submitted"
            return "lost", what
    elif state == "submitted":
        is_dead = owner_is_dead(
            {
                "token": "driver",
                "host": status.get("host"),
                "pid": status.get("pid", 0),
                "started": status.get("pid_started"),
            }
        )
        if is_dead or (is_dead is None and is_long_silent(folder.status)):
            return "lost", "the command that submitted it is gone"
    return state, message


def read_states(
    tree: Tree,
    stages: Mapping[str, StageFile],
    over: Mapping[str, str] | None = None,
    waiting: Mapping[str, str] | None = None,
) -> dict[str, StageState]:
    """States of a stage graph; `stages` in dependency order.

    `over` and `waiting`: stage id -> job, see `read_state`.

    A stage that is done, failed or diverged is planned again if its upstream was run again since,
    or is gone; one whose upstream failed is blocked; one whose upstream is not done yet is waiting.
    """
    return read_graph(tree, graph_of(stages), over, waiting)


class Node(Protocol):
    """What the state of a stage depends on besides its own files."""

    @property
    def kind(self) -> str:
        """Of the stage."""
        ...

    @property
    def upstream(self) -> tuple[str, ...]:
        """Ids of the stages it starts from."""
        ...


class PlainNode(NamedTuple):
    """A node of which nothing else is known."""

    kind: str
    upstream: tuple[str, ...]


def graph_of(stages: Mapping[str, StageFile]) -> Mapping[str, Node]:
    """Kinds and edges of a stage graph."""
    from harness.study.stage_set import outlines  # whoever has stages has paid for it

    return outlines(stages)


def graph_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Node]:
    """The same of rows of cells.jsonl, where stages stand in dependency order, cell by cell."""
    graph: dict[str, Node] = {}
    for row in rows:
        kinds, upstream = row["kinds"], row.get("upstream")
        if upstream is None:
            raise UserError(
                f"cells.jsonl: row of {row['id']} has no 'upstream', an older version wrote it;"
                " submit the study again"
            )
        for stage in row["stages"].values():
            if stage not in graph:
                graph[stage] = PlainNode(kinds[stage], tuple(upstream[stage]))
    return graph


def read_graph(
    tree: Tree,
    graph: Mapping[str, Node],
    over: Mapping[str, str] | None = None,
    waiting: Mapping[str, str] | None = None,
) -> dict[str, StageState]:
    """`read_states`, of stages of which only kinds and edges are known.

    Of a stage that is done, `status` has only state and attempt, `result` what the index keeps.
    """
    states: dict[str, StageState] = {}
    # Most stages of a large study have no folder yet: one listing a kind tells.
    begun = {kind: tree.begun(kind) for kind in {node.kind for node in graph.values()}}
    own_ids: dict[str, list[str]] = {kind: [] for kind in begun}
    for stage_id, node in graph.items():
        if stage_id in begun[node.kind]:
            own_ids[node.kind].append(stage_id)
    rows: dict[str, Row] = {}
    for kind, ids in own_ids.items():
        rows |= results(tree, kind, ids)
    unbegun = StageState(state="planned", status={})
    # Of most stages of a large study nothing is known but that they wait: one object for all.
    ready, waits = unbegun, unbegun._replace(state="waiting")
    done: dict[str, Any] = {}
    """Uids of stages that are done."""
    blocking: set[str] = set()
    statuses: dict[Any, dict[str, Any]] = {}
    """Of stages that are done, by attempt."""
    for stage_id, node in graph.items():
        upstream = node.upstream
        row = rows.get(stage_id)
        if row is not None and row.told and _rests_on(row.upstream_uids, upstream, done, states):
            attempt = row.attempts
            if attempt not in statuses:
                statuses[attempt] = {"state": "done", "attempt": attempt}
            states[stage_id] = StageState("done", statuses[attempt], row)
            done[stage_id] = row.uid
            continue
        kind = node.kind
        is_begun = stage_id in begun[kind]
        if not is_begun and blocking.isdisjoint(upstream):
            states[stage_id] = ready
            for u in upstream:
                if u not in done and u in states:
                    states[stage_id] = waits
                    break
            continue
        own = unbegun
        asked = ((over or {}).get(stage_id), (waiting or {}).get(stage_id))
        if is_begun:
            folder = tree.stage(kind, stage_id)
            own = read_state(folder, *asked)
            uids = (own.result or {}).get("upstream_uids", {})
            if own.state == "done" and not _rests_on(uids, upstream, done, states):
                own = _stale(folder, own, *asked)
            elif own.state in ("failed", "diverged") and upstream:
                # How it ended says nothing of what it would now start from; unless it ended before
                # it came to that: a worker that cannot even start would be started for ever.
                lineage = read_json(folder.lineage) or {}
                started_from: Mapping[str, Any] | None = lineage.get("upstream_uids")
                is_of_it = lineage.get("attempt") == own.status.get("attempt")
                if (
                    is_of_it
                    and started_from is not None
                    and not _rests_on(started_from, upstream, done, states)
                ):
                    own = own._replace(state="planned", reason="stale", message=_STALE)
        known = [states[u] for u in upstream if u in states]
        own = states[stage_id] = _in_graph(own, known)
        if own.state == "done":
            done[stage_id] = own.uid
        elif _blocks(own):
            blocking.add(stage_id)
    return states


def _rests_on(
    uids: Mapping[str, Any],
    upstream: tuple[str, ...],
    done: Mapping[str, Any],
    known: Mapping[str, StageState],
) -> bool:
    """Whether it is the runs with these uids that its upstream stages, as far as they are `known`,
    are done with now."""
    for stage_id in upstream:
        if stage_id in done:
            if uids.get(stage_id) != done[stage_id]:
                return False
        elif stage_id in known:
            return False
    return len(uids) == len(upstream)


def _blocks(upstream: StageState) -> bool:
    return upstream.held or upstream.state in FAILED


def _in_graph(own: StageState, upstream: list[StageState]) -> StageState:
    if own.state in RESUMABLE or own.state == "blocked":
        if own.held:
            return own
        bad = list(filter(_blocks, upstream))
        if bad:
            what = "upstream is cancelled" if bad[0].held else "upstream failed"
            return own._replace(state="blocked", reason="upstream", message=what)
        if own.state in ("planned", "waiting", "blocked"):
            ready = all(s.state == "done" for s in upstream)
            state = "planned" if ready else "waiting"
            return own if own.state == state else own._replace(state=state)
    return own
