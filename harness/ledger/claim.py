"""Who may start a stage, and who asked it to end: exact however many commands ask at a time.

A claim is a compare-and-swap on status.json under a lock: of all commands that saw the same state,
one gets the next attempt. The lease of `harness.ledger.lease` then belongs to the worker itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from harness.ledger import attempts, store
from harness.ledger.files import leftovers, read_json, read_jsonl, remove_leftovers, write_json
from harness.ledger.lease import (
    EXPIRY_S,
    Lease,
    LeaseHeldError,
    exclusive,
    is_long_silent,
    owner_is_dead,
    process_started,
    read_lease,
    takeover_guard,
    this_host,
)
from harness.ledger.states import StageState
from harness.ledger.tree import StageFolder, Tree
from harness.study.stages import StageFile


def claim(tree: Tree, stage: StageFile, seen: StageState, owner: Mapping[str, Any]) -> int | None:
    """The number of a new attempt, or None if the stage is no longer as it was `seen`.

    `owner` goes into status.json: `cluster` and, under a scheduler, `job` or `token`.
    """
    folder = tree.stage(stage.kind, stage.id)
    folder.path.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.claim):
        if not is_as_seen(folder, seen):
            return None
        store.write_stage(tree, stage)
        remove_leftovers(folder.path)
        _close_last(folder)
        attempt = folder.new_attempt()
        attempts.begin(folder, attempt, {"claimed_by": this_host(), **owner})
        write_json(folder.status, submitted(attempt, owner))
    store.add_event(folder, "submitted", attempt=attempt, **owner)
    return attempt


def is_as_seen(folder: StageFolder, seen: StageState) -> bool:
    """True if nobody has written a new state since; to be asked inside `exclusive`."""
    status, result = read_json(folder.status) or {}, read_json(folder.result) or {}
    if seen.state == "done":
        # Of a done stage a reader of thousands is told no more than this.
        status = {key: status.get(key) for key in seen.status}
    return dict(seen.status) == status and seen.uid == result.get("uid")


def start_over(
    folder: StageFolder,
    seen: StageState,
    why: str,
    *,
    from_scratch: bool = False,
    keep_note: bool = False,
) -> bool:
    """Makes a stage runnable because a user wants it: earlier tries count no longer.

    False, and nothing is done, if the stage is no longer as it was `seen`: another command was
    quicker, and may have started it. `from_scratch` also sets aside what was produced; with
    `keep_note` a stage that somebody cancelled stays so.
    """
    with exclusive(folder.claim):
        lease = read_lease(folder.lease)
        if (lease and owner_is_dead(lease) is False) or not is_as_seen(folder, seen):
            return False
        if from_scratch and not _set_aside(folder, why):
            return False
        if not keep_note:
            folder.stop.unlink(missing_ok=True)  # of a stage that ended before it could obey
        attempts.forgive(folder, why)
        write_json(folder.status, {"schema": 1, "state": "planned", "reason": why})
    return True


def _set_aside(folder: StageFolder, why: str) -> bool:
    """False if the stage has a living owner, which may be one that nobody here can ask."""
    try:
        # An owner that was silent for longer than clocks differ need not be watched.
        is_gone = folder.lease.exists() and is_long_silent(folder.lease)
        lease = Lease.acquire(folder.lease, 0.0 if is_gone else EXPIRY_S)
    except LeaseHeldError:
        return False
    try:
        # No uids are these: of what is left behind if this is killed the next worker uses nothing.
        write_json(folder.lineage, {"schema": 1, "upstream_uids": None, "reason": why})
        store.set_aside(folder, lease.guard)
    finally:
        lease.release()
    return True


def set_job(tree: Tree, stage: StageFile, attempt: int, job: str) -> None:
    """Notes the scheduler's number of a claimed stage, unless its job has begun already."""
    folder = tree.stage(stage.kind, stage.id)
    with exclusive(folder.claim):
        status = read_json(folder.status) or {}
        is_ours = status.get("attempt") == attempt and status.get("state") == "submitted"
        if is_ours and not status.get("job"):
            write_json(folder.status, {**status, "job": job})


def unclaim(folder: StageFolder, attempt: int, why: str) -> None:
    """Takes a claim back whose worker never started: the stage is as it was before.

    Nothing happens if it has been claimed again, or begun, since.
    """
    with exclusive(folder.claim):
        status = read_json(folder.status) or {}
        record = read_json(folder.attempt(attempt) / "attempt.json") or {}
        is_later = int(status.get("attempt") or 0) > attempt
        if is_later or status.get("state") != "submitted" or record.get("job_started"):
            return
        _close_last(folder, "dropped", why)
        # Without the token a job of this submission that should turn up after all does nothing.
        about = {"state": "planned", "message": why, "job": None, "token": None}
        write_json(folder.status, {**status, **about})


