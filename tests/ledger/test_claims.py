"""Of commands that saw one state one changes it; an attempt that is over keeps what it knew."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.launch import ends
from harness.launch.driver import reset
from harness.launch.modes import Mode
from harness.ledger import attempts, store
from harness.ledger.claim import ask_to_stop, claim, clear_stop, complete, start_over, unclaim
from harness.ledger.files import read_json, read_jsonl, write_json
from harness.ledger.states import read_states
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import Retry, load_study
from harness.study.stages import StageFile


@pytest.fixture
def grid(study_file: Callable[..., Path]) -> Grid:
    return build_grid(load_study(study_file()))


def first(grid: Grid) -> StageFile:
    return next(s for s in grid.stages.values() if s.kind == "mae")


def failed(tree: Tree, grid: Grid) -> StageFolder:
    folder = store.write_stage(tree, first(grid))
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    ends.settle(folder, number, 1, asked_to_stop=False)
    return folder


@pytest.mark.parametrize("mode", ["retry", "force"])
def test_a_command_that_looked_earlier_does_not_undo_a_claim(
    tmp_path: Path, grid: Grid, mode: Mode
) -> None:
    tree, stage = Tree(tmp_path), first(grid)
    folder = failed(tree, grid)
    seen_by_b = read_states(tree, grid.stages)
    reset(tree, grid.stages, seen_by_b, mode, Retry())
    seen_by_a = read_states(tree, grid.stages)[stage.id]
    assert claim(tree, stage, seen_by_a, {"cluster": "local"}) == 2
    write_json(folder.path / "memory.json", {"of": "attempt 2"})
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    reset(tree, grid.stages, seen_by_b, mode, Retry())
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before
    assert not start_over(folder, seen_by_b[stage.id], "from-scratch", from_scratch=True)
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("mode", ["retry", "force"])
def test_of_many_commands_at_a_time_one_gets_the_stage(
    tmp_path: Path, grid: Grid, mode: Mode
) -> None:
    tree, stage = Tree(tmp_path), first(grid)
    folder = failed(tree, grid)
    seen = {stage.id: read_states(tree, grid.stages)[stage.id]}

    def command(_: int) -> int | None:
        reset(tree, grid.stages, seen, mode, Retry())
        return claim(tree, stage, read_states(tree, grid.stages)[stage.id], {"cluster": "local"})

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(command, range(8)))
    # Those that look after the first claim see a stage that is submitted, which the driver leaves
    # alone; `claim` itself would count on, so what matters is that no claim was written over.
    numbers = sorted(n for n in got if n is not None)
    assert numbers == list(range(2, 2 + len(numbers)))
    assert (read_json(folder.status) or {})["attempt"] == numbers[-1]
    assert len([e for e in read_jsonl(folder.events) if e["event"] == mode]) == 1


def test_an_end_that_comes_late_leaves_the_status_of_a_later_attempt(
    tmp_path: Path, grid: Grid
) -> None:
    tree = Tree(tmp_path)
    folder = failed(tree, grid)
    attempts.begin(folder, folder.new_attempt(), {})
    later = {"schema": 1, "state": "done", "attempt": 2}
    write_json(folder.status, later)
    write_json(folder.attempt(1) / "attempt.json", {"schema": 1, "attempt": 1, "end": None})
    for code in (0, 1, -9):
        assert ends.settle(folder, 1, code, asked_to_stop=False) == later
        assert not ends.conclude(folder, 1, later, Retry(code=9), "by ann").again
    assert read_json(folder.status) == later
    assert (read_json(folder.attempt(1) / "attempt.json") or {})["end"] == "code"


def running(folder: StageFolder, number: int) -> None:
    """As a worker leaves it that is killed at step 7."""
    row = {"schema": 1, "attempt": number, "first_step": 3, "end": None}
    write_json(folder.attempt(number) / "attempt.json", row)
    about = {"step": 7, "samples": 70, "started": 100.0, "updated": 107.5}
    write_json(folder.status, {"schema": 1, "state": "running", "attempt": number, **about})
    mark = folder.checkpoints / "step_6" / "COMPLETE"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


@pytest.mark.parametrize("gone", [None, "host a is gone"])
def test_the_record_of_a_killed_attempt_has_its_steps(
    tmp_path: Path, grid: Grid, gone: str | None
) -> None:
    folder = failed(Tree(tmp_path), grid)
    running(folder, folder.new_attempt())
    ends.settle(folder, 2, -9, asked_to_stop=False, gone=gone)
    record = read_json(folder.attempt(2) / "attempt.json") or {}
    found = {k: record.get(k) for k in ("end", "first_step", "last_step", "last_samples")}
    end = "node_fail" if gone else "killed"
    assert found == {"end": end, "first_step": 3, "last_step": 7, "last_samples": 70}
    assert record["last_checkpoint"] == 6
    assert record["ended"] > 107.5


def test_the_record_of_an_attempt_that_was_lost_has_its_steps(tmp_path: Path, grid: Grid) -> None:
    tree, stage = Tree(tmp_path), first(grid)
    folder = failed(tree, grid)
    running(folder, folder.new_attempt())
    state = read_states(tree, grid.stages)[stage.id]
    assert state.state == "lost"
    assert claim(tree, stage, state, {"cluster": "local"}) == 3
    record = read_json(folder.attempt(2) / "attempt.json") or {}
    names = ("end", "first_step", "last_step", "last_samples", "last_checkpoint", "ended")
    assert [record.get(k) for k in names] == ["lost", 3, 7, 70, 6, 107.5]
    before = folder.status.read_bytes()
    unclaim(folder, 2, "no job")  # of an attempt before: it is another's by now
    assert folder.status.read_bytes() == before
    unclaim(folder, 3, "no job")  # it never began: there is nothing to say of it
    assert (read_json(folder.attempt(3) / "attempt.json") or {}).get("last_step") is None


def test_an_end_in_the_words_of_a_user_is_recorded_as_cancelled(tmp_path: Path, grid: Grid) -> None:
    folder = failed(Tree(tmp_path), grid)
    status = attempts.close(folder, 1, "cancelled", "by ann", "by ann", end="cancelled")
    assert (status["state"], status["reason"]) == ("cancelled", "by ann")
    assert [a.end for a in attempts.read_attempts(folder)] == ["cancelled"]


def test_a_stage_whose_job_has_begun_is_not_taken_back(tmp_path: Path, grid: Grid) -> None:
    """sbatch gave no answer in time, but had taken the job: its worker is on its way."""
    tree, stage = Tree(tmp_path), first(grid)
    folder = store.write_stage(tree, stage)
    seen = read_states(tree, grid.stages)[stage.id]
    assert claim(tree, stage, seen, {"cluster": "slurm", "token": "t"}) == 1
    path, before = folder.attempt(1) / "attempt.json", folder.status.read_bytes()
    write_json(path, {**(read_json(path) or {}), "job_started": 1.0})
    unclaim(folder, 1, "refused")
    assert folder.status.read_bytes() == before
    assert (read_json(path) or {})["end"] is None


ELSEWHERE = {"schema": 1, "token": "t", "host": "b:0:1", "pid": 1, "started": "1", "beat": 7}


def silent(folder: StageFolder) -> None:
    """The lease of a host that nobody has heard of for days."""
    write_json(folder.lease, ELSEWHERE)
    os.utime(folder.lease, (0, 0))


def state_of(tree: Tree, grid: Grid) -> str:
    return read_states(tree, grid.stages)[first(grid).id].state


def test_a_waiting_job_of_another_login_node_is_given_up_by_resume(
    tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a claim that has no job the command would count, which nobody here can ask."""
    tree, stage = Tree(tmp_path), first(grid)
    seen = read_states(tree, grid.stages)[stage.id]
    monkeypatch.setenv("HARNESS_HOST", "login-1")
    assert claim(tree, stage, seen, {"cluster": "slurm", "token": "t", "job": "77"}) == 1
    monkeypatch.delenv("HARNESS_HOST")
    folder = tree.stage(stage.kind, stage.id)
    ask_to_stop(folder, "by ann")
    assert state_of(tree, grid) == "cancelled"
    clear_stop(folder)
    assert state_of(tree, grid) == "planned"
    assert attempts.read_attempts(folder) == []  # nobody had tried it
    assert claim(tree, stage, read_states(tree, grid.stages)[stage.id], {}) == 2


