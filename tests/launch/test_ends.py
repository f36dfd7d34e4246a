"""Between the end of an attempt and the decision on the next nobody may be lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import exits
from harness.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_STORAGE
from harness.launch import ends
from harness.launch.driver import Driver, reset
from harness.launch.machine import this_machine
from harness.launch.pool import Ended, Running
from harness.ledger import attempts, store
from harness.ledger.claim import ask_to_stop, clear_stop
from harness.ledger.files import read_json, read_jsonl, write_json
from harness.ledger.lease import Lease
from harness.ledger.states import read_states
from harness.ledger.tree import StageFolder, Tree
from harness.rank_zero import RankZero
from harness.stop import Stop
from harness.study.again import renewed
from harness.study.cells import Grid, build_grid
from harness.study.cost import Speeds
from harness.study.schema import Retry, load_study


@pytest.fixture
def grid(study_file: Callable[..., Path]) -> Grid:
    return build_grid(load_study(study_file()))


def ended(tree: Tree, grid: Grid, code: int, gone: str | None = None) -> StageFolder:
    """A stage whose attempt ended; the driver was killed before it decided what follows."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(tree, stage)
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    ends.settle(folder, number, code, asked_to_stop=False, gone=gone)
    assert (read_json(folder.status) or {})["state"] == "failed"
    return folder


def state_after_submit(tree: Tree, grid: Grid, retry: Retry) -> str:
    reset(tree, grid.stages, read_states(tree, grid.stages), "cached", retry)
    return read_states(tree, grid.stages)[
        next(s for s, v in grid.stages.items() if v.kind == "mae")
    ].state


