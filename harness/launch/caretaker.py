"""The last job of a submission: submits again what no job could speak for, within the retry table.

A lost node, a time limit that came without warning or a job that was not allowed to requeue leave
stages that nobody runs any more, and Slurm drops the jobs behind them. This one looks at the files
and the queue when all others are over; what it submits has a caretaker of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.launch import queue, slurm
from harness.launch.ends import conclude
from harness.launch.settings import Slurm
from harness.ledger import attempts, store
from harness.ledger.claim import unclaim
from harness.ledger.files import read_json
from harness.ledger.lease import exclusive
from harness.ledger.tree import StageFolder, Tree
from harness.study.schema import Retry


def tend(folder: Path) -> slurm.Submitted:
    """Submits what is left of the submission in `folder`."""
    about = read_json(folder / "submission.json")
    assert about is not None, f"{folder}: has no submission.json"
    tree = Tree(folder.parent.parent)
    retry = Retry.model_validate(about["retry"])
    stages = {
        s: store.read_stage(tree.stage(k, s))
        for s, k in about["stages"].items()
        if tree.stage(k, s).stage.exists()
    }
    states = queue.read_states(tree, stages)
    for stage_id, state in states.items():
        own = tree.stage(stages[stage_id].kind, stage_id)
        if state.state != "lost" or state.status.get("token") != about["token"]:
            continue
        attempt = int(state.status.get("attempt") or 0)
        job = state.status.get("job")
        if not job:
            unclaim(own, attempt, "its submission broke off")
            continue
        upstream = stages[stage_id].config.upstream.values()
        about_job = queue.about_job(job)
        is_dropped = about_job.get("Reason") == "DependencyNeverSatisfied"
        if is_dropped or any(states[u].state != "done" for u in upstream if u in states):
            unclaim(own, attempt, "its job was dropped: it waited for one that failed")
            continue
        with exclusive(own.claim):
            end = _end_of(own, attempt, about_job)
            status = attempts.close(own, attempt, *end)
            why = end[2] if end[0] == "cancelled" else None
            conclude(own, attempt, status, retry, why)
    profile = Slurm.model_validate(about["profile"])
    return slurm.submit(tree, about["study"], stages, profile, retry, cancelled_too=False)


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


def _end_of(folder: StageFolder, attempt: int, about: dict[str, str]) -> tuple[str, str, str]:
    """How an attempt ended whose job left the queue without a word: state, reason, message.

    Slurm forgets jobs soon (MinJobAge). Of one that it has forgotten and that never began, the
    likely end is that somebody took it out of the queue: what it waited for is done.
    """
    record = read_json(folder.attempt(attempt) / "attempt.json") or {}
    known = _ENDS.get(about.get("JobState", ""))
    if known is not None:
        return known
    if not about and not record.get("job_started"):
        return _CANCELLED
    return "failed", "node_fail", "its job is gone"


def main(arguments: list[str] | None = None) -> int:
    """`python -m harness.launch.caretaker FOLDER`, as a job of its own."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    done = tend(Path(folder))
    print(f"{len(done.jobs)} stages submitted again in {done.arrays} arrays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
