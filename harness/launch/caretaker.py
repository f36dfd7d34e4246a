"""The last job of a submission: submits again what no job could speak for, within the retry table.

A lost node, a time limit that came without warning or a job that was not allowed to requeue leave
stages that nobody runs any more, and Slurm drops the jobs behind them. This one looks at the files
and the queue when all others are over, or when the submission was killed before it could name the
others; what it submits has a caretaker of its own, and so has what of its own is still under way.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_STORAGE, UserError
from harness.launch import batch, commands, ends, provenance, queue, slurm
from harness.launch.job import OTHERWISE
from harness.launch.settings import Slurm
from harness.ledger import attempts, store
from harness.ledger.claim import unclaim
from harness.ledger.files import read_json, read_jsonl
from harness.ledger.lease import exclusive
from harness.ledger.states import ACTIVE, StageState
from harness.ledger.tree import StageFolder, Tree
from harness.study.schema import Retry
from harness.study.stages import StageFile

_PATIENCE_S = 1200.0
"""Of the half hour that its job has."""
_MOST_RESTARTS = 500
"""Of one job; that takes most of a day."""


def tend(folder: Path) -> slurm.Submitted:
    """Submits what is left of the submission in `folder`."""
    about = read_json(folder / "submission.json")
    assert about is not None, f"{folder}: has no submission.json"
    tree = Tree(folder.parent.parent)
    retry = Retry.model_validate(about["retry"])
    profile = Slurm.model_validate(about["profile"])
    # A copy of it is what runs here, and knows of no commit.
    git = provenance.GitState.of_kept(tree, about["git"]["sha"], about["git"]["name"])
    code = provenance.Code(git=git, path=Path(about["code"]))
    stages = {
        s: store.read_stage(tree.stage(k, s))
        for s, k in about["stages"].items()
        if tree.stage(k, s).stage.exists()
    }
    # A submission that is still under way will have said by then what it put into the queue.
    with exclusive(tree.root / "slurm" / "submitting", patience_s=_PATIENCE_S):
        states = queue.read_states(tree, stages, max_age_s=0.0, is_submitting=True)
        states = slurm.numbered(tree, stages, states)
        own = {s: v for s, v in states.items() if v.status.get("token") == about["token"]}
        lost = {s: _about(v.status) for s, v in own.items() if v.state == "lost"}
        failed = [s for s, v in own.items() if v.state == "failed"]
        live = queue.jobs_now() if failed or {} in lost.values() else {}
        if live is None:  # what it seems to have forgotten it only did not say
            raise UserError("squeue does not answer; to be tried again")
        for stage_id, said in lost.items():
            _close(tree, stages, states, stage_id, said or {}, retry)
        for stage_id in failed:
            # Its job may have been killed before it could decide; one that lives decides itself.
            if own[stage_id].status.get("job") not in live:
                ends.reconsider(tree.stage(stages[stage_id].kind, stage_id), retry)
    jobs = [str(v.status.get("job") or "") for v in own.values() if v.state in ACTIVE]
    if jobs and not queue.caretakers(about["token"]):
        after = filter(None, jobs)
        batch.submit_caretaker(folder, profile, about["study"], code.path, after)
    # Of a submission that put something into the queue nothing was refused in the end.
    refusals = 0 if own else int(about.get("refusals", 0))
    return slurm.submit(tree, about["study"], stages, profile, retry, refusals=refusals, code=code)


def _about(status: Mapping[str, Any]) -> dict[str, str] | None:
    """What Slurm says of a stage's job; None if it never had one."""
    return commands.about_job(status["job"]) if status.get("job") else None


