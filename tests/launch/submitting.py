"""Submissions of a small study to a Slurm of scripts, and what they left."""

from __future__ import annotations

from typing import Any

from harness.launch import queue, slurm
from harness.launch.settings import Slurm
from harness.ledger.files import read_json, write_json
from harness.ledger.tree import Tree
from harness.study.cells import Grid
from harness.study.schema import Retry
from tests.launch.fake_slurm import FakeSlurm

REFUSE = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
COUNT = "$(cat {0}/sbatch.calls | wc -l)"


def submit(tree: Tree, grid: Grid, refusals: int | None = None, **profile: Any) -> slurm.Submitted:
    profile = {"device": "cpu", **profile}
    return slurm.submit(tree, "small", grid.stages, Slurm(**profile), Retry(), refusals=refusals)


def states(tree: Tree, grid: Grid) -> dict[str, str]:
    return {s: v.state for s, v in queue.read_states(tree, grid.stages).items()}


def takes_only(site: FakeSlurm, number: int) -> None:
    """The next jobs that sbatch takes, counted from now."""
    count, limit = COUNT.format(site.folder), site.calls("sbatch") + number
    site.says(
        "sbatch",
        f'if [ {count} -gt {limit} ]; then {REFUSE}; fi; echo "Submitted batch job {count}"',
    )


def submissions(tree: Tree) -> dict[str, dict[str, Any]]:
    return {p.parent.name: read_json(p) or {} for p in tree.root.glob("slurm/*/submission.json")}


def scripts(tree: Tree, token: str) -> list[str]:
    """What sbatch was given; submitit keeps each file under two names."""
    paths = (tree.root / "slurm" / token).glob("jobs/*submission*.sh")
    return sorted({path.read_text() for path in paths})


def in_queue_but(site: FakeSlurm, jobs: dict[str, str], *stages: str) -> None:
    """The queue, without the jobs of some stages; of these Slurm knows nothing any more."""
    site.holds(*((job, "x") for s, job in jobs.items() if s not in stages))
    site.says("scontrol", f'case "$2" in job) exit 1;; *) cat {site.folder}/scontrol.txt;; esac')


def finish(tree: Tree, grid: Grid, stage_id: str, **status: Any) -> None:
    """The stage is done, by its first attempt."""
    stage = grid.stages[stage_id]
    folder = tree.stage(stage.kind, stage.id)
    write_json(folder.result, {"uid": "u", "attempts": 1, "upstream_uids": {}, "steps": None})
    about = {**(read_json(folder.status) or {}), "state": "done", **status}
    write_json(folder.status, about)