def test_of_a_local_command_at_work_resume_takes_nothing_away(tmp_path: Path, grid: Grid) -> None:
    tree, stage = Tree(tmp_path), first(grid)
    assert claim(tree, stage, read_states(tree, grid.stages)[stage.id], {"cluster": "local"}) == 1
    clear_stop(tree.stage(stage.kind, stage.id))
    assert state_of(tree, grid) == "submitted"


@pytest.mark.parametrize("is_silent", [True, False])
def test_resume_gives_up_the_job_of_a_worker_that_gave_no_sign_for_long(
    tmp_path: Path, grid: Grid, is_silent: bool
) -> None:
    """Its run root was moved off the cluster while it ran: its queue can be asked no more."""
    tree = Tree(tmp_path)
    folder = store.write_stage(tree, first(grid))
    about = {"cluster": "slurm", "site": "gone", "job": "77", "token": "t", "host": "b:0:1"}
    write_json(folder.status, {"schema": 1, "state": "running", "attempt": 1, **about})
    write_json(folder.lease, ELSEWHERE)
    if is_silent:
        silent(folder)
    assert state_of(tree, grid) == "running"
    ask_to_stop(folder, "by ann")
    clear_stop(folder)
    assert state_of(tree, grid) == ("lost" if is_silent else "running")


