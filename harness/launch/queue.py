"""What Slurm's queue says of our jobs: asked once, for all of them; nothing is believed beyond it.

A job that is in the queue lives, whatever its state is called there; one that is not is over. No
accounting is needed (`sacct` fails on many clusters). Without an answer nothing is concluded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.ledger import states
from harness.ledger.states import TOKEN, StageState
from harness.ledger.tree import Tree
from harness.study.stages import StageFile

_TIMEOUT_S = 60
_SEPARATOR = "\x1f"
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
    tool = shutil.which("squeue")
    if tool is None:
        return None
    command = [tool, "--me", "--array", "--noheader", "--format", _FIELDS]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=scrubbed()
        )
    except subprocess.TimeoutExpired:
        return None
    return parse(done.stdout) if done.returncode == 0 else None


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


def read_states(tree: Tree, stages: Mapping[str, StageFile]) -> dict[str, StageState]:
    """`harness.ledger.states.read_states`, with what Slurm knows of the jobs among them.

    Asks the queue only if a stage was submitted to it. The queue is asked after the files were
    read: a job in the files of before that is not in the queue of now is over.
    """
    return read_graph(tree, states.graph_of(stages))


def read_graph(tree: Tree, graph: Mapping[str, states.Node]) -> dict[str, StageState]:
    """`read_states`, of stages of which only kinds and edges are known."""
    found = states.read_graph(tree, graph)
    asked = {
        s: v.status.get("job") or v.status.get(TOKEN)
        for s, v in found.items()
        if v.state not in ("done", "failed", "diverged")
    }
    if not any(asked.values()):
        return found
    jobs = jobs_now()
    if jobs is None:
        return found
    live = {j.id for j in jobs.values()} | {j.comment for j in jobs.values()}
    over = {s: str(j) for s, j in asked.items() if j and j not in live}
    waiting = {s: str(j) for s, j in asked.items() if j and j in live}
    return states.read_graph(tree, graph, over=over, waiting=waiting)


def cancel_jobs(ids: Iterable[str]) -> None:
    """Takes jobs out of the queue. Those that are over already are not an error."""
    wanted = list(ids)
    for start in range(0, len(wanted), 200):
        command = ["scancel", "--quiet", *wanted[start : start + 200]]
        done = subprocess.run(command, capture_output=True, text=True, env=scrubbed())
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise HarnessError(f"scancel: {done.stderr.strip().splitlines()[-1]}")


def scontrol(*arguments: str) -> str | None:
    """What scontrol printed; None if it failed."""
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=scrubbed()
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def max_array_size() -> int:
    """Tasks that this site allows in one array (MaxArraySize is one more than the last index)."""
    for line in (scontrol("show", "config") or "").splitlines():
        if line.startswith("MaxArraySize"):
            return max(1, int(line.split("=")[1]))
    return 1000


def scrubbed(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what the surrounding job set.

    Inside an allocation, sbatch and srun take SLURM_* for options and hand them on: a nested job
    would get the CPUs, tasks and pickles of the outer one. SLURM_CONF says where the cluster is.
    """
    drop = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SLURMD_")
    kept = ("SLURM_CONF",)
    source = os.environ if env is None else env
    return {k: v for k, v in source.items() if k in kept or not k.startswith(drop)}


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Inside: os.environ is scrubbed, for libraries that start sbatch themselves."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(scrubbed(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
