"""The tries at a stage, as their own files tell them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.ledger import store
from harness.ledger.files import read_json, read_jsonl, write_json
from harness.ledger.tree import StageFolder


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try: why it ended (None: nobody said), where, and what it started from."""

    number: int
    end: str | None
    host: str | None
    progress: int
    """What was there when it started: see `progress_of`."""


def progress_of(folder: StageFolder) -> int:
    """A number that grows when an attempt leaves something that the next one goes on from.

    The step of the last complete checkpoint; where a protocol keeps none, the finished parts.
    """
    if folder.checkpoints.is_dir():
        return last_checkpoint(folder) or 0
    own = ("attempts", "checkpoints")
    parts = (p for p in folder.path.glob("*/*") if p.parent.name not in own)
    return sum(1 for p in parts if not p.name.startswith("."))


def last_checkpoint(folder: StageFolder) -> int | None:
    """Step of the last complete checkpoint; None if there is none."""
    steps = [
        int(p.parent.name.removeprefix("step_"))
        for p in folder.checkpoints.glob("step_*/COMPLETE")
        if p.parent.name.removeprefix("step_").isdigit()
    ]
    return max(steps, default=None)


def begin(folder: StageFolder, number: int, about: dict[str, Any]) -> None:
    """Writes attempt.json before the worker starts: it may never get to say anything."""
    row = {"schema": 1, "attempt": number, "progress": progress_of(folder), "end": None, **about}
    write_json(folder.attempt(number) / "attempt.json", row)


def has_begun(folder: StageFolder, number: int) -> bool:
    """Whether the attempt's rank 0 owns the stage, and what is in its folder is this run's."""
    # Not a file that is not there before: on NFS other hosts may not see a new one for a minute.
    row = read_json(folder.attempt(number) / "attempt.json") or {}
    return row.get("started") is not None


_NO_TRIES = ("busy", "dropped")
"""Ends of attempts that found they had nothing to do: they say nothing of the stage."""


def read_attempts(folder: StageFolder) -> list[Attempt]:
    """The tries since the stage last started over, in order: because a user wanted it (retry,
    force), or since what it starts from is another run's."""
    events = [e for e in read_jsonl(folder.events) if e.get("by") in ("user", "upstream")]
    forgiven = max((int(e.get("attempt") or 0) for e in events), default=0)
    found = []
    for number in folder.attempt_numbers():
        if number <= forgiven:
            continue
        row = read_json(folder.attempt(number) / "attempt.json")
        # Without a record it was not even claimed: whoever made its folder was killed there.
        if row is None or row.get("end") in _NO_TRIES:
            continue
        found.append(
            Attempt(
                number=number,
                end=row.get("end"),
                host=row.get("node") or row.get("host"),
                progress=int(row.get("progress") or 0),
            )
        )
    return found


def last_failure(folder: StageFolder, before: int) -> dict[str, Any] | None:
    """What ended the last try before this attempt: its number, reason, message.

    None if that went well, or if nobody said how it went.
    """
    for number in range(before - 1, 0, -1):
        row = read_json(folder.attempt(number) / "attempt.json") or {}
        if row.get("end") in _NO_TRIES:
            continue
        if row.get("end") in (None, "done"):
            return None
        return {"attempt": number, "reason": row["end"], "message": row.get("message")}
    return None


def forgive(folder: StageFolder, why: str) -> None:
    """Notes that a user wants the stage to run again: earlier tries count no longer."""
    numbers = folder.attempt_numbers()
    store.add_event(folder, why, by="user", attempt=numbers[-1] if numbers else 0)


def close(
    folder: StageFolder,
    number: int,
    state: str,
    reason: str,
    message: str,
    end: str | None = None,
) -> dict[str, Any]:
    """Says how an attempt ended where its worker could not; returns the new status.json.

    One that a later attempt has written stays as it is. `end` is the record's word for the end
    where that is not the reason.
    """
    status = read_json(folder.status) or {}
    if int(status.get("attempt") or 0) > number:
        note_end(folder, number, end or reason, message)
        return status
    now = time.time()
    note_end(folder, number, end or reason, message, ended=now, again=True)
    row = {**status, "schema": 1, "state": state, "reason": reason, "message": message}
    row |= {"attempt": number, "ended": now}
    write_json(folder.status, row)
    store.add_event(folder, state, attempt=number, reason=reason, message=message)
    return row


def note_end(
    folder: StageFolder,
    number: int,
    end: str,
    message: str | None,
    *,
    ended: float | None = None,
    again: bool = False,
) -> None:
    """Writes into attempt.json how the attempt ended, unless that is known; `again` even then.

    How far it came is in status.json, as long as no later attempt has written that.
    """
    path = folder.attempt(number) / "attempt.json"
    row = read_json(path) or {"schema": 1, "attempt": number}
    if row.get("end") is not None and not again:
        return
    status = read_json(folder.status) or {}
    if status.get("attempt") == number:
        names = {"step": "last_step", "samples": "last_samples"}
        names |= {"started": "started", "job": "job"}
        row |= {ours: status[theirs] for theirs, ours in names.items() if theirs in status}
        row["last_checkpoint"] = last_checkpoint(folder)
        ended = ended or status.get("ended") or status.get("updated")
    result = read_json(folder.result) if end == "done" else None
    if result is not None and result.get("steps"):
        row |= {"last_step": result["steps"], "last_samples": result["samples"]}
    write_json(path, {**row, "end": end, "message": message, "ended": ended})


def told_by_ranks(folder: StageFolder, number: int) -> dict[str, Any] | None:
    """What a rank other than 0 left as the cause of the end; the first of them."""
    told: list[Path] = sorted(folder.attempt(number).glob("error.rank*.json"))
    return read_json(told[0]) if told else None


def end_busy(folder: StageFolder, number: int) -> None:
    """The attempt found a living owner and did nothing: the stage is running, by that one."""
    note_end(folder, number, "busy", "another process owns the stage", again=True)
    status = read_json(folder.status) or {}
    if status.get("attempt") == number and status.get("state") == "submitted":
        # With the job, if it has one: the queue, and its caretaker, go on looking after it.
        write_json(folder.status, {**status, "state": "running", "attempt": number - 1})
