"""The begin and end of a stage inside of a job, with a Slurm that says what a test wants."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import EXIT_STORAGE
from harness.launch import job, nodes, slurm
from harness.launch.settings import Slurm
from harness.ledger.attempts import read_attempts
from harness.ledger.files import read_json, read_jsonl, write_json
from harness.ledger.lease import this_host
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import build_grid
from harness.study.schema import Retry, load_study
from tests.launch.fake_slurm import FakeSlurm

DEAD = {"schema": 1, "token": "t", "pid": 1, "started": "no process", "beat": 0}
UP = "State=IDLE BootTime=2026-01-01T00:00:00\n"
SINFO = "n1|gpu*|idle|gpu:8|\nn2|gpu*|idle|gpu:8|\n"


class Job:
    """A job of one mae stage, started as often as a test likes."""

    def __init__(self, tasks: Path, folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks, self.folder, self.monkeypatch = tasks, folder, monkeypatch

    def start(self, node: str) -> int:
        names = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": node, "SLURM_JOB_NODELIST": node}
        for name, value in names.items():
            self.monkeypatch.setenv(name, value)
        return job.begin(str(self.tasks))

    def close(self, number: int, end: str, node: str) -> None:
        """As the next `begin`, or `end`, would have."""
        path = self.folder.attempt(number) / "attempt.json"
        write_json(path, {**(read_json(path) or {}), "end": end, "node": node})
        status = {**(read_json(self.folder.status) or {}), "state": "preempted"}
        write_json(self.folder.status, status)

    def kill_after_result(self) -> None:
        """As a worker leaves its first attempt that SIGKILL ends right before its last words."""
        upstream = job._read(str(self.tasks)).stage.upstream_kinds
        assert not upstream, "its result says what it was made from"
        result = {"schema": 1, "uid": "u", "attempts": 1, "upstream_uids": {}, "steps": None}
        write_json(self.folder.result, result)
        status = {**(read_json(self.folder.status) or {}), "state": "running"}
        write_json(self.folder.status, status)
        write_json(self.folder.lease, {**DEAD, "host": this_host()})

    def is_done(self) -> bool:
        """As all files tell it."""
        state = (read_json(self.folder.status) or {}).get("state")
        told = [e for e in read_jsonl(self.folder.events) if e["event"] == "done"]
        is_free = not self.folder.lease.exists()
        return (state, self.ends(), len(told), is_free) == ("done", ["done"], 1, True)

    def ends(self) -> list[str | None]:
        return [a.end for a in read_attempts(self.folder)]


@pytest.fixture
def submitted(
    site: FakeSlurm,
    tmp_path: Path,
    study_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Job]:
    tree = Tree(tmp_path / "runs")
    stages = build_grid(load_study(study_file())).stages
    stage = next(s for s in stages.values() if s.kind == "mae")
    slurm.submit(tree, "small", {stage.id: stage}, Slurm(device="cpu"), Retry())
    (tasks,) = tree.root.glob("slurm/*/tasks.0.json")
    monkeypatch.setenv("HARNESS_ROOT", str(tree.root))
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    site.write("sinfo", SINFO)
    # What scontrol says of nodes; `show hostnames` is not answered, so the node's own name counts.
    site.says(
        "scontrol", f'case "$2" in hostnames) exit 1;; *) cat {site.folder}/scontrol.txt;; esac'
    )
    site.write("scontrol", UP)
    handler = signal.getsignal(signal.SIGTERM)
    yield Job(tasks, tree.stage("mae", stage.id), monkeypatch)
    signal.signal(signal.SIGTERM, handler)


def said(site: FakeSlurm) -> list[str]:
    lines = (site.folder / "scontrol.calls").read_text().splitlines()
    return [
        line
        for line in lines
        if line.startswith(("requeue", "update"))
        and not any(word in line for word in ("JobName", "Dependency"))
    ]


def test_a_job_put_back_without_a_word_was_preempted_if_its_node_is_up(submitted: Job) -> None:
    assert submitted.start("n1") == 0
    assert submitted.start("n1") == 0
    assert submitted.ends() == ["preempted", None]


def test_a_job_put_back_since_its_node_was_lost_says_so(submitted: Job, site: FakeSlurm) -> None:
    assert submitted.start("n1") == 0
    site.write("scontrol", "State=DOWN* BootTime=2026-01-01T00:00:00\n")
    assert submitted.start("n2") == 0
    assert submitted.ends() == ["node_fail", None]
    assert read_attempts(submitted.folder)[0].host == "n1"


def test_on_the_node_that_was_lost_the_job_goes_back_once_and_then_it_runs(
    submitted: Job, site: FakeSlurm
) -> None:
    assert submitted.start("n1") == 0
    submitted.close(1, "node_fail", "n1")
    assert submitted.start("n1") == 1
    # Slurm takes excluded nodes for pending jobs only.
    assert said(site) == ["requeue 1", "update JobId=1 ExcNodeList=n1"]
    assert submitted.start("n1") == 0
    assert submitted.ends() == ["node_fail", None]
    assert (
        len([e for e in read_jsonl(submitted.folder.events) if e["event"] == "sent elsewhere"]) == 1
    )


def test_the_only_node_is_not_avoided(submitted: Job, site: FakeSlurm) -> None:
    site.write("sinfo", SINFO.splitlines()[0] + "\n")
    assert submitted.start("n1") == 0
    submitted.close(1, "node_fail", "n1")
    assert submitted.start("n1") == 0
    assert said(site) == []


def test_without_requeue_the_next_submission_avoids_the_node(
    submitted: Job, site: FakeSlurm, tmp_path: Path
) -> None:
    assert submitted.start("n1") == 0
    submitted.close(1, "node_fail", "n1")
    tree = Tree(tmp_path / "runs")
    stage = job._read(str(submitted.tasks)).stage
    before = set(tree.root.glob("slurm/*/jobs/*.sh"))
    write_json(submitted.folder.status, {**(read_json(submitted.folder.status) or {}), "job": None})
    slurm.submit(tree, "small", {stage.id: stage}, Slurm(device="cpu", partition="gpu"), Retry())
    scripts = [p.read_text() for p in set(tree.root.glob("slurm/*/jobs/*.sh")) - before]
    assert any("#SBATCH --exclude=n1" in text for text in scripts)


def test_a_worker_killed_between_its_result_and_its_last_words_is_done(
    submitted: Job, site: FakeSlurm
) -> None:
    site.write("scontrol", "JobState=RUNNING Restarts=0\n")
    assert submitted.start("n1") == 0
    submitted.kill_after_result()
    submitted.monkeypatch.setenv("HARNESS_ATTEMPT", "1")
    assert job.end(str(submitted.tasks), 137) == 0  # or Slurm would drop what waits for it
    assert submitted.is_done()
    assert not any(line.startswith("requeue") for line in said(site))


def test_a_job_put_back_after_its_result_says_that_it_is_done(submitted: Job) -> None:
    """Slurm killed the batch shell, too."""
    assert submitted.start("n1") == 0
    submitted.kill_after_result()
    assert submitted.start("n1") == job.NOTHING_TO_DO
    assert submitted.is_done()


def test_a_job_that_slurm_restarts_without_progress_is_failed_after_its_patience(
    submitted: Job,
) -> None:
    """Nobody is left to start it again: neither this job nor the next submission."""
    patience = Retry().patience
    for _ in range(patience):
        assert submitted.start("n1") == 0
    assert submitted.start("n1") == 1
    assert submitted.ends() == ["preempted"] * patience
    status = read_json(submitted.folder.status) or {}
    assert status["state"] == "failed"
    assert f"no progress in {patience} attempts" in status["message"]


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "storage"), (errno.EINVAL, "code")])
def test_a_disk_that_is_full_before_the_ranks_start_is_no_fault_of_the_stage(
    submitted: Job, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, "of the test")

    monkeypatch.setattr(job, "_is_sent_elsewhere", full)
    for name, value in {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    if reason == "storage":
        assert job.main(["begin", str(submitted.tasks)]) == EXIT_STORAGE
    else:
        with pytest.raises(OSError, match="of the test"):
            job.main(["begin", str(submitted.tasks)])
    status = read_json(submitted.folder.status) or {}
    assert (status["state"], status["reason"]) == ("failed", reason)


@pytest.mark.parametrize(
    ("about", "is_cancelled"),
    [
        ({"JobState": "CANCELLED"}, True),
        ({"JobState": "COMPLETING", "Restarts": "0", "Reason": "None"}, True),
        ({"JobState": "COMPLETING", "Restarts": "1", "Reason": "None"}, False),
        ({"JobState": "COMPLETING", "Restarts": "0", "Reason": "TimeLimit"}, False),
        ({"JobState": "COMPLETING", "Restarts": "0", "PreemptTime": "2026-01-01T00:00:00"}, False),
        ({"JobState": "COMPLETING", "Restarts": "0", "PreemptTime": "None"}, True),
        ({"JobState": "RUNNING", "Restarts": "0"}, False),
        ({}, False),
    ],
)
def test_who_took_a_job_out_of_the_queue(about: dict[str, Any], is_cancelled: bool) -> None:
    assert job._is_cancelled(about) == is_cancelled


def test_a_requeue_does_not_end_who_asked_for_it(site: FakeSlurm) -> None:
    """Slurm sends TERM to all of the job between the two commands."""
    handler = signal.getsignal(signal.SIGTERM)
    site.says("scontrol", 'if [ "$1" = requeue ]; then kill -TERM $PPID; fi')
    try:
        assert nodes.put_back("1", ["n1"])
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert said(site) == ["requeue 1", "update JobId=1 ExcNodeList=n1"]