def test_a_note_that_came_too_late_holds_no_later_run(tmp_path: Path, grid: Grid) -> None:
    tree, stage = Tree(tmp_path), first(grid)
    folder = failed(tree, grid)
    ask_to_stop(folder, "by ann")
    seen = read_states(tree, grid.stages)[stage.id]
    assert start_over(folder, seen, "retry")
    assert state_of(tree, grid) == "planned"
    # The same of a stage that finished; its worker was killed before its last words.
    attempts.begin(folder, folder.new_attempt(), {})
    write_json(folder.result, {"uid": "u", "attempts": 2, "upstream_uids": {}, "steps": None})
    write_json(folder.status, {"schema": 1, "state": "running", "attempt": 2})
    ask_to_stop(folder, "by ann")
    complete(folder)
    assert not folder.stop.exists() and state_of(tree, grid) == "done"


def test_claims_that_came_to_nothing_are_no_lost_nodes(tmp_path: Path, grid: Grid) -> None:
    """Commands killed, or disks full, between the folder of an attempt and its record, and
    between the record and the start of a worker."""
    tree, stage = Tree(tmp_path), first(grid)
    folder = store.write_stage(tree, stage)
    for _ in range(3):
        folder.new_attempt()
    for number in (4, 5, 6):
        seen = read_states(tree, grid.stages)[stage.id]
        assert claim(tree, stage, seen, {"cluster": "local"}) == number
        status = read_json(folder.status) or {}
        write_json(folder.status, {**status, "pid": 1, "pid_started": "no process"})
        assert state_of(tree, grid) == "lost"
    seen = read_states(tree, grid.stages)[stage.id]
    assert claim(tree, stage, seen, {"cluster": "local"}) == 7
    status = ends.settle(folder, 7, -9, asked_to_stop=False, gone="host b is gone")
    assert status["reason"] == "node_fail"
    assert ends.conclude(folder, 7, status, Retry(node_fail=1)).again
    assert [a.number for a in attempts.read_attempts(folder)] == [7]


def test_an_attempt_that_a_lost_node_took_is_one(tmp_path: Path, grid: Grid) -> None:
    tree, stage = Tree(tmp_path), first(grid)
    folder = store.write_stage(tree, stage)
    attempts.begin(folder, folder.new_attempt(), {"started": 1.0})
    write_json(folder.status, {"schema": 1, "state": "running", "attempt": 1})
    assert claim(tree, stage, read_states(tree, grid.stages)[stage.id], {}) == 2
    assert [a.end for a in attempts.read_attempts(folder)] == ["lost", None]


def test_a_result_whose_worker_was_killed_on_another_host_is_told_in_the_end(
    tmp_path: Path, grid: Grid
) -> None:
    folder = store.write_stage(Tree(tmp_path), first(grid))
    attempts.begin(folder, folder.new_attempt(), {"started": 1.0})
    write_json(folder.result, {"uid": "u", "attempts": 1, "upstream_uids": {}, "steps": None})
    write_json(folder.status, {"schema": 1, "state": "running", "attempt": 1})
    write_json(folder.lease, ELSEWHERE)
    complete(folder)  # it may be writing its last words now
    assert (read_json(folder.status) or {})["state"] == "running"
    silent(folder)
    complete(folder)
    assert (read_json(folder.status) or {})["state"] == "done" and not folder.lease.exists()
    assert [a.end for a in attempts.read_attempts(folder)] == ["done"]


def test_who_found_another_at_work_leaves_it_the_job_they_share(tmp_path: Path, grid: Grid) -> None:
    """Slurm put the job back while its worker lived on: the queue, and the caretaker, go on
    looking after it."""
    folder = store.write_stage(Tree(tmp_path), first(grid))
    for _ in range(2):
        attempts.begin(folder, folder.new_attempt(), {})
    about = {"cluster": "slurm", "job": "77", "token": "t"}
    write_json(folder.status, {"schema": 1, "state": "submitted", "attempt": 2, **about})
    attempts.end_busy(folder, 2)
    status = read_json(folder.status) or {}
    assert status.items() >= {"state": "running", "attempt": 1, **about}.items()


@pytest.mark.parametrize("is_silent", [False, True])
def test_resume_leaves_a_job_that_has_begun_its_place(
    tmp_path: Path, grid: Grid, is_silent: bool
) -> None:
    """It imports torch, and has no lease yet. After a while without a word it is another's."""
    tree, stage = Tree(tmp_path), first(grid)
    seen = read_states(tree, grid.stages)[stage.id]
    assert claim(tree, stage, seen, {"cluster": "slurm", "token": "t", "job": "77"}) == 1
    folder = tree.stage(stage.kind, stage.id)
    path = folder.attempt(1) / "attempt.json"
    write_json(path, {**(read_json(path) or {}), "job_started": 1.0})
    if is_silent:
        os.utime(folder.status, (0, 0))
    ask_to_stop(folder, "by ann")
    clear_stop(folder)
    assert (read_json(folder.status) or {})["job"] == (None if is_silent else "77")
