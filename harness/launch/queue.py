"""What Slurm's queue says of our jobs: asked once, for all of them; nothing is believed beyond it.

A job that is in the queue lives, whatever its state is called there; one that is not is over. No
accounting is needed (`sacct` fails on many clusters). Without an answer nothing is concluded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.launch import commands
from harness.ledger import states
from harness.ledger.files import read_json
from harness.ledger.lease import BEAT_S, is_long_silent, owner_is_dead, read_lease
from harness.ledger.states import TOKEN, StageState
from harness.ledger.tree import Tree

if TYPE_CHECKING:
    from harness.study.stages import StageFile

_SEPARATOR = "\x1f"
_NO_REASON = ("", "None", "Dependency")
_FIELDS = _SEPARATOR.join(("%i", "%T", "%k", "%r"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A line of the queue."""

    id: str
    """`123`, or `123_4` for a task of an array."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, REQUEUED, SUSPENDED, ..."""
    comment: str
    reason: str


def jobs_now() -> dict[str, Job] | None:
    """Our jobs that are not over, by id; None if the scheduler does not answer."""
    # --all: also those in partitions that the site hides.
    text = commands.run("squeue", "--me", "--all", "--array", "--noheader", "--format", _FIELDS)
    return None if text is None else parse(text)


def parse(text: str) -> dict[str, Job]:
    """The queue's lines. A pending array is a line a task, however Slurm shortens it elsewhere."""
    found = {}
    for line in text.splitlines():
        parts = line.split(_SEPARATOR)
        if len(parts) != 4:
            continue  # a comment of a foreign job with a line break in it
        number, state, comment, reason = (p.strip() for p in parts)
        found[number] = Job(id=number, state=state, comment=comment, reason=reason)
    return found


def read_states(
    tree: Tree,
    stages: Mapping[str, StageFile],
    *,
    max_age_s: float = 5.0,
    is_submitting: bool = False,
) -> dict[str, StageState]:
    """`harness.ledger.states.read_states`, with what Slurm knows of the jobs among them.

    Asks the queue only if a stage was submitted to it, by us. The queue is asked after the files
    were read: a job in the files of before that is not in the queue of now is over, and stays so:
    an answer up to `max_age_s` old is used again where it is about the same jobs.
    `is_submitting`: the caller holds the lock of submissions, so nobody else is in one.
    """
    return read_graph(
        tree, states.graph_of(stages), max_age_s=max_age_s, is_submitting=is_submitting
    )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What the queue said, and of which jobs it was asked."""

    time: float
    live: set[str]
    """Jobs in it, and comments of jobs in it."""
    judged: set[str]
    reasons: dict[str, str]
    """Why jobs wait, by id, where it is not for one another."""


_last: _Answer | None = None
_silent_since: float | None = None
_seen: dict[Path, tuple[tuple[str, int], float]] = {}
"""Leases that were watched: token and heartbeat, and since when they have been that."""


def remember(jobs: Iterable[str]) -> None:
    """Takes note of jobs that were put into the queue since it was asked."""
    if _last is not None:
        _last.live.update(jobs)


def read_graph(
    tree: Tree,
    graph: Mapping[str, states.Node],
    *,
    max_age_s: float = 5.0,
    is_submitting: bool = False,
    may_wait: bool = True,
) -> dict[str, StageState]:
    """`read_states`, of stages of which only kinds and edges are known.

    `may_wait`: for two heartbeats of workers whose jobs are gone. Without, one counts as alive
    until it was seen still for so long, over several calls.
    """
    found = states.read_graph(tree, graph)
    known = {
        s: v
        for s, v in found.items()
        if v.state not in ("done", "failed", "diverged")
        and (v.status.get("job") or v.status.get(TOKEN))
    }
    # Once: there may be thousands.
    me, here = commands.user_name(), commands.site() if known else None
    asked = {s: v for s, v in known.items() if _is_ours(v.status, me, here)}
    # What another's job has put back is in its queue, as far as anybody here can tell.
    foreign = {
        s: str(v.status.get("job") or v.status[TOKEN])
        for s, v in known.items()
        if s not in asked and v.state in ("preempted", "timeout")
    }
    if not asked and not foreign:
        return found
    if not asked:
        return _with_reasons(states.read_graph(tree, graph, waiting=foreign), foreign, {})
    # Of those without a job a submission may be putting some into the queue just now.
    unnumbered = {s: str(v.status[TOKEN]) for s, v in asked.items() if not v.status.get("job")}
    jobs = {s: str(v.status["job"]) for s, v in asked.items() if s not in unnumbered}
    is_known = here is not None or not any(v.status.get("site") for v in asked.values())
    answer = _ask(set(jobs.values()), -1.0 if unnumbered else max_age_s, is_known)
    if answer is None:  # whatever was in the queue may be so now
        waiting = {**jobs, **unnumbered, **foreign}
        return _with_reasons(states.read_graph(tree, graph, waiting=waiting), waiting, {})
    live = answer.live
    arrays = _arrays(tree, set(unnumbered.values()))
    broken = is_submitting or not _somebody_submits(tree)
    over, waiting = {}, dict(foreign)
    for stage, job in jobs.items():
        (waiting if job in live else over)[stage] = job
    for stage, token in unnumbered.items():
        is_there = arrays.get((token, stage)) in live
        (waiting if is_there or not broken else over)[stage] = token
    for stage in _beating(tree, graph, {s: found[s] for s in over}, may_wait):
        del over[stage]
    if over or any(found[stage].state != "submitted" for stage in waiting):
        found = states.read_graph(tree, graph, over=over, waiting=waiting)
    # else the queue says what the files say
    own = {s: answer.reasons[j] for s, j in jobs.items() if j in answer.reasons}
    return _with_reasons(found, waiting, own)


def _with_reasons(
    found: dict[str, StageState], waiting: Mapping[str, str], reasons: Mapping[str, str]
) -> dict[str, StageState]:
    """The states; of stages that wait, the message is why they do, if it is known."""
    for stage in waiting:
        if found[stage].state == "submitted":
            found[stage] = found[stage]._replace(message=reasons.get(stage))
    return found


def has_left(status: Mapping[str, Any]) -> bool:
    """Whether a job of ours was not in the queue when that was last asked, whatever its stage does.

    Of others' jobs the queue says nothing.
    """
    is_others = status.get("user") not in (None, commands.user_name())
    return not is_others and _last is not None and status["job"] not in _last.live


def is_silent() -> bool:
    """Whether the scheduler gave no answer when it was last asked for states."""
    return _silent_since is not None


def _ask(jobs: set[str], max_age_s: float, is_known: bool) -> _Answer | None:
    """What the queue says; the last answer, if it is young and about these jobs.

    `is_known`: it is the one that they were put into.
    """
    global _last, _silent_since
    known = _last
    if known is not None and time.monotonic() - known.time <= max_age_s:
        if jobs <= known.live | known.judged:
            return known
    if _silent_since is not None and time.monotonic() - _silent_since <= max_age_s:
        return None  # it may take a minute to say so
    found = jobs_now() if is_known else None
    _silent_since = time.monotonic() if found is None else None
    if found is None:
        return None
    live = {j.id for j in found.values()} | {j.comment for j in found.values()}
    reasons = {j.id: j.reason for j in found.values() if j.reason not in _NO_REASON}
    _last = _Answer(time=time.monotonic(), live=live, judged=jobs, reasons=reasons)
    return _last


def comment_of(token: str, array: int) -> str:
    """The comment of an array's jobs, by which it is known before its number is written down."""
    return f"{token}.{array}"


