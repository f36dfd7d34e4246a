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

from harness.errors import EXIT_BUSY, EXIT_STORAGE, HarnessError, StorageError, storage_error
from harness.launch import commands, ends, nodes, provenance
from harness.launch.policy import lost_on
from harness.ledger import attempts, states, store
from harness.ledger.claim import complete, stop_asked, submitted
from harness.ledger.files import read_json, read_jsonl, write_json
from harness.ledger.lease import exclusive, this_host
from harness.ledger.tree import StageFolder, Tree
from harness.study.schema import Retry
from harness.study.stages import StageFile

NOTHING_TO_DO = 3
OTHERWISE = "result of a job that ended otherwise"
"""Event of a stage whose job Slurm does not call completed, though the stage is done."""
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
            status = read_json(task.folder.status) or {}
            if status.get("token") == task.submission["token"]:
                reason = "code" if _of_storage(error) is None else "storage"
                number = int(status.get("attempt") or 0)
                attempts.close(task.folder, number, "failed", reason, f"in `begin`: {error}")
            raise
    if code == NOTHING_TO_DO:
        complete(task.folder)  # this job may have been stopped, and put back, before it could
    if code:
        return code
    assert attempt is not None
    git = task.submission["git"]
    state = provenance.GitState.of_kept(task.tree, git["sha"], git["name"])
    provenance.write_attempt(task.folder.attempt(attempt), state, task.tree)
    # So that a person reading squeue sees what runs where.
    commands.scontrol("update", f"JobId={task.job}", f"JobName={task.stage.id}")
    exports = {
        "HARNESS_STAGE": task.stage.id,
        "HARNESS_ATTEMPT": str(attempt),
        "HARNESS_RUN_DIR": str(task.folder.path),
        "MASTER_ADDR": _address(),
        "MASTER_PORT": str(_port()),
    }
    print(" ".join(["export", *(shlex.quote(f"{k}={v}") for k, v in exports.items())]))
    return 0


def _of_storage(error: BaseException) -> StorageError | None:
    """The error as one of a disk that takes no files, if it is one."""
    if isinstance(error, StorageError):
        return error
    return storage_error(error) if isinstance(error, OSError) else None


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
            status = _close_untold(folder, attempt, record)
            decision = ends.conclude(folder, attempt, status, task.retry)
            if not decision.again:
                print(f"{stage.id}: {decision.why}", file=sys.stderr)
                return 1, None
            status = read_json(folder.status) or {}
    if _is_sent_elsewhere(task, attempt):
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
            "nodes": nodes.of_job(),
        },
    )
    # Whose job it is is known from its claim, also where nobody says so now.
    known = {name: status.get(name) or value for name, value in commands.identity().items()}
    owner = {"cluster": "slurm", **known, "token": task.submission["token"], "job": task.job}
    write_json(folder.status, submitted(attempt, owner))
    return 0, attempt


def _this_node() -> str:
    """Slurm's name of this node, which need not be its host name."""
    return os.environ.get("SLURMD_NODENAME") or this_host().partition(":")[0]


def _close_untold(folder: StageFolder, attempt: int, record: dict[str, Any]) -> dict[str, Any]:
    """The status of an attempt whose job Slurm stopped and put back, without time to say so.

    Only a node that is down, or was started since, was lost: else it was preempted, or requeued.
    """
    lost = nodes.lost_of(record)
    if lost == []:
        message = "its job was stopped and put back into the queue before it could save"
        return attempts.close(folder, attempt, "preempted", "preempted", message)
    name = lost[0] if lost else record.get("node")
    if name:  # the one to avoid, of several
        write_json(folder.attempt(attempt) / "attempt.json", {**record, "node": name})
    return attempts.close(folder, attempt, "failed", "node_fail", f"{name or 'its node'} was lost")


