"""What runs inside a Slurm job: before, as, and after the ranks of one stage.

`begin` and `end` run in the batch shell, on the first node, without torch; between them srun
starts `run_rank` once per GPU. What the ranks cannot say any more, `end` says for them; what `end`
cannot (a lost node), the next `begin` of the same job or the caretaker does.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.launch import ends, provenance, queue
from harness.launch.policy import decide
from harness.ledger import attempts, states, store
from harness.ledger.claim import stop_asked, submitted
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import exclusive, this_host
from harness.ledger.tree import StageFolder, Tree
from harness.study.schema import Retry
from harness.study.stages import StageFile

NOTHING_TO_DO = 3
EXIT_BUSY = 76  # harness.worker's, which must not be imported here
_WORKER = "harness.worker"
_PORTS = range(20000, 32000)  # below those that systems hand out to anybody


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The stage of this job."""

    tree: Tree
    stage: StageFile
    folder: StageFolder
    submission: dict[str, Any]
    job: str

    @property
    def retry(self) -> Retry:
        return Retry.model_validate(self.submission["retry"])


def _read(tasks_file: str) -> _Task:
    about = read_json(Path(tasks_file))
    assert about is not None, f"{tasks_file}: no such file"
    submission = read_json(Path(about["submission"]) / "submission.json")
    assert submission is not None, f"{about['submission']}: has no submission.json"
    row = about["tasks"][int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    tree = Tree(Path(os.environ["HARNESS_ROOT"]))
    folder = tree.stage(row["kind"], row["stage"])
    return _Task(
        tree=tree,
        stage=store.read_stage(folder),
        folder=folder,
        submission=submission,
        job=this_job(),
    )


def this_job() -> str:
    """The id of the job around us, as the queue shows it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


# --- before the ranks ----------------------------------------------------------------------


def begin(tasks_file: str) -> int:
    """Prints shell exports for the ranks. Exit code: 0 to go on, 3 if the stage is done already."""
    task = _read(tasks_file)
    with exclusive(task.folder.path / "claim"):
        try:
            code, attempt = _take(task)
        except Exception as error:
            # Nobody else would tell: the ranks, and `end`, are never started.
            number = int((read_json(task.folder.status) or {}).get("attempt") or 0)
            attempts.close(task.folder, number, "failed", "code", f"in `begin`: {error}")
            raise
    if code:
        return code
    assert attempt is not None
    git = task.submission["git"]
    state = provenance.GitState.of_kept(task.tree, git["sha"], git["name"])
    provenance.write_attempt(task.folder.attempt(attempt), state, task.tree)
    # So that a person reading squeue sees what runs where.
    queue.scontrol("update", f"JobId={task.job}", f"JobName={task.stage.id}")
    exports = {
        "HARNESS_STAGE": task.stage.id,
        "HARNESS_ATTEMPT": str(attempt),
        "HARNESS_RUN_DIR": str(task.folder.path),
        "MASTER_ADDR": _address(),
        "MASTER_PORT": str(_port()),
    }
    print(" ".join(["export", *(shlex.quote(f"{k}={v}") for k, v in exports.items())]))
    return 0


def _take(task: _Task) -> tuple[int, int | None]:
    """Makes the stage this job's, or says why not: (exit code, attempt)."""
    folder, stage = task.folder, task.stage
    found = states.read_states(task.tree, store.with_upstream(task.tree, stage))
    if found[stage.id].state == "done":
        print(f"{stage.id} is done already", file=sys.stderr)
        return NOTHING_TO_DO, None
    status = read_json(folder.status) or {}
    attempt = int(status.get("attempt") or 0)
    if (why := stop_asked(folder)) is not None:
        attempts.close(folder, attempt, "cancelled", why, why, end="cancelled")
        return 1, None
    if status.get("token") != task.submission["token"]:
        print(f"{stage.id}: was submitted again since, as {status.get('job')}", file=sys.stderr)
        return 1, None
    missing = [u for u in stage.upstream_kinds if found[u].state != "done"]
    if missing:
        # Not a try of the stage: with its end left open it would count as a lost node.
        attempts.note_end(folder, attempt, "dropped", f"upstream {missing[0]} is not done")
        write_json(folder.status, {**status, "state": "planned", "job": None, "token": None})
        print(f"{stage.id}: upstream {missing[0]} is not done", file=sys.stderr)
        return 1, None
    record = read_json(folder.attempt(attempt) / "attempt.json") or {}
    if record.get("job_started") or status.get("state") != "submitted":
        # This job was started again: by itself, by an administrator, or since its node was lost.
        if record.get("end") is None:
            where = record.get("node") or "its node"
            attempts.close(folder, attempt, "failed", "node_fail", f"{where} was lost")
            decision = decide(
                task.retry, attempts.read_attempts(folder), attempts.progress_of(folder)
            )
            if not decision.again:
                print(f"{stage.id}: {decision.why}", file=sys.stderr)
                return 1, None
            store.add_event(folder, "retry", attempt=attempt, why=decision.why)
            status = {**(read_json(folder.status) or {}), "state": "preempted"}
            write_json(folder.status, status)
    if _this_node() in _places_to_avoid(task) and _elsewhere(task):
        return 1, None
    if record.get("job_started") or status.get("state") != "submitted":
        attempt = folder.new_attempt()
        attempts.begin(folder, attempt, {})
    record = read_json(folder.attempt(attempt) / "attempt.json") or {}
    write_json(
        folder.attempt(attempt) / "attempt.json",
        {
            **record,
            "job": task.job,
            "job_started": time.time(),
            "host": this_host(),
            "node": _this_node(),
        },
    )
    owner = {"cluster": "slurm", "job": task.job, "token": task.submission["token"]}
    write_json(folder.status, submitted(attempt, owner))
    return 0, attempt


def _this_node() -> str:
    """Slurm's name of this node, which need not be its host name."""
    return os.environ.get("SLURMD_NODENAME") or this_host().partition(":")[0]


def _places_to_avoid(task: _Task) -> set[str]:
    """Nodes on which the stage was lost."""
    tries = attempts.read_attempts(task.folder)
    return {a.host for a in tries if a.end == "node_fail" and a.host}


def _elsewhere(task: _Task) -> bool:
    """Puts the job back into the queue without the nodes it was lost on; False where it cannot."""
    names = ",".join(sorted(_places_to_avoid(task)))
    if not task.submission["profile"]["requeue"]:
        return False
    queue.scontrol("update", f"JobId={task.job}", f"ExcNodeList={names}")
    return queue.scontrol("requeue", task.job) is not None


def _address() -> str:
    """Where other nodes of the job reach this one, the first of them."""
    if os.environ.get("SLURM_NNODES", "1") == "1":
        return "127.0.0.1"
    name = os.environ["SLURMD_NODENAME"]
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        # A node may be known to Slurm under a name that no resolver knows.
        for word in (queue.scontrol("show", "node", name) or "").split():
            if word.startswith("NodeAddr="):
                return word.partition("=")[2]
        return name


def _port() -> int:
    """A free port of this host; by job, so that two jobs that ask at once try others first."""
    start = int(os.environ["SLURM_JOB_ID"]) * 7 % len(_PORTS)
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise HarnessError("no free port on this host")


# --- a rank --------------------------------------------------------------------------------


def run_rank(tasks_file: str) -> None:
    """One process of the stage, as srun starts it; ends the process itself unless all is well."""
    # submitit's own handlers would swallow these while torch is imported; the worker lets them in.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    task = _read(tasks_file)
    rank, ranks = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    attempt = os.environ["HARNESS_ATTEMPT"]
    logs, suffix = task.folder.attempt(int(attempt)), "" if rank == "0" else f".rank{rank}"
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(
            logs / f"{name}{suffix}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        os.dup2(target, number)
        os.close(target)
    os.environ.update(
        {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "LOCAL_SIZE": str(int(ranks) // int(os.environ.get("SLURM_NNODES", "1"))),
        }
    )
    arguments = ["--root", str(task.tree.root), "--kind", task.stage.kind]
    arguments += ["--stage", task.stage.id, "--attempt", attempt]
    code = importlib.import_module(_WORKER).main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0:
        # Hard: a thread of a library must not keep a failed rank, and with it the job, alive.
        os._exit(code)


# --- after the ranks -----------------------------------------------------------------------


def end(tasks_file: str, code: int) -> int:
    """Says how the attempt ended, and puts the job back into the queue if that helps."""
    task = _read(tasks_file)
    folder, attempt = task.folder, int(os.environ["HARNESS_ATTEMPT"])
    number = -(code - 128) if 128 < code < 160 else code
    about = _about(task.job)
    is_running = about.get("JobState") == "RUNNING"
    why = "cancelled in Slurm" if _is_cancelled(about) else None
    with exclusive(folder.claim):
        if code == EXIT_BUSY:
            attempts.end_busy(folder, attempt)
            return 1
        status = ends.settle(folder, attempt, number, asked_to_stop=not is_running)
        if status.get("attempt") != attempt or status.get("state") == "done":
            return 0 if status.get("state") == "done" else 1
        decision = ends.conclude(folder, attempt, status, task.retry, why)
    print(f"{task.stage.id}: {status.get('reason')}; {decision.why}", file=sys.stderr)
    if decision.again and is_running and task.submission["profile"]["requeue"]:
        if decision.avoid:
            names = ",".join(decision.avoid)
            queue.scontrol("update", f"JobId={task.job}", f"ExcNodeList={names}")
        if queue.scontrol("requeue", task.job) is not None:
            time.sleep(120)  # Slurm ends this shell
    return 1


def _about(job: str) -> dict[str, str]:
    """What Slurm says of a job, by its own names; empty if it does not answer."""
    words = (queue.scontrol("show", "job", job) or "").split()
    return {k: v for k, _, v in (w.partition("=") for w in words)}


def _is_cancelled(about: dict[str, str]) -> bool:
    """True if somebody took the job out of the queue.

    While its steps end it is COMPLETING, and so is one that is put back; that one's number of
    restarts is a new one already.
    """
    if about.get("JobState") == "CANCELLED":
        return True
    is_new_life = about.get("Restarts") != os.environ.get("SLURM_RESTART_COUNT", "0")
    at_limit = about.get("Reason") in ("TimeLimit", "NodeDown")
    return about.get("JobState") == "COMPLETING" and not is_new_life and not at_limit


def main(arguments: list[str] | None = None) -> int:
    """`python -m harness.launch.job begin|end TASKS [--code N]`, called by the batch script."""
    parser = argparse.ArgumentParser(prog="harness.launch.job")
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("tasks")
    parser.add_argument("--code", type=int, default=0)
    given = parser.parse_args(arguments)
    return begin(given.tasks) if given.what == "begin" else end(given.tasks, given.code)


if __name__ == "__main__":
    sys.exit(main())