def complete(folder: StageFolder) -> None:
    """Makes the files around a result say `done`, if its worker was killed before it could.

    Where the worker still lives, or nobody here can ask, nothing happens: it will say so itself.
    """
    with exclusive(folder.claim):
        lease, result = read_lease(folder.lease), read_json(folder.result)
        if result is None or (lease is not None and _beats(folder)):
            return
        number = int(result["attempts"])
        status = read_json(folder.status) or {}
        if lease is not None or takeover_guard(folder.lease).exists():
            try:
                # With what a killed `release` left. Who was silent for long need not be watched.
                expiry = 0.0 if is_long_silent(folder.lease) else EXPIRY_S
                Lease.acquire(folder.lease, expiry).release()
            except LeaseHeldError:
                return
        remove_leftovers(folder.path)
        folder.stop.unlink(missing_ok=True)
        attempts.note_end(folder, number, "done", None)
        events = read_jsonl(folder.events)
        if not any(e["event"] == "done" and e.get("attempt") == number for e in events):
            store.add_event(folder, "done", attempt=number, reason=None, message=None)
        if status.get("attempt") == number and status.get("state") != "done":
            about = {"state": "done", "reason": None, "message": None, "ended": time.time()}
            write_json(folder.status, {**status, **about})


def is_untold(folder: StageFolder, state: StageState) -> bool:
    """True for a done stage that something of its worker may be left of."""
    return state.state == "done" and (
        state.status.get("state") != "done"
        or folder.lease.exists()
        or takeover_guard(folder.lease).exists()
        or bool(leftovers(folder.path))
    )


def _close_last(
    folder: StageFolder, end: str = "lost", message: str = "ended without a word"
) -> None:
    """The attempt before, if it ended without a word: every one keeps a reason."""
    for number in folder.attempt_numbers()[-1:]:
        record = read_json(folder.attempt(number) / "attempt.json") or {}
        status = read_json(folder.status) or {}
        has_run = status.get("attempt") == number and status.get("state") != "submitted"
        has_run = has_run or bool(record.keys() & {"started", "job_started"})
        if end == "lost" and not has_run:
            end, message = "dropped", "its worker never started"
        attempts.note_end(folder, number, end, message)


def submitted(attempt: int, owner: Mapping[str, Any]) -> dict[str, Any]:
    """status.json of a stage that waits for its worker to start."""
    return {
        "schema": 1,
        "state": "submitted",
        "attempt": attempt,
        "host": this_host(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
        "submitted": time.time(),
        **owner,
    }


def ask_to_stop(folder: StageFolder, why: str) -> None:
    """Leaves a note that the worker, wherever it runs, obeys at its next heartbeat."""
    write_json(folder.stop, {"schema": 1, "reason": why, "time": time.time()})


def stop_asked(folder: StageFolder) -> str | None:
    """Why the stage is to stop, or None."""
    note = read_json(folder.stop)
    return None if note is None else str(note["reason"])


def _beats(folder: StageFolder) -> bool:
    """False where the worker is gone, or has given no sign for longer than clocks differ."""
    lease = read_lease(folder.lease)
    return lease is not None and not owner_is_dead(lease) and not is_long_silent(folder.lease)


def clear_stop(folder: StageFolder) -> None:
    """Takes the note away: the stage may run again.

    The job of a stage that waits, or whose worker is gone, is given up: where it is in a queue
    still, which nobody here may be able to ask, it does nothing when it starts.
    """
    with exclusive(folder.claim):
        beats = _beats(folder)  # first: of one that ends now the status then says so
        status = read_json(folder.status)
        record = read_json(folder.attempt(int((status or {}).get("attempt") or 0)) / "attempt.json")
        has_begun = (record or {}).get("job_started") is not None
        at_work = {"running": beats, "submitted": has_begun and not is_long_silent(folder.status)}
        if status is not None and not at_work.get(str(status.get("state"))):
            given_up: dict[str, str | None] = {"job": None, "token": None}
            has_job = bool(status.get("job") or status.get("token"))
            if status.get("state") == "submitted" and has_job and not has_begun:
                # Nobody will: of a claim without a job its command, on another host, would count.
                _close_last(folder, "dropped", "its job was given up")
                given_up["state"] = "planned"
            write_json(folder.status, {**status, **given_up})
        folder.stop.unlink(missing_ok=True)
