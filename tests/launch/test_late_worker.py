"""A worker that begins after another attempt has finished its stage, or been given it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import worker
from harness.errors import EXIT_BUSY, EXIT_FAILED, EXIT_OK, EXIT_REQUEUE
from harness.launch import ends
from harness.ledger import attempts, store
from harness.ledger.files import read_json, write_json
from harness.ledger.states import read_states
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import build_grid
from harness.study.schema import Retry, load_study

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def folder(tmp_path: Path, study_file: Callable[..., Path]) -> StageFolder:
    """A stage that attempt 2 has finished, before the worker of attempt 1 began."""
    grid = build_grid(load_study(study_file()))
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(Tree(tmp_path / "runs"), stage)
    for _ in range(2):
        attempts.begin(folder, folder.new_attempt(), {})
    write_json(folder.result, {"schema": 1, "uid": "x", "upstream_uids": {}, "attempts": 2})
    write_json(folder.status, {"schema": 1, "state": "done", "attempt": 2})
    return folder


def begin(folder: StageFolder, attempt: int) -> None:
    """As rank 0 does once it owns the stage."""
    path = folder.attempt(attempt) / "attempt.json"
    write_json(path, {**(read_json(path) or {}), "started": 1.0})


def run(folder: StageFolder, attempt: int) -> int:
    root = folder.path.parents[2]
    return worker.run_stage(root, folder.path.parent.name, folder.path.name, attempt)


def test_a_stage_that_a_later_attempt_finished_stays_done(folder: StageFolder) -> None:
    code = run(folder, 1)
    assert code == EXIT_BUSY
    # As the driver and the end of a job do.
    ends.settle(folder, 1, code, asked_to_stop=False)
    attempts.end_busy(folder, 1)
    assert read_json(folder.status) == {"schema": 1, "state": "done", "attempt": 2}
    assert not folder.lease.exists()


def test_a_stage_that_this_attempt_finished_is_done(folder: StageFolder) -> None:
    assert run(folder, 2) == EXIT_OK


def test_a_stage_that_was_given_to_a_later_attempt_is_left_to_it(folder: StageFolder) -> None:
    folder.result.unlink()
    claimed = {"schema": 1, "state": "submitted", "attempt": 2}
    write_json(folder.status, claimed)
    assert run(folder, 1) == EXIT_BUSY
    assert read_json(folder.status) == claimed


def test_the_first_rank_of_another_host_tells_its_environment(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(worker, "call", lambda *_: None)
    begin(folder, 2)
    assert run(folder, 2) == EXIT_OK
    found = read_json(folder.attempt(2) / "env.rank8.json") or {}
    assert (found["by"], found["env"]["CUDA_VISIBLE_DEVICES"]) == ("worker", "3,5")


def test_the_other_ranks_of_a_late_attempt_wait_for_nobody(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run(folder, 1) == EXIT_BUSY


def test_a_stage_whose_upstream_was_taken_away_meanwhile_waits_again(
    tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    """By `retry --from-scratch`, after a driver had found it done: not a try of this stage."""
    tree = Tree(tmp_path / "runs")
    grid = build_grid(load_study(study_file()))
    stage = next(s for s in grid.stages.values() if s.kind == "wsp" and s.config.upstream)
    folder = store.write_stage(tree, stage)
    attempts.begin(folder, folder.new_attempt(), {})
    write_json(folder.status, {"schema": 1, "state": "submitted", "attempt": 1})
    code = run(folder, 1)
    status = ends.settle(folder, 1, code, asked_to_stop=False)
    assert (status["state"], status["reason"]) == ("planned", "dropped")
    (upstream,) = stage.config.upstream.values()
    assert status["message"] == f"{stage.id}: upstream {upstream} is not done (any more)"
    assert ends.conclude(folder, 1, status, Retry()).again
    assert attempts.read_attempts(folder) == []
    assert read_states(tree, grid.stages)[stage.id].state == "waiting"
    assert (read_json(folder.attempt(1) / "attempt.json") or {})["end"] == "dropped"


def test_other_ranks_touch_nothing_before_the_first_owns_the_stage(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leftovers of an earlier upstream run would look to them as their own run's."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    order: list[str] = []
    monkeypatch.setattr(worker, "call", lambda *_: order.append("called"))
    looks = iter(range(10))

    def sleep(seconds: float) -> None:
        order.append("waited")
        if next(looks) == 3:
            begin(folder, 2)

    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
    begin(folder, 1)  # an earlier attempt's word is not this one's
    assert run(folder, 2) == EXIT_OK
    assert order == ["waited"] * 4 + ["called"]


def test_a_rank_that_waits_for_the_first_hears_that_it_is_to_stop(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(worker, "call", lambda *_: pytest.fail("it began"))
    kill = SimpleNamespace(
        sleep=lambda _: os.kill(os.getpid(), signal.SIGTERM), monotonic=lambda: 0.0
    )
    monkeypatch.setattr(worker, "time", kill)
    assert run(folder, 2) == EXIT_REQUEUE


def test_a_rank_does_not_wait_for_ever_for_the_first(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which stands still before there is anything that a watchdog could watch."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    times = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: times[0], sleep=lambda _: times.__setitem__(0, times[0] + 60)
    )
    monkeypatch.setattr(worker, "time", clock)
    assert run(folder, 2) == EXIT_FAILED
    told = attempts.told_by_ranks(folder, 2) or {}
    message = "rank 1: waited 1800 s for rank 0 to begin"
    assert (told["reason"], told["message"], times[0]) == ("hung", message, 1860)
