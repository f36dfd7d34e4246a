"""The caretaker of a submission, with a Slurm of scripts: for moments a real one seldom gives."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from harness.cli import logs
from harness.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from harness.launch import caretaker, provenance, queue
from harness.launch.job import OTHERWISE
from harness.ledger import attempts, store
from harness.ledger.attempts import read_attempts
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import Lease
from harness.ledger.tree import Tree
from harness.study.cells import Grid
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.submitting import (
    finish,
    in_queue_but,
    scripts,
    states,
    submissions,
    submit,
    takes_only,
)


def test_it_is_queued_before_all_others_and_knows_every_stage(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """sbatch kills nobody here, but takes the first job only: the moment after that one."""
    takes_only(site, 1)
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(tree, grid)
    (token,) = submissions(tree)
    first = (tree.root / "slurm" / token / "jobs" / "1_submission.sh").read_text()
    assert "--begin=now+900" in first and f"--comment=caretaker.{token}" in first
    assert all(tree.stage(s.kind, s.id).stage.exists() for s in grid.stages.values())
    assert site.calls("scancel") == 1


def test_a_job_whose_number_was_not_noted_is_one_to_wait_for(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """A submission was killed after sbatch had taken its first array."""
    submit(tree, grid)
    (token,) = submissions(tree)
    tasks = read_json(tree.root / "slurm" / token / "tasks.0.json") or {}
    first = [row["stage"] for row in tasks["tasks"]]
    for stage in grid.stages.values():
        path = tree.stage(stage.kind, stage.id).status
        write_json(path, {**(read_json(path) or {}), "job": None})
    is_one = len(first) == 1
    jobs = {s: "77" if is_one else f"77_{place}" for place, s in enumerate(first)}
    site.holds(*((job, queue.comment_of(token, 0)) for job in jobs.values()))
    again = submit(tree, grid)
    assert set(again.jobs) == set(grid.stages) - set(first)
    for stage_id, job in jobs.items():
        stage = grid.stages[stage_id]
        assert (read_json(tree.stage(stage.kind, stage_id).status) or {})["job"] == job
    (new,) = submissions(tree).keys() - {token}
    waits = [text for text in scripts(tree, new) if "--dependency" in text]
    assert any(":77" in text for text in waits)


def test_what_runs_elsewhere_is_not_one_to_wait_for(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """A job behind it would be dropped at its start, and submitted again, and again."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    about = {"schema": 1, "state": "submitted", "attempt": 1, "host": "elsewhere", "pid": 1}
    write_json(store.write_stage(tree, stage).status, about)
    assert states(tree, grid)[stage.id] == "submitted"
    done = submit(tree, grid)
    behind = [s.id for s in grid.stages.values() if stage.id in s.config.upstream.values()]
    assert done.jobs and behind and not set(behind) & set(done.jobs)