def caretaker_comment(token: str) -> str:
    """The comment of a submission's caretaker."""
    return f"caretaker.{token}"


def caretakers(token: str) -> list[str]:
    """Jobs in the queue that tend this submission, but for the one around us."""
    jobs, own = (jobs_now() or {}).values(), os.environ.get("SLURM_JOB_ID")
    return [j.id for j in jobs if j.comment == caretaker_comment(token) and j.id != own]


def numbers(tree: Tree, token: str) -> dict[str, str]:
    """Stage -> job of this submission's jobs that are in the queue, by their comments."""
    found = {}
    jobs = list((jobs_now() or {}).values())
    for array, rows in _tasks(tree, token):
        for job in jobs:
            if job.comment == comment_of(token, array):
                place = int(job.id.partition("_")[2] or 0)
                found[rows[place]["stage"]] = job.id
    return found


def _tasks(tree: Tree, token: str) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Number and tasks of each array, as its submission wrote them down before sbatch."""
    for path in (tree.root / "slurm" / token).glob("tasks.*.json"):
        yield int(path.name.split(".")[1]), (read_json(path) or {"tasks": []})["tasks"]


def _arrays(tree: Tree, tokens: set[str]) -> dict[tuple[str, str], str]:
    """(token, stage) -> comment of its array."""
    return {
        (token, row["stage"]): comment_of(token, array)
        for token in tokens
        for array, rows in _tasks(tree, token)
        for row in rows
    }


def _somebody_submits(tree: Tree) -> bool:
    lock = tree.root / "slurm" / "submitting"
    lease = read_lease(lock)
    if lease is None:
        return False
    is_dead = owner_is_dead(lease)
    return is_dead is False or (is_dead is None and not is_long_silent(lock))


def _beating(
    tree: Tree,
    graph: Mapping[str, states.Node],
    over: Mapping[str, StageState],
    may_wait: bool,
) -> set[str]:
    """Running stages whose lease beats, whatever the queue says."""
    leases = {
        s: tree.stage(graph[s].kind, s).lease for s, v in over.items() if v.state == "running"
    }
    deadline = time.monotonic() + 2.5 * BEAT_S
    while True:
        lives = {stage: _lives(path) for stage, path in leases.items()}
        if not may_wait or None not in lives.values() or time.monotonic() > deadline:
            return {stage for stage, life in lives.items() if life is not False}
        time.sleep(min(0.5, BEAT_S / 4))


def _lives(path: Path) -> bool | None:
    """Whether the owner of a lease lives; None as long as it has been watched too briefly."""
    lease = read_lease(path)
    is_dead = lease is None or owner_is_dead(lease)
    # Nobody's clock is so wrong, and an old lease need not be watched.
    if lease is None or is_dead is not None or is_long_silent(path):
        _seen.pop(path, None)
        return is_dead is False
    sign, now = (lease["token"], lease["beat"]), time.monotonic()
    before, since = _seen.setdefault(path, (sign, now))
    if before != sign:
        _seen[path] = (sign, now)
        return True
    return None if now - since <= 2 * BEAT_S else False


def _is_ours(status: Mapping[str, Any], me: str, here: str | None) -> bool:
    """False for a job that is known to be another user's, or another cluster's than this host's."""
    is_here = here is None or status.get("site") in (None, here)
    return is_here and status.get("user") in (None, me)
