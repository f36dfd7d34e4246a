"""What an attempt's end means, where its own worker could not say it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from harness.errors import EXIT_LOST_RANK, EXIT_REQUEUE, EXIT_STORAGE
from harness.launch.policy import Decision, decide
from harness.ledger import attempts, store
from harness.ledger.claim import stop_asked
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import exclusive
from harness.ledger.states import ACTIVE
from harness.ledger.tree import StageFolder
from harness.study.schema import Retry


def settle(
    folder: StageFolder,
    attempt: int,
    code: int,
    *,
    asked_to_stop: bool,
    gone: str | None = None,
    too_slow: str = "cancelled",
) -> dict[str, Any]:
    """The final status.json of an attempt whose every process is gone; written if it is missing.

    To be called, as `conclude` is, inside `exclusive(folder.claim)`: between the two a stage that
    will be tried again looks failed for good. `code` is the first exit code that was not 0,
    negative for a signal; `gone` says which host was lost, if one was; `too_slow` is the record's
    word for the end of one that was asked to stop and killed before it was through. The status of a
    later attempt stays: this one came too late.
    """
    status = read_json(folder.status) or {}
    if status.get("attempt") == attempt and status.get("state") not in (None, *ACTIVE):
        # What is only said of others that were asked to stop; not of one that will be tried again.
        is_theirs = (status["state"], status.get("reason")) == ("preempted", "preempted")
        if not is_theirs or not _is_a_rank_dead(folder, code, asked_to_stop):
            return status
    meaning = _meaning(folder, attempt, code, asked_to_stop, gone)
    is_too_slow = meaning[:2] == ("cancelled", "killed")
    if is_too_slow and too_slow == "preempted":
        meaning = (too_slow, too_slow, meaning[2])
    return attempts.close(folder, attempt, *meaning, end=too_slow if is_too_slow else None)


def _is_a_rank_dead(folder: StageFolder, code: int, asked_to_stop: bool) -> bool:
    """True if one of several ranks ended by itself: the others were asked to stop, and say so."""
    if asked_to_stop or code in (0, EXIT_REQUEUE) or stop_asked(folder) is not None:
        return False
    execution = (read_json(folder.stage) or {}).get("execution", {})
    return execution.get("ranks", 1) > 1


def conclude(
    folder: StageFolder, attempt: int, status: dict[str, Any], retry: Retry, why: str | None = None
) -> Decision:
    """What follows from a settled attempt; status.json says so.

    `why` is set if somebody wanted this end; a stop note says so too.
    """
    if int(status.get("attempt") or 0) > attempt:
        return Decision(again=False, why="a later attempt has the stage")
    if status.get("state") == "planned":  # it found what it starts from gone, and did nothing
        return Decision(again=True, why=str(status.get("message")))
    why = why or stop_asked(folder)
    interrupted = ("preempted", "timeout", "cancelled", "lost")
    if why is not None and status.get("state") in interrupted:
        store.add_event(folder, "cancelled", attempt=attempt, reason=why)
        write_json(folder.status, {**status, "state": "cancelled", "reason": why})
        return Decision(again=False, why=why)
    if status.get("state") == "cancelled" and status.get("reason") != "killed":
        # Its worker obeyed a note that was taken back (`harness resume`) before it was through.
        decision = Decision(again=True, why="resumed while it ended")
        store.add_event(folder, "retry", attempt=attempt, why=decision.why)
        write_json(folder.status, {**status, "state": "preempted", "reason": "preempted"})
        return decision
    tries = attempts.read_attempts(folder)
    decision = decide(retry, tries, attempts.progress_of(folder))
    if decision.again:
        store.add_event(folder, "retry", attempt=attempt, why=decision.why)
        write_json(folder.status, {**status, "state": "preempted"})
    elif status.get("state") in interrupted:
        # What is only interrupted would be started again; this one has had its tries.
        message = f"{decision.why}; {status.get('message')}"
        write_json(folder.status, {**status, "state": "failed", "message": message})
    return decision


def reconsider(folder: StageFolder, retry: Retry) -> Decision | None:
    """Makes a failed stage runnable if the table grants it another try; None if it has not failed.

    Who was to decide may have been killed between the end and the decision, and a table may allow
    more by now than it did.
    """
    with exclusive(folder.claim):
        status = read_json(folder.status) or {}
        tries = attempts.read_attempts(folder)
        if status.get("state") not in ("failed", "diverged") or not tries:
            return None
        decision = decide(retry, tries, attempts.progress_of(folder))
        if decision.again:
            store.add_event(folder, "retry", attempt=tries[-1].number, why=decision.why)
            write_json(folder.status, {**status, "state": "preempted"})
        return decision


def _meaning(
    folder: StageFolder, attempt: int, code: int, asked_to_stop: bool, gone: str | None
) -> tuple[str, str, str]:
    """State, reason, message."""
    if gone is not None:
        return "failed", "node_fail", gone
    said = attempts.told_by_ranks(folder, attempt)
    if said is not None:
        return said["state"], said["reason"], said["message"]
    if code < 0:
        name = signal.Signals(-code).name
        if asked_to_stop:
            return "cancelled", "killed", "did not stop in time"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return "failed", "killed", f"ended by {name}{hint}"
    log = log_of(folder, attempt)
    if code == EXIT_STORAGE:
        return "failed", "storage", f"{folder.path} takes no files; see {log}; free space"
    if code == EXIT_LOST_RANK:
        return "failed", "killed", f"a rank lost its connection to the others; see {log}"
    return "failed", "code", f"exit code {code}; see {log}"


def log_of(folder: StageFolder, attempt: int) -> Path:
    """Where to read what an attempt said: its ranks, or the Slurm job that started none."""
    log = folder.attempt(attempt) / "stderr.log"
    status = read_json(folder.status) or {}
    record = read_json(folder.attempt(attempt) / "attempt.json") or {}
    job, token = (record.get(key) or status.get(key) for key in ("job", "token"))
    of_job = folder.job_logs(str(token), str(job)) if job and token else []
    return of_job[0] if of_job and not log.exists() else log
