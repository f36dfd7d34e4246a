"""The begin and end of a stage inside of a job, with a Slurm that says what a test wants."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import EXIT_STORAGE, HarnessError
from harness.launch import commands, job, nodes, slurm
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


def asked(site: FakeSlurm) -> list[str]:
    return (site.folder / "scontrol.calls").read_text().splitlines()


def said(site: FakeSlurm) -> list[str]:
    return [
        line
        for line in asked(site)
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


# --- what the ranks are told ---------------------------------------------------------------


def test_a_job_has_the_name_of_its_stage_from_the_moment_it_has_it(
    submitted: Job, site: FakeSlurm
) -> None:
    named = f"update JobId=1 JobName={submitted.folder.path.name}"
    assert named not in asked(site)
    assert submitted.start("n1") == 0
    assert asked(site).count(named) == 1
    submitted.kill_after_result()
    assert submitted.start("n1") == job.NOTHING_TO_DO
    assert asked(site).count(named) == 1


def test_the_ranks_are_told_their_stage_attempt_and_meeting_point(
    submitted: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted.start("n1") == 0
    assert submitted.start("n1") == 0  # Slurm started it again
    lines = capsys.readouterr().out.splitlines()
    told = [dict(word.split("=", 1) for word in shlex.split(line)[1:]) for line in lines]
    assert [t["HARNESS_ATTEMPT"] for t in told] == ["1", "2"]
    folder = submitted.folder.path
    assert {(t["HARNESS_STAGE"], t["HARNESS_RUN_DIR"]) for t in told} == {
        (folder.name, str(folder))
    }
    assert {t["MASTER_ADDR"] for t in told} == {"127.0.0.1"}
    assert all(int(t["MASTER_PORT"]) in job._PORTS for t in told)


def listener(port: int) -> socket.socket:
    """As rank 0 listens: torch's store takes all addresses, IPv6 too where there is any."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def test_a_port_at_which_somebody_listens_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = job._port()
    with listener(first):
        second = job._port()
    assert first != second and {first, second} <= set(job._PORTS)