def _is_sent_elsewhere(task: _Task, attempt: int) -> bool:
    """Puts the job back if it has a node on which the stage was lost; once after each attempt.

    A second time it takes what it is given: perhaps there is no other node.
    """
    avoid = _avoidable(task)
    if not set(avoid) & set(nodes.of_job()) or not task.submission["profile"]["requeue"]:
        return False
    events = read_jsonl(task.folder.events)
    if any(e["event"] == "sent elsewhere" and e.get("attempt") == attempt for e in events):
        return False
    store.add_event(task.folder, "sent elsewhere", attempt=attempt, avoid=list(avoid))
    return nodes.put_back(task.job, avoid)


def _avoidable(task: _Task) -> tuple[str, ...]:
    """Nodes on which the stage was lost, if others can stand in for them."""
    lost = lost_on(attempts.read_attempts(task.folder))
    count = int(os.environ.get("SLURM_NNODES", "1"))
    constraint = task.submission["profile"]["constraint"]
    return nodes.avoidable(lost, os.environ.get("SLURM_JOB_PARTITION"), count, constraint)


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
        for word in (commands.scontrol("show", "node", name) or "").split():
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
    # While torch is imported they are to wait; the worker lets them in.
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
    about = commands.about_job(task.job)
    is_running = about.get("JobState") == "RUNNING"
    if (read_json(folder.result) or {}).get("attempts") == attempt:
        if code != 0:
            complete(folder)  # it was killed between its result and the word of it
        if about and not is_running and not _is_new_life(about):
            # Slurm calls the job a failure, and drops what waits for it: see the caretaker.
            store.add_event(folder, OTHERWISE, attempt=attempt)
        return 0
    number = -(code - 128) if 128 < code < 160 else code
    why = "cancelled in Slurm" if _is_cancelled(about) else None
    with exclusive(folder.claim):
        if code == EXIT_BUSY:
            attempts.end_busy(folder, attempt)
            return 1
        # Slurm stops a job for many reasons; without an answer it did not.
        asked = bool(about) and not is_running
        end = "preempted" if why is None else "cancelled"
        status = ends.settle(folder, attempt, number, asked_to_stop=asked, too_slow=end)
        if status.get("attempt") != attempt or status.get("state") == "done":
            return 0 if status.get("state") == "done" else 1
        decision = ends.conclude(folder, attempt, status, task.retry, why)
    print(f"{task.stage.id}: {status.get('reason')}; {decision.why}", file=sys.stderr)
    if decision.again and is_running and task.submission["profile"]["requeue"]:
        if nodes.put_back(task.job, _avoidable(task)):
            time.sleep(120)  # Slurm ends this shell
    return 1


def _is_new_life(about: dict[str, str]) -> bool:
    """True of a job that was put back into the queue, and will be started again."""
    return about.get("Restarts") != os.environ.get("SLURM_RESTART_COUNT", "0")


def _is_cancelled(about: dict[str, str]) -> bool:
    """True if somebody took the job out of the queue.

    While its steps end it is COMPLETING, and so is one that is put back; that one's number of
    restarts is a new one already.
    """
    if about.get("JobState") == "CANCELLED":
        return True
    at_limit = about.get("Reason") in ("TimeLimit", "NodeDown")
    # With PreemptMode=CANCEL the job is over, as after scancel; only this time tells.
    is_preempted = about.get("PreemptTime", "None") not in ("None", "Unknown")
    is_leaving = about.get("JobState") == "COMPLETING" and not _is_new_life(about)
    return is_leaving and not at_limit and not is_preempted


def main(arguments: list[str] | None = None) -> int:
    """`python -m harness.launch.job begin|rank|end TASKS [--code N]`, in the batch script."""
    parser = argparse.ArgumentParser(prog="harness.launch.job")
    parser.add_argument("what", choices=("begin", "rank", "end"))
    parser.add_argument("tasks")
    parser.add_argument("--code", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        if given.what == "rank":
            run_rank(given.tasks)
            return 0
        return begin(given.tasks) if given.what == "begin" else end(given.tasks, given.code)
    except (OSError, StorageError) as error:
        known = _of_storage(error)
        if known is None:
            raise
        # By this code the caretaker knows, where not even the end could be written down.
        print(known, file=sys.stderr)
        return EXIT_STORAGE


if __name__ == "__main__":
    sys.exit(main())
