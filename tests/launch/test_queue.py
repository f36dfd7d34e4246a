"""What is concluded from a queue, with a Slurm of scripts that counts how often it is asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.cli import selection, status, steer
from harness.errors import UserError
from harness.launch import commands, queue, slurm
from harness.launch.driver import Driver
from harness.launch.machine import this_machine
from harness.launch.pool import Pool
from harness.launch.settings import Slurm
from harness.ledger import lease, store
from harness.ledger.claim import ask_to_stop, clear_stop, stop_asked
from harness.ledger.files import read_json, write_json
from harness.ledger.states import graph_of
from harness.ledger.tree import Tree
from harness.study.cells import Grid, build_grid
from harness.study.cost import Speeds
from harness.study.schema import Retry, load_study
from tests.conftest import SMALL
from tests.launch.fake_slurm import FakeSlurm

PROFILE = Slurm(device="cpu")


def submit(tree: Tree, grid: Grid) -> slurm.Submitted:
    return slurm.submit(tree, "small", grid.stages, PROFILE, Retry())


def states(tree: Tree, grid: Grid) -> dict[str, str]:
    return {s: v.state for s, v in queue.read_states(tree, grid.stages).items()}


def change(tree: Tree, grid: Grid, **about: Any) -> None:
    for stage in grid.stages.values():
        folder = tree.stage(stage.kind, stage.id)
        write_json(folder.status, {**(read_json(folder.status) or {}), **about})


def test_a_command_asks_once_and_a_watcher_once_a_look(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """The three looks of one `--submit`: for the plan, under the lock, for what is printed."""
    jobs = submit(tree, grid).jobs
    assert len(jobs) == len(grid.stages)
    site.holds(*((j, "x") for j in jobs.values()))
    before = site.calls("squeue")
    queue.read_states(tree, grid.stages, max_age_s=600.0)
    assert submit(tree, grid).jobs == {}
    found = queue.read_states(tree, grid.stages, max_age_s=600.0)
    assert {v.state for v in found.values()} == {"submitted"}
    assert site.calls("squeue") == before + 1
    queue.read_states(tree, grid.stages, max_age_s=0.0)
    assert site.calls("squeue") == before + 2


def test_a_users_own_settings_for_slurm_hide_no_job(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = submit(tree, grid).jobs
    site.holds(*((j, "x") for j in jobs.values()))
    # As squeue itself would: with such a filter of a .bashrc it shows nothing that waits.
    site.says("squeue", f'test -z "$SQUEUE_STATES" && cat {site.folder}/squeue.txt; exit 0')
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert set(states(tree, grid).values()) == {"submitted"}
    monkeypatch.setenv("SLURM_JWT", "who we are")
    assert "SQUEUE_STATES" not in commands.scrubbed() and "SLURM_JWT" in commands.scrubbed()
    asked = (site.folder / "squeue.calls").read_text().split()
    assert "--all" in asked  # or partitions that the site hides would be left out


def test_a_comment_of_any_bytes_is_a_comment(site: FakeSlurm, tree: Tree, grid: Grid) -> None:
    jobs = submit(tree, grid).jobs
    site.holds(*((j, "x") for j in jobs.values()))
    foreign = b"4711\x1fRUNNING\x1fna\xefve \xff\x1fNone\n"
    with open(site.folder / "squeue.txt", "ab") as file:
        file.write(foreign)
    assert set(states(tree, grid).values()) == {"submitted"}


def test_a_user_without_a_name_can_cancel(
    tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no entry in its passwd file."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(commands.pwd, "getpwuid", unknown)
    store.register(tree, grid, [])
    assert steer.cancel(["init=mae"], yes=True, root=tree.root) == 0
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    note = stop_asked(tree.stage(stage.kind, stage.id))
    assert note is not None and note.startswith(f"cancelled by {os.getuid()} on ")


def test_a_selection_in_several_studies_asks_once(
    site: FakeSlurm, tree: Tree, study_file: Callable[..., Path]
) -> None:
    for name in ("one", "two"):
        text = SMALL.replace("name: small", f"name: {name}")
        grid = build_grid(load_study(study_file(text, f"{name}.yaml")))
        store.register(tree, grid, [])
        submit(tree, grid)
    before = site.calls("squeue")
    assert len(selection.choices(tree, None, ["init=mae"])) == 2
    assert site.calls("squeue") <= before + 1


def test_jobs_submitted_since_the_queue_was_asked_are_not_taken_for_lost(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    submit(tree, grid)
    states(tree, grid)  # an empty queue: all are over
    change(tree, grid, job="77", state="submitted")
    site.holds(("77", "x"))
    found = queue.read_states(tree, grid.stages, max_age_s=600.0)
    assert {v.state for v in found.values()} == {"submitted"}


def test_jobs_of_others_are_left_to_them(site: FakeSlurm, tree: Tree, grid: Grid) -> None:
    submit(tree, grid)
    assert set(states(tree, grid).values()) == {"lost"}
    for about in ({"user": "somebody"}, {"site": "elsewhere"}):
        own = commands.identity()
        change(tree, grid, **about)
        assert set(states(tree, grid).values()) == {"submitted"}
        assert submit(tree, grid).jobs == {}
        change(tree, grid, **own)


def test_a_running_stage_is_not_lost_while_its_lease_beats(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(queue, "BEAT_S", 0.1)
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(tree, stage)
    write_json(folder.status, {"state": "running", "attempt": 1, "job": "5", "cluster": "slurm"})
    monkeypatch.setenv("HARNESS_HOST", "node-7")
    held = lease.Lease.acquire(folder.lease)
    held.start_beating()
    monkeypatch.delenv("HARNESS_HOST")
    try:
        assert states(tree, grid)[stage.id] == "running"
        held._stop.set()
        thread = held._thread
        assert isinstance(thread, threading.Thread)
        thread.join()
        assert states(tree, grid)[stage.id] == "lost"
    finally:
        folder.lease.unlink()


def test_a_claim_without_a_job_counts_as_long_as_somebody_submits(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """A submission was killed after its second array of several."""
    jobs = submit(tree, grid).jobs
    (token,) = {(read_json(p) or {})["token"] for p in tree.root.glob("stages/*/*/status.json")}
    change(tree, grid, job=None)
    tasks = sorted((tree.root / "slurm" / token).glob("tasks.*.json"))
    first = {row["stage"] for row in (read_json(tasks[0]) or {})["tasks"]}
    assert len(first) > 1 and first < set(jobs)
    site.holds(*((f"1_{task}", f"{token}.0") for task in range(len(first))))
    with lease.exclusive(tree.root / "slurm" / "submitting"):
        assert set(states(tree, grid).values()) == {"submitted"}
    found = states(tree, grid)
    assert {s for s, state in found.items() if state == "submitted"} == first
    assert set(submit(tree, grid).jobs) == set(jobs) - first


def on_another_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock whose owner, elsewhere, was killed."""
    monkeypatch.setenv("HARNESS_HOST", "login-2")
    path.parent.mkdir(parents=True, exist_ok=True)
    lease.Lease.acquire(path)
    monkeypatch.delenv("HARNESS_HOST")


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_submission_that_died_on_another_host_counts_no_longer_than_clocks_may_differ(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(tree, grid)
    change(tree, grid, job=None)
    lock = tree.root / "slurm" / "submitting"
    on_another_host(lock, monkeypatch)
    assert set(states(tree, grid).values()) == {"submitted"}
    age(lock, lease.MOST_SKEW_S + 60)
    assert set(states(tree, grid).values()) == {"lost"}


def test_without_an_answer_of_the_queue_nothing_is_submitted_a_second_time(
    site: FakeSlurm, tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs put themselves back and wait, and then squeue fails."""
    submit(tree, grid)
    change(tree, grid, state="preempted")
    site.says(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    before = site.calls("sbatch")
    assert set(states(tree, grid).values()) == {"submitted"}
    assert submit(tree, grid).jobs == {} and site.calls("sbatch") == before
    store.register(tree, grid, [])
    assert status.status(study=None, root=tree.root) == 0
    assert "squeue does not answer here" in capsys.readouterr().out


def test_cancel_and_resume_give_up_a_job_that_nobody_can_ask_about(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """A run root that was moved off its cluster; a job that should start after all does nothing."""
    submit(tree, grid)
    change(tree, grid, state="preempted", pid=1, pid_started="0")
    site.says("squeue", "exit 1")
    stage = next(s for s in grid.stages.values() if not s.config.upstream)
    folder = tree.stage(stage.kind, stage.id)
    assert states(tree, grid)[stage.id] == "submitted"
    ask_to_stop(folder, "cancelled by me")
    assert states(tree, grid)[stage.id] == "cancelled"
    clear_stop(folder)
    assert states(tree, grid)[stage.id] == "preempted"
    assert stage.id in submit(tree, grid).jobs


def test_a_look_that_may_not_wait_takes_a_heartbeat_for_alive_until_it_was_seen_still(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BEAT_S", 0.2)
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(tree, stage)
    write_json(folder.status, {"state": "running", "attempt": 1, "job": "5", "cluster": "slurm"})
    on_another_host(folder.lease, monkeypatch)
    graph = graph_of(grid.stages)
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr(queue, "time", clock)
    assert queue.read_graph(tree, graph, may_wait=False)[stage.id].state == "running"
    time.sleep(0.5)
    assert queue.read_graph(tree, graph, may_wait=False)[stage.id].state == "lost"
    assert slept == []


def test_a_job_of_another_cluster_is_not_one_to_wait_for(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """Its number means somebody else's job here."""
    submit(tree, grid)
    mae = next(s for s in grid.stages.values() if s.kind == "mae")
    path = tree.stage(mae.kind, mae.id).status
    write_json(path, {**(read_json(path) or {}), "site": "elsewhere", "job": "4711"})
    behind = {s.id for s in grid.stages.values() if mae.id in s.config.upstream.values()}
    done = submit(tree, grid)  # the queue is empty: all others are over
    assert behind and done.jobs and not behind & set(done.jobs)
    assert not any("4711" in p.read_text() for p in tree.root.glob("slurm/*/jobs/*.sh"))


def driver(tree: Tree, grid: Grid) -> Driver:
    return Driver(grid, tree, this_machine("cpu", 1), Speeds())


@pytest.mark.parametrize("about", [{"site": "elsewhere"}, {"user": "somebody"}])
def test_what_a_job_of_another_queue_put_back_is_not_taken_up(
    about: dict[str, str], site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """Preempted, it waits there; jobs behind it would be dropped, and nobody submit them again."""
    submit(tree, grid)
    change(tree, grid, state="preempted", job="77", message="asked to stop", **about)
    asked = site.calls("squeue")
    assert set(states(tree, grid).values()) == {"submitted"}
    found = queue.read_states(tree, grid.stages).values()
    assert {v.message for v in found} == {None}  # that is no reason to wait
    assert submit(tree, grid).jobs == {} and site.calls("squeue") == asked
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = tree.stage(stage.kind, stage.id)
    ask_to_stop(folder, "by ann")
    clear_stop(folder)
    assert stage.id in submit(tree, grid).jobs


def test_where_nobody_says_which_cluster_this_is_nothing_is_concluded(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue may be another one: a number that is not in it says nothing."""
    submit(tree, grid)
    monkeypatch.setattr(commands, "_known_config", None)
    site.says("scontrol", "exit 1")
    before = site.calls("scontrol")
    assert set(states(tree, grid).values()) == {"submitted"} and queue.is_silent()
    assert site.calls("scontrol") == before + 1  # however many stages there are
    with pytest.raises(UserError, match="`scontrol show config` does not answer on this host"):
        submit(tree, grid)
    status = read_json(next(tree.root.glob("stages/*/*/status.json"))) or {}
    assert commands.cancel_jobs([status]) == [status] and site.calls("scancel") == 0
    site.says("scontrol", "echo 'ClusterName = lab'")
    # After a while it is asked again.
    monkeypatch.setattr(commands, "_known_config", (time.monotonic() - 120, {}))
    found = queue.read_states(tree, grid.stages, max_age_s=0.0)
    assert {v.state for v in found.values()} == {"lost"} and not queue.is_silent()


def test_a_scontrol_that_hangs_is_waited_for_once(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(tree, grid)
    monkeypatch.setattr(commands, "_known_config", None)
    now = [0.0]
    for module in (queue, commands):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asked: list[tuple[str, ...]] = []

    def hangs(*command: str) -> None:
        asked.append(command)
        now[0] += commands._TIMEOUT_S

    monkeypatch.setattr(commands, "run", hangs)
    assert set(states(tree, grid).values()) == {"submitted"}
    assert asked == [("scontrol", "show", "config")]


def test_status_says_why_a_job_waits(
    site: FakeSlurm, tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    store.register(tree, grid, [])
    jobs = submit(tree, grid).jobs
    said = {
        "Priority": "  (Priority)",
        "Held\x1b[2J": r"  (Held\x1b[2J)",
        "Dependency": "",
        "None": "",
    }
    reasons = dict(zip(grid.stages, list(said) * len(jobs), strict=False))
    rows = [(job, "PENDING", "x", reasons[stage]) for stage, job in jobs.items()]
    site.write("squeue", "".join("\x1f".join(row) + "\n" for row in rows))
    status.status(study="small", root=tree.root)
    lines = [s for s in capsys.readouterr().out.splitlines() if s.startswith("  submitted ")]
    assert len(lines) == 10
    for line in lines:
        stage = line.split()[1]
        assert f"job {jobs[stage]}{said[reasons[stage]]}  on " in line


def test_a_local_driver_leaves_jobs_of_the_queue_alone_and_takes_those_that_left_it(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = submit(tree, grid).jobs
    change(tree, grid, state="preempted")
    site.holds(*((job, "x") for job in jobs.values()))
    local = driver(tree, grid)
    found = local._read_states()
    assert {v.state for v in found.values()} == {"submitted"}
    started: list[str] = []
    pool = SimpleNamespace(free=1, running={}, fits=lambda *_: True)
    pool.start = lambda stage, attempt: started.append(stage.id)
    local._place(cast(Pool, pool), local._in_order(found, local._todo(found)), found)
    assert started == []
    change(tree, grid, state="submitted")
    site.holds()
    monkeypatch.setattr(queue, "_last", None)  # half a minute later
    assert {v.state for v in local._read_states().values()} == {"lost"}


def test_what_sbatch_refuses_is_taken_back(site: FakeSlurm, tree: Tree, grid: Grid) -> None:
    site.says("sbatch", "echo 'sbatch: error: Job violates accounting policy' >&2; exit 1")
    with pytest.raises(UserError, match="accounting policy"):
        submit(tree, grid)
    assert set(states(tree, grid).values()) <= {"planned", "waiting"}


def test_a_caretaker_without_jobs_is_taken_back(site: FakeSlurm, tree: Tree, grid: Grid) -> None:
    count = f"$(cat {site.folder}/sbatch.calls | wc -l)"
    refuse = "echo 'sbatch: error: Job violates accounting policy' >&2; exit 1"
    site.says("sbatch", f'[ {count} = 1 ] || {{ {refuse}; }}; echo "Submitted batch job {count}"')
    with pytest.raises(UserError, match="accounting policy"):
        submit(tree, grid)
    assert (site.folder / "scancel.calls").read_text() == "--quiet 1\n"


def test_with_room_for_two_jobs_the_caretaker_gets_one(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    refuse = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    count = f"$(cat {site.folder}/sbatch.calls | wc -l)"
    full = f"[ {count} -gt 2 ]"
    site.says("sbatch", f'if {full}; then {refuse}; fi; echo "Submitted batch job {count}"')
    done = submit(tree, grid)
    assert done.caretaker is not None and done.left == len(grid.stages) - len(done.jobs) > 0
    update = f"update JobId={done.caretaker} Dependency=afterany:2 StartTime=now"
    assert update in (site.folder / "scontrol.calls").read_text().splitlines()
    site.holds(*((j, "x") for j in done.jobs.values()))
    found = states(tree, grid)
    assert {s for s, state in found.items() if state == "submitted"} == set(done.jobs)


@pytest.mark.parametrize("name", ["a%j", "a\nb", "a\x1bb"])
def test_a_root_that_slurm_would_read_otherwise_is_refused(
    name: str, site: FakeSlurm, tmp_path: Path, grid: Grid
) -> None:
    with pytest.raises(UserError, match="choose another --root"):
        submit(Tree(tmp_path / name), grid)
    assert site.calls("sbatch") == 0