def test_jobs_that_ask_at_once_get_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them listens yet when the next one asks."""
    ports: list[int] = []
    for number in range(4711, 4741):
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        ports.append(job._port())
    assert len(set(ports)) == len(ports) == 30


def test_the_last_free_port_is_found_and_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    free: set[int] = set()

    class Probe(socket.socket):
        def bind(self, address: Any) -> None:
            if address[1] not in free:
                raise OSError(98, "Address already in use")

    monkeypatch.setattr(job, "socket", SimpleNamespace(socket=Probe))
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    with pytest.raises(HarnessError, match="no free port on this host"):
        job._port()
    free.add(job._PORTS[13])  # the job begins to look at number 14
    assert job._port() == job._PORTS[13]


@pytest.fixture
def on_two_nodes(site: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Surroundings of a job of two nodes; no name but `resolved` is known to a resolver."""

    def getaddrinfo(name: str, port: None) -> list[Any]:
        if name != "resolved":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.9", 0))]

    monkeypatch.setattr(job.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("SLURM_NNODES", "2")
    node = "NodeName=gpu-1 Arch=x86_64\n   NodeAddr=10.1.2.3 NodeHostName=n1 Version=23.11.4\n"
    site.says("scontrol", f'[ "$*" = "show node gpu-1" ] && printf "{node}"')
    return site


@pytest.mark.parametrize("count", ["1", None])
def test_ranks_of_one_node_meet_there_whatever_it_is_called(
    count: str | None, on_two_nodes: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_NNODES")
    if count is not None:
        monkeypatch.setenv("SLURM_NNODES", count)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-1")
    assert job._address() == "127.0.0.1"
    assert on_two_nodes.calls("scontrol") == 0


@pytest.mark.parametrize(
    ("node", "address", "calls"),
    [
        ("resolved", "resolved", 0),  # as a name: another network may know it by another number
        ("gpu-1", "10.1.2.3", 1),  # only Slurm knows it
        ("gpu-2", "gpu-2", 1),  # not even Slurm: the ranks will say what they could not find
    ],
)
def test_ranks_of_several_nodes_meet_at_the_first_by_a_name_or_address_that_others_know(
    node: str,
    address: str,
    calls: int,
    on_two_nodes: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", node)
    assert job._address() == address
    assert on_two_nodes.calls("scontrol") == calls


def test_a_job_of_an_older_submission_that_reads_badly_fails_nobody_elses_attempt(
    submitted: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = {**(read_json(submitted.folder.status) or {}), "token": "small.newer"}
    write_json(submitted.folder.status, status)

    def broken(*about: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(job, "_take", broken)
    with pytest.raises(OSError, match="Input/output"):
        submitted.start("n1")
    assert read_json(submitted.folder.status) == status


def test_a_rank_whose_log_finds_no_room_says_so_by_its_code(
    submitted: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted.start("n1") == 0
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "HARNESS_ATTEMPT": "1"}.items():
        monkeypatch.setenv(name, value)
    whole = os.open

    def full(path: Any, *about: Any) -> int:
        if str(path).endswith("stdout.log"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))
        return whole(path, *about)

    monkeypatch.setattr(job.os, "open", full)
    try:
        assert job.main(["rank", str(submitted.tasks)]) == EXIT_STORAGE
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR2})
    assert "Disk quota exceeded; free space" in capsys.readouterr().err


def test_a_result_of_a_job_that_slurm_calls_a_failure_is_noted(
    submitted: Job, site: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submitted.start("n1") == 0
    submitted.kill_after_result()
    monkeypatch.setenv("HARNESS_ATTEMPT", "1")
    for state, noted in (
        ("RUNNING Restarts=0", 0),
        ("COMPLETING Restarts=1", 0),  # it is put back: its next life ends well
        ("TIMEOUT Restarts=0", 1),
    ):
        site.write("scontrol", f"JobId=1 JobState={state}\n")
        assert job.end(str(submitted.tasks), 137) == 0
        events = [e["event"] for e in read_jsonl(submitted.folder.events)]
        assert events.count(job.OTHERWISE) == noted
    assert submitted.is_done()


@pytest.mark.parametrize(
    ("about", "end", "state"),
    [
        ("", "killed", "preempted"),  # Slurm does not answer: its own end, for all we know
        ("JobState=RUNNING", "killed", "preempted"),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", "preempted", "preempted"),
        ("JobState=COMPLETING Reason=NodeDown Restarts=0", "preempted", "preempted"),
        (
            "JobState=COMPLETING Restarts=0 PreemptTime=2026-01-01T00:00:00",
            "preempted",
            "preempted",
        ),
        ("JobState=CANCELLED Restarts=0", "cancelled", "cancelled"),
    ],
)
def test_ranks_that_were_killed_before_they_could_save_are_tried_again(
    about: str, end: str, state: str, submitted: Job, site: FakeSlurm, monkeypatch: Any
) -> None:
    assert submitted.start("n1") == 0
    path = submitted.folder.attempt(1) / "attempt.json"
    write_json(path, {**(read_json(path) or {}), "started": 1.0})
    monkeypatch.setenv("HARNESS_ATTEMPT", "1")
    monkeypatch.setattr(nodes, "put_back", lambda *_: False)
    site.says("scontrol", f'echo "{about}"' if about else "exit 1")
    assert job.end(str(submitted.tasks), 137) == 1
    assert submitted.ends() == [end]
    assert (read_json(submitted.folder.status) or {})["state"] == state


def test_whose_job_it_is_stays_known_where_slurm_does_not_say_so(
    submitted: Job, site: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every other cluster that shares the run root would take it for its own."""
    before = read_json(submitted.folder.status) or {}
    assert before["site"] == "lab"
    monkeypatch.setattr(commands, "_known_config", None)
    site.says("scontrol", "exit 1")
    assert submitted.start("n1") == 0
    after = read_json(submitted.folder.status) or {}
    assert (after["site"], after["user"], after["job"]) == ("lab", before["user"], "1")