def _close(
    tree: Tree,
    stages: Mapping[str, StageFile],
    states: Mapping[str, StageState],
    stage_id: str,
    about: dict[str, str],
    retry: Retry,
) -> None:
    """Says of a lost stage how its attempt ended, or that there was none."""
    folder, status = tree.stage(stages[stage_id].kind, stage_id), states[stage_id].status
    attempt, job = int(status.get("attempt") or 0), status.get("job")
    if not job:
        unclaim(folder, attempt, "its submission broke off")
        return
    upstream = stages[stage_id].config.upstream.values()
    is_dropped = about.get("Reason") == "DependencyNeverSatisfied"
    is_cancelled = about.get("JobState") == "CANCELLED"  # its upstream may be under way
    has_begun = status.get("state") == "running"
    is_early = any(states[u].state != "done" for u in upstream if u in states) and not has_begun
    is_forgotten = not about and not has_begun and not _has_said(folder, attempt)
    is_forgotten = is_forgotten and _was_dropped(tree, stages[stage_id], status)
    if is_dropped or is_forgotten or (is_early and not is_cancelled):
        unclaim(folder, attempt, "its job was dropped: it waited for one that failed")
        return
    with exclusive(folder.claim):
        end = _end_of(folder, attempt, about)
        status = attempts.close(folder, attempt, *end)
        ends.conclude(folder, attempt, status, retry, end[2] if end[0] == "cancelled" else None)


def _was_dropped(tree: Tree, stage: StageFile, status: Mapping[str, Any]) -> bool:
    """Of a job that Slurm has forgotten: whether one that it waited for ended otherwise than well.

    Though what that one was to do is done: its job ended badly after the result, or another
    submission has done it since.
    """
    for upstream, kind in stage.upstream_kinds.items():
        folder = tree.stage(kind, upstream)
        for event in read_jsonl(folder.events):
            is_later = event["time"] > (status.get("submitted") or 0)
            is_other = event["event"] == "submitted" and event.get("token") != status["token"]
            if is_later and (is_other or event["event"] == OTHERWISE):
                return True
    return False


_CANCELLED = ("cancelled", "cancelled", "its job was cancelled in Slurm")
_ENDS = {
    "CANCELLED": _CANCELLED,
    "PREEMPTED": ("preempted", "preempted", "its job was preempted before it could save"),
    "TIMEOUT": ("timeout", "timeout", "its job reached its time limit before it could save"),
    "DEADLINE": ("timeout", "timeout", "its job reached its deadline"),
    "OUT_OF_MEMORY": ("failed", "killed", "its job used more memory than it asked for"),
    "NODE_FAIL": ("failed", "node_fail", "its node was lost"),
    "BOOT_FAIL": ("failed", "node_fail", "its node did not start"),
}
"""Slurm's word for the end of a job -> state, reason, message."""


def _has_said(folder: StageFolder, attempt: int) -> bool:
    """Whether the job of an attempt printed anything; Slurm opens its log before that."""
    log = ends.log_of(folder, attempt)
    return log.exists() and log.stat().st_size > 0


def _end_of(folder: StageFolder, attempt: int, about: dict[str, str]) -> tuple[str, str, str]:
    """How an attempt ended whose job left the queue without a word: state, reason, message.

    Slurm forgets jobs soon (MinJobAge). Of one that it has forgotten and that left no log either,
    the likely end is that somebody took it out of the queue: what it waited for is done.
    """
    state = about.get("JobState", "")
    if state in _ENDS:
        return _ENDS[state]
    if about.get("ExitCode", "").partition(":")[0] == str(EXIT_STORAGE):
        return "failed", "storage", f"{folder.path} took no files; free space"
    said = f"its job ended as {state}, exit code {about.get('ExitCode')}" if about else "its job"
    log = ends.log_of(folder, attempt)
    record = read_json(folder.attempt(attempt) / "attempt.json") or {}
    if record.get("job_started"):
        if not about:
            return "failed", "node_fail", "its job is gone"
        return "failed", "killed", f"{said}, without a word; see {log}"
    if not about and not _has_said(folder, attempt):
        return _CANCELLED
    # Its own first command failed: it would do so again.
    said = said if about else f"{said} ended"
    return "failed", "code", f"{said}, before the stage began; see {log}"


def main(arguments: list[str] | None = None) -> int:
    """`python -m harness.launch.caretaker FOLDER`, as a job of its own."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    try:
        done = tend(Path(folder))
    except Exception as error:
        # As long as this job stands in the way (MaxSubmitJobs), Slurm or a disk does not answer, or
        # whatever else: its place is kept, and Slurm waits two minutes before each start.
        if isinstance(error, UserError):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        is_last = int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= _MOST_RESTARTS
        return EXIT_FAILED if is_last else EXIT_REQUEUE
    print(f"{len(done.jobs)} stages submitted again in {done.arrays} arrays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