def test_of_a_caretaker_that_gets_nothing_in_a_next_one_stays(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    takes_only(site, 1)
    done = submit(tree, grid, refusals=0)
    assert (done.jobs, done.caretaker, done.left) == ({}, "1", len(grid.stages))
    assert site.calls("scancel") == 0
    (about,) = submissions(tree).values()
    assert about["refusals"] == 1
    assert set(states(tree, grid).values()) <= {"planned", "waiting"}
    takes_only(site, 1)
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(tree, grid, refusals=100)
    assert site.calls("scancel") == 1


def test_one_that_has_given_up_waiting_is_replaced(site: FakeSlurm, tree: Tree, grid: Grid) -> None:
    site.says("scontrol", f'case "$1" in update) exit 1;; *) cat {site.folder}/scontrol.txt;; esac')
    done = submit(tree, grid)
    assert done.caretaker == str(site.calls("sbatch"))
    (token,) = submissions(tree)
    last = [text for text in scripts(tree, token) if "--dependency=afterany:2" in text]
    assert any(f"caretaker.{token}" in text for text in last)


def test_it_starts_early_waits_for_what_is_under_way_and_never_twice(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    folder = tree.root / "slurm" / token
    site.holds(*((job, "x") for job in jobs.values()))
    before = site.calls("sbatch")
    assert caretaker.tend(folder).jobs == {}
    assert site.calls("sbatch") == before + 1
    texts = [t for t in scripts(tree, token) if f"caretaker.{token}" in t]
    assert sum("--dependency=afterany:" in text for text in texts) == 1
    site.holds(*((job, "x") for job in jobs.values()), ("99", f"caretaker.{token}"))
    assert caretaker.tend(folder).jobs == {}
    assert site.calls("sbatch") == before + 1


def test_without_room_for_another_it_goes_back_into_the_queue(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    folder = tree.root / "slurm" / token
    site.holds(*((job, "x") for job in jobs.values()))
    takes_only(site, 0)
    assert caretaker.main([str(folder)]) == EXIT_REQUEUE
    script = next(t for t in scripts(tree, token) if f"caretaker.{token}" in t)
    assert f"[ $code = {EXIT_REQUEUE} ] && for i in" in script
    monkeypatch.setenv("SLURM_RESTART_COUNT", "500")
    assert caretaker.main([str(folder)]) == EXIT_FAILED


@pytest.mark.parametrize(
    ("reason", "ends", "is_back"),
    [("None", ["cancelled"], False), ("DependencyNeverSatisfied", ["dropped", None], True)],
)
def test_a_job_that_a_user_cancelled_stays_so_while_its_upstream_is_under_way(
    site: FakeSlurm, tree: Tree, grid: Grid, reason: str, ends: list[str | None], is_back: bool
) -> None:
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    late = next(s for s in grid.stages.values() if s.config.upstream)
    site.holds(*((job, "x") for s, job in jobs.items() if s != late.id))
    about = f"JobId={jobs[late.id]} JobState=CANCELLED Reason={reason}"
    site.says(
        "scontrol", f'case "$2" in job) echo "{about}";; *) cat {site.folder}/scontrol.txt;; esac'
    )
    done = caretaker.tend(tree.root / "slurm" / token)
    assert (late.id in done.jobs) is is_back
    folder = tree.stage(late.kind, late.id)
    records = [read_json(folder.attempt(n) / "attempt.json") for n in folder.attempt_numbers()]
    assert [record and record["end"] for record in records] == ends


def test_it_takes_the_lock_of_a_submission_that_was_killed_on_another_host(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node, of which a compute node sees no process: only its heartbeat tells."""
    submit(tree, grid)
    (token,) = submissions(tree)
    for stage in grid.stages.values():
        path = tree.stage(stage.kind, stage.id).status
        write_json(path, {**(read_json(path) or {}), "job": None})
    monkeypatch.setenv("HARNESS_HOST", "login-2")
    Lease.acquire(tree.root / "slurm" / "submitting")
    monkeypatch.delenv("HARNESS_HOST")
    monkeypatch.setattr(Lease.acquire.__func__, "__defaults__", (0.3,))
    done = caretaker.tend(tree.root / "slurm" / token)
    assert set(done.jobs) == set(grid.stages)


@pytest.mark.parametrize(
    ("about", "has_log", "state", "said"),
    [
        ("JobState=FAILED ExitCode=127:0", True, "failed", "as FAILED, exit code 127:0, before"),
        ("", True, "failed", "its job ended, before the stage began"),  # Slurm has forgotten it
        ("", False, "cancelled", "its job was cancelled in Slurm"),
        ("JobState=FAILED ExitCode=74:0", False, "failed", "took no files; free space"),
    ],
)
def test_a_job_whose_own_first_command_failed_is_not_a_lost_node(
    site: FakeSlurm,
    tree: Tree,
    grid: Grid,
    about: str,
    has_log: bool,
    state: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nodes do not see the Python of the environment: `begin` never ran."""
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    first = next(s for s in grid.stages.values() if not s.config.upstream)
    site.holds(*((job, "x") for s, job in jobs.items() if s != first.id))
    site.says(
        "scontrol", f'case "$2" in job) echo "{about}";; *) cat {site.folder}/scontrol.txt;; esac'
    )
    log = tree.root / "slurm" / token / "jobs" / f"{jobs[first.id]}_0_log.err"
    if has_log:
        log.write_text("python: No such file or directory\n")
    assert first.id not in caretaker.tend(tree.root / "slurm" / token).jobs
    folder = tree.stage(first.kind, first.id)
    status = read_json(folder.status) or {}
    assert status["state"] == state and said in status["message"]
    (attempt,) = read_attempts(folder)
    end = "storage" if "74:0" in about else "code"
    assert attempt.end == (end if state == "failed" else "cancelled")
    if has_log:
        assert str(log) in status["message"]
        logs._Printer().print_new(first.kind, folder)
        assert f"job {jobs[first.id]}: {log}" in capsys.readouterr().out


def test_caretakers_are_not_held_with_the_jobs(site: FakeSlurm, tree: Tree, grid: Grid) -> None:
    submit(tree, grid, sbatch={"hold": True}, requeue=False)
    (token,) = submissions(tree)
    texts = scripts(tree, token)
    (own,) = [text for text in texts if f"caretaker.{token}" in text]
    assert "--hold" not in own and "--no-requeue" not in own and "--requeue" in own
    assert all("--hold" in text and "--no-requeue" in text for text in texts if text != own)


@pytest.mark.parametrize(
    "case",
    [
        "ended well",
        "of an earlier submission",
        "ended badly before",
        "ended badly, but the job began",
        "ended badly",
        "run by another submission",
    ],
)
def test_a_job_dropped_behind_one_that_ended_badly_is_submitted_again(
    case: str, site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """Though what it waited for is done by now. Slurm has forgotten both; behind one that ended
    well it can only have been cancelled."""
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    late = next(s for s in grid.stages.values() if s.kind == "wsp" and s.config.upstream)
    (upstream,) = late.config.upstream.values()
    finish(tree, grid, upstream, started=time.time() + 1)
    folder = tree.stage("mae", upstream)
    own = tree.stage("wsp", late.id)
    if case.startswith("ended badly"):
        store.add_event(folder, OTHERWISE, attempt=1)
    if case == "ended badly before":
        status = read_json(own.status) or {}
        write_json(own.status, {**status, "submitted": status["submitted"] + 3600})
    elif case == "ended badly, but the job began":
        log = tree.root / "slurm" / token / "jobs" / f"{jobs[late.id]}_0_log.err"
        log.write_text("module: not found\n")
    elif case == "run by another submission":
        store.add_event(folder, "submitted", attempt=1, token="small.other")
    elif case == "of an earlier submission":
        write_json(folder.status, {**(read_json(folder.status) or {}), "token": "small.other"})
    in_queue_but(site, jobs, upstream, late.id)
    done = caretaker.tend(tree.root / "slurm" / token)
    status = read_json(tree.stage("wsp", late.id).status) or {}
    if case == "ended badly, but the job began":
        assert late.id not in done.jobs and status["reason"] == "code"
    elif case not in ("ended badly", "run by another submission"):
        assert late.id not in done.jobs and status["state"] == "cancelled"
    else:
        assert late.id in done.jobs and status["state"] == "submitted"


def test_a_failure_whose_job_was_killed_before_it_could_decide_is_tried_again(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    ends = {"oom": True, "code": False}
    stages = [s for s in grid.stages.values() if s.kind == "mae"][: len(ends)]
    for stage, end in zip(stages, ends, strict=True):
        folder = tree.stage(stage.kind, stage.id)
        attempts.close(folder, 1, "failed", end, "as the worker said")
    # Of one that lives it is the job's own to decide.
    site.holds(*((job, "x") for job in jobs.values()))
    assert caretaker.tend(tree.root / "slurm" / token).jobs == {}
    in_queue_but(site, jobs, *(s.id for s in stages))
    done = caretaker.tend(tree.root / "slurm" / token)
    for stage, is_back in zip(stages, ends.values(), strict=True):
        assert (stage.id in done.jobs) is is_back


def test_what_it_submits_again_runs_the_same_code_by_its_name(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs from a copy, which has no commit."""
    commit = provenance.GitState(sha="c0ffee", diff=b"a change")
    monkeypatch.setattr(provenance, "git_state", lambda: commit)
    submit(tree, grid)
    (token,) = submissions(tree)
    first = submissions(tree)[token]
    monkeypatch.setattr(provenance, "git_state", lambda: pytest.fail("of what?"))
    for stage in grid.stages.values():  # it was killed before it had any numbers
        path = tree.stage(stage.kind, stage.id).status
        write_json(path, {**(read_json(path) or {}), "job": None})
    assert set(caretaker.tend(tree.root / "slurm" / token).jobs) == set(grid.stages)
    (again,) = [about for name, about in submissions(tree).items() if name != token]
    assert again["git"] == first["git"] == {"sha": "c0ffee", "name": commit.name}
    assert again["code"] == first["code"]


def test_it_asks_to_be_put_back_until_slurm_hears_it(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    submit(tree, grid)
    (token,) = submissions(tree)
    script = next(t for t in scripts(tree, token) if f"caretaker.{token}" in t)
    lines = script.splitlines()
    call = next(n for n, line in enumerate(lines) if "harness.launch.caretaker" in line)
    body = "\n".join([f"code={EXIT_REQUEUE}", *lines[call + 1 :]])
    site.says("scontrol", f"[ $(wc -l <{site.folder}/scontrol.calls) -ge 3 ]")
    (site.folder / "scontrol.calls").unlink()
    site.says("sleep", "exit 0")
    env = {**os.environ, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", body], env=env, check=False)
    assert (site.folder / "scontrol.calls").read_text().splitlines() == ["requeue 7"] * 3
    assert site.calls("sleep") == 2 and done.returncode == EXIT_REQUEUE


def test_a_disk_that_does_not_answer_is_not_its_end(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(tree, grid)
    (token,) = submissions(tree)

    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(caretaker, "tend", broken)
    assert caretaker.main([str(tree.root / "slurm" / token)]) == EXIT_REQUEUE
    monkeypatch.setenv("SLURM_RESTART_COUNT", "500")
    assert caretaker.main([str(tree.root / "slurm" / token)]) == EXIT_FAILED


def test_what_slurm_does_not_say_it_has_not_forgotten(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """It is restarted between two questions; "cancelled" would be for ever."""
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    first = next(s for s in grid.stages.values() if not s.config.upstream)
    in_queue_but(site, jobs, first.id)
    answers = f"[ $(wc -l <{site.folder}/squeue.calls) -le 1 ] && cat {site.folder}/squeue.txt"
    (site.folder / "squeue.calls").unlink(missing_ok=True)
    site.says("squeue", answers)
    folder = tree.root / "slurm" / token
    assert caretaker.main([str(folder)]) == EXIT_REQUEUE
    assert (read_json(tree.stage(first.kind, first.id).status) or {})["state"] == "submitted"
    site.says("squeue", f"cat {site.folder}/squeue.txt")
    assert caretaker.main([str(folder)]) == 0
    assert (read_json(tree.stage(first.kind, first.id).status) or {})["state"] == "cancelled"


def test_nothing_is_queued_behind_a_job_that_has_left_the_queue(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """Its node is cut off from Slurm, and its worker lives on: what waits for the job is dropped,
    and would be again."""
    jobs = submit(tree, grid).jobs
    (token,) = submissions(tree)
    late = next(s for s in grid.stages.values() if s.kind == "wsp" and s.config.upstream)
    (upstream,) = late.config.upstream.values()
    folder = tree.stage("mae", upstream)
    lease = Lease.acquire(folder.lease)
    write_json(folder.status, {**(read_json(folder.status) or {}), "state": "running"})
    in_queue_but(site, jobs, upstream, late.id)
    found = queue.read_states(tree, grid.stages, max_age_s=0.0)
    assert (found[upstream].state, found[late.id].state) == ("running", "lost")
    assert late.id not in caretaker.tend(tree.root / "slurm" / token).jobs
    lease.release()