def test_a_driver_killed_before_it_decided_costs_no_try(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    for _ in range(3):
        folder = ended(tree, grid, -9, gone="host a is gone")
        assert state_after_submit(tree, grid, Retry()) == "preempted"
    ended(tree, grid, -9, gone="host a is gone")
    assert state_after_submit(tree, grid, Retry()) == "failed"
    assert len([e for e in read_jsonl(folder.events) if e["event"] == "retry"]) == 3


@pytest.mark.parametrize(
    ("code", "asked", "ranks", "end"),
    [
        (-9, False, 2, "killed"),
        (EXIT_REQUEUE, False, 2, "preempted"),
        (-9, True, 2, "preempted"),
        (-11, False, 1, "preempted"),  # it had said so, and broke down on its way out
    ],
)
def test_a_rank_that_died_is_the_cause_where_another_says_that_it_was_asked_to_stop(
    tmp_path: Path, grid: Grid, code: int, asked: bool, ranks: int, end: str
) -> None:
    """srun, and the pool, ask the ranks that are left to stop; rank 0 hears nothing else."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    execution = stage.execution.model_copy(update={"ranks": ranks})
    folder = store.write_stage(Tree(tmp_path), renewed(stage, {"execution": execution}))
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    attempts.close(folder, number, "preempted", "preempted", "asked to stop")
    status = ends.settle(folder, number, code, asked_to_stop=asked)
    assert status["reason"] == end
    assert [a.end for a in attempts.read_attempts(folder)] == [end]
    if end == "killed":  # two more tries of its own, and not one for ever
        assert not ends.conclude(folder, number, status, Retry(killed=0)).again


def test_a_table_that_allows_more_than_it_did_is_obeyed(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    ended(tree, grid, 1)
    assert state_after_submit(tree, grid, Retry()) == "failed"
    assert state_after_submit(tree, grid, Retry(code=1)) == "preempted"


def test_what_failed_for_want_of_space_is_run_again_by_the_next_submission(
    tmp_path: Path, grid: Grid
) -> None:
    tree = Tree(tmp_path)
    folder = ended(tree, grid, EXIT_STORAGE)
    assert not ends.conclude(folder, 1, read_json(folder.status) or {}, Retry()).again
    assert state_after_submit(tree, grid, Retry()) == "planned"


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_stage_that_diverges_is_tried_again_as_often_as_declared_and_no_more(
    tmp_path: Path, grid: Grid, allowed: int
) -> None:
    """By its files alone: what the driver, the job and the caretaker all ask."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder, retry = store.write_stage(Tree(tmp_path), stage), Retry(diverged=allowed)
    for number in range(1, allowed + 2):
        assert folder.new_attempt() == number
        attempts.begin(folder, number, {})
        # As its worker leaves it; the exit code says only that it failed.
        attempts.close(folder, number, "diverged", "diverged", f"loss nan at step {number}")
        status = ends.settle(folder, number, 1, asked_to_stop=False)
        decision = ends.conclude(folder, number, status, retry)
        assert decision.again == (number <= allowed)
        left = read_json(folder.status) or {}
        assert left["state"] == ("preempted" if decision.again else "diverged")
        assert (left["reason"], left["message"]) == ("diverged", f"loss nan at step {number}")
    assert [a.end for a in attempts.read_attempts(folder)] == ["diverged"] * (allowed + 1)
    again = [e for e in read_jsonl(folder.events) if e["event"] == "retry"]
    assert [(e["attempt"], e["why"]) for e in again] == [(1, "diverged: try 1 of 1")][:allowed]
    later = ends.reconsider(folder, retry)  # by the next submission
    assert later is not None and not later.again
    assert (read_json(folder.status) or {})["state"] == "diverged"


@pytest.mark.parametrize("fail_fast", [False, True])
def test_fail_fast_stops_the_rest_and_is_no_interruption(
    tmp_path: Path, grid: Grid, fail_fast: bool
) -> None:
    tree = Tree(tmp_path)
    speeds = Speeds(device="cpu", flops_per_s={})
    driver = Driver(grid, tree, this_machine("cpu", 1), speeds, fail_fast=fail_fast)
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(tree, stage)
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    driver._ended(Ended(running=Running(stage=stage, attempt=number, places=()), code=1), {})
    assert driver.interrupted == fail_fast
    summary = driver._summary(read_states(tree, grid.stages), 0.0)
    assert (stage.id in summary.failed, summary.interrupted) == (True, False)


@pytest.mark.parametrize("is_back", [True, False])
def test_a_stage_resumed_while_it_ends_goes_on(tmp_path: Path, grid: Grid, is_back: bool) -> None:
    """Its worker has obeyed a note that `harness resume` then takes away."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(Tree(tmp_path), stage)
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    ask_to_stop(folder, "by ann")
    attempts.close(folder, number, "cancelled", "by ann", "asked to stop", end="cancelled")
    if is_back:
        clear_stop(folder)
    status = ends.settle(folder, number, EXIT_REQUEUE, asked_to_stop=False)
    assert ends.conclude(folder, number, status, Retry()).again == is_back
    state = (read_json(folder.status) or {})["state"]
    assert state == ("preempted" if is_back else "cancelled")


@pytest.mark.parametrize("end", ["busy", "dropped"])
def test_an_attempt_that_found_nothing_to_do_is_no_try(
    tmp_path: Path, grid: Grid, end: str
) -> None:
    """The first was slow, not dead; a second came, saw it beat and went; now its node is lost."""
    tree = Tree(tmp_path)
    stage = next(iter(grid.stages.values()))
    folder = store.write_stage(tree, stage)
    for _ in range(2):
        attempts.begin(folder, folder.new_attempt(), {})
    attempts.note_end(folder, 2, end, "nothing to do")
    write_json(folder.status, {"schema": 1, "state": "running", "attempt": 1})
    status = ends.settle(folder, 1, -9, asked_to_stop=False)
    assert status["reason"] == "killed"
    decision = ends.conclude(folder, 1, status, Retry())
    assert decision.again and decision.why == "killed: try 1 of 2"


def test_a_driver_takes_up_what_was_done_when_it_began_and_is_to_run_again(
    tmp_path: Path, grid: Grid
) -> None:
    """By `retry --from-scratch --no-submit`: it would wait for ever for what nobody runs."""
    tree = Tree(tmp_path)
    driver = Driver(grid, tree, this_machine("cpu", 1), Speeds())
    states = read_states(tree, grid.stages)
    probe = next(c for c in grid.cells if c.axes["init"] == "mae").stages["probe"]
    todo = {s: job for s, job in driver._todo(states).items() if s == probe}
    driver._take_up(states, todo)
    rests_on, found = {probe}, {probe}
    while rests_on:
        rests_on = {u for s in rests_on for u in grid.stages[s].config.upstream.values()}
        found |= rests_on
    assert set(todo) == found and len(found) == 4
    held = {s: v._replace(held=True) for s, v in states.items()}
    todo = {s: job for s, job in todo.items() if s == probe}
    driver._take_up({**held, probe: states[probe]}, todo)
    assert set(todo) == {probe}


def test_what_will_be_tried_again_is_not_taken_for_an_end_of_others(
    tmp_path: Path, grid: Grid
) -> None:
    """Of two ranks one found no memory; before the last was gone another command saw the failure,
    and granted the next try."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    two = renewed(stage, {"execution": stage.execution.model_copy(update={"ranks": 2})})
    folder = store.write_stage(Tree(tmp_path), two)
    attempts.begin(folder, folder.new_attempt(), {})
    attempts.close(folder, 1, "failed", "oom", "out of memory")
    assert ends.reconsider(folder, Retry())
    status = ends.settle(folder, 1, EXIT_FAILED, asked_to_stop=False)
    assert (status["state"], status["reason"]) == ("preempted", "oom")
    assert ends.conclude(folder, 1, status, Retry()).again
    assert [a.end for a in attempts.read_attempts(folder)] == ["oom"]


def test_what_was_cancelled_stays_so_though_the_disk_was_full_when_it_saved(
    tmp_path: Path, grid: Grid
) -> None:
    tree = Tree(tmp_path)
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(tree, stage)
    for mode, state in (("cached", "cancelled"), ("retry", "planned")):
        number = folder.new_attempt()
        attempts.begin(folder, number, {})
        ask_to_stop(folder, "by ann")
        attempts.close(folder, number, "failed", "storage", "no space")
        reset(tree, grid.stages, read_states(tree, grid.stages), mode, Retry())
        assert read_states(tree, grid.stages)[stage.id].state == state
    # What is held is not let go by a command that is about all stages.
    ask_to_stop(folder, "by ann")
    reset(tree, grid.stages, read_states(tree, grid.stages), "force", Retry())
    assert read_states(tree, grid.stages)[stage.id].state == "cancelled"


def test_what_one_stops_oneself_is_no_try(tmp_path: Path, grid: Grid) -> None:
    """Ctrl-C twice, or before the worker listened: it ends by a signal, at which it has no part."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(Tree(tmp_path), stage)
    for number in (1, 2):
        attempts.begin(folder, folder.new_attempt(), {})
        status = ends.settle(folder, number, -15, asked_to_stop=True)
        assert (status["state"], status["reason"]) == ("cancelled", "killed")
    attempts.begin(folder, folder.new_attempt(), {})
    status = ends.settle(folder, 3, -9, asked_to_stop=False)
    assert ends.conclude(folder, 3, status, Retry()).again
    assert [a.end for a in attempts.read_attempts(folder)] == ["cancelled", "cancelled", "killed"]


@pytest.mark.parametrize(
    ("number", "name", "reason"),
    [
        (errno.EIO, None, "storage"),
        (errno.ESTALE, "shard.tar", "storage"),
        (errno.ETIMEDOUT, "shard.tar", "storage"),
        (errno.ETIMEDOUT, None, "code"),  # of a socket
        (errno.EINVAL, "shard.tar", "code"),
    ],
)
def test_a_disk_that_cannot_be_read_is_no_mistake_in_the_code(
    tmp_path: Path, grid: Grid, own_signals: None, number: int, name: str | None, reason: str
) -> None:
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    tree = Tree(tmp_path)
    folder = store.write_stage(tree, stage)
    attempts.begin(folder, folder.new_attempt(), {})
    stop = Stop(folder)
    lease = Lease.acquire(folder.lease)

    def run() -> int:
        raise OSError(number, os.strerror(number), name)

    code = exits.guarded(run, folder, 1, stop, RankZero(tree, folder, stage, 1, 1, lease, stop))
    lease.release()
    assert code == (EXIT_STORAGE if reason == "storage" else EXIT_FAILED)
    status = read_json(folder.status) or {}
    assert (status["state"], status["reason"]) == ("failed", reason)
    if reason == "storage":
        assert "see that the disk, or the server of its files, works" in status["message"]
        reset(tree, grid.stages, read_states(tree, grid.stages), "cached", Retry())
        assert read_states(tree, grid.stages)[stage.id].state == "planned"
