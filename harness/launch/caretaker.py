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
from harness.ledger.tree import Tree
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
        upstream = stages[stage_id].config.upstream.values()
        if any(states[u].state != "done" for u in upstream if u in states):
            unclaim(own, attempt, "its job was dropped: it waited for one that failed")
            continue
        with exclusive(own.claim):
            status = attempts.close(own, attempt, "failed", "node_fail", "its job is gone")
            conclude(own, attempt, status, retry)
    profile = Slurm.model_validate(about["profile"])
    return slurm.submit(tree, about["study"], stages, profile, retry, cancelled_too=False)


def main(arguments: list[str] | None = None) -> int:
    """`python -m harness.launch.caretaker FOLDER`, as a job of its own."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    done = tend(Path(folder))
    print(f"{len(done.jobs)} stages submitted again in {done.arrays} arrays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
