"""A start from scratch that is killed on its way: the stage is as it was, or is to be run anew."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.ledger import lease as leases
from harness.ledger import store
from harness.ledger.attempts import begin, note_end, read_attempts
from harness.ledger.claim import start_over
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import Lease
from harness.ledger.states import read_states
from harness.ledger.tree import StageFolder, Tree
from harness.rank_zero import RankZero
from harness.stop import Stop
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study
from harness.study.stages import StageFile

FILES = ("metrics.jsonl", "predictions.parquet", "result.json", "weights.safetensors")


@pytest.fixture
def grid(study_file: Callable[..., Path]) -> Grid:
    return build_grid(load_study(study_file()))


@pytest.fixture
def done(tmp_path: Path, grid: Grid) -> tuple[Tree, StageFile, StageFolder]:
    """A finished stage that starts from no other."""
    tree = Tree(tmp_path / "runs")
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    folder = store.write_stage(tree, stage)
    begin(folder, folder.new_attempt(), {})
    for name in FILES:
        (folder.path / name).write_text("of the first run")
    write_json(folder.lineage, {"schema": 1, "upstream_uids": {}})
    result = {"schema": 1, "uid": "first", "attempts": 1, "upstream_uids": {}}
    write_json(folder.result, result)
    write_json(folder.status, {"schema": 1, "state": "done", "attempt": 1})
    return tree, stage, folder


class Killed(BaseException):
    """As SIGKILL ends a process, but for the test's."""


@pytest.mark.parametrize("moves", range(len(FILES) + 1))
def test_killed_after_any_file_it_is_done_with_all_of_them_or_to_be_run(
    done: tuple[Tree, StageFile, StageFolder],
    grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    own_signals: None,
    moves: int,
) -> None:
    tree, stage, folder = done
    seen = read_states(tree, grid.stages)[stage.id]
    left, replace = [moves], Path.replace

    def killed_after_some(path: Path, target: Any) -> Path:
        if path.parent == folder.path and path.name in FILES:
            if not left[0]:
                raise Killed
            left[0] -= 1
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed_after_some)
        if moves < len(FILES):
            with pytest.raises(Killed):
                start_over(folder, seen, "from-scratch", from_scratch=True)
        else:
            assert start_over(folder, seen, "from-scratch", from_scratch=True)
    there = {name for name in FILES if (folder.path / name).exists()}
    state = read_states(tree, grid.stages)[stage.id].state
    assert state == ("planned" if moves else "done") and len(there) == len(FILES) - moves
    # Whatever it left behind, the next worker uses none of it.
    number = folder.new_attempt()
    lease = Lease.acquire(folder.lease)
    zero = RankZero(tree, folder, stage, number, 1, lease, Stop(folder))
    zero._start_clean_if_stale({})
    lease.release()
    assert not [name for name in FILES if (folder.path / name).exists()]
    kept = {p.name for p in folder.attempts.glob("*/superseded*/*")}
    assert kept == set(FILES)


def test_the_index_of_results_says_so_too(
    done: tuple[Tree, StageFile, StageFolder], grid: Grid
) -> None:
    tree, stage, folder = done
    assert read_states(tree, grid.stages)[stage.id].state == "done"
    folder.result.unlink()
    assert (read_json(folder.status) or {})["state"] == "done"
    assert read_states(tree, grid.stages)[stage.id].state == "planned"


def test_a_living_owner_elsewhere_keeps_its_files(
    done: tuple[Tree, StageFile, StageFolder], grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host, which nobody here can ask, was given up; but its heart beats."""
    tree, stage, folder = done
    folder.result.unlink()
    status = {"schema": 1, "state": "failed", "attempt": 1, "reason": "node_fail"}
    write_json(folder.status, status)
    seen = read_states(tree, grid.stages)[stage.id]
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(leases, "this_host", lambda: "elsewhere:1")
        lease = Lease.acquire(folder.lease)
    lease.start_beating()
    try:
        assert not start_over(folder, seen, "from-scratch", from_scratch=True)
    finally:
        lease.release()
    assert folder.metrics.exists() and read_json(folder.status) == status
    assert start_over(folder, seen, "from-scratch", from_scratch=True)
    assert not folder.metrics.exists()


def test_a_host_that_was_silent_for_long_is_not_waited_for(
    done: tuple[Tree, StageFile, StageFolder], grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hundreds of stages each would be watched for a minute, one after another."""
    tree, stage, folder = done
    seen = read_states(tree, grid.stages)[stage.id]
    write_json(folder.lease, {"token": "t", "host": "elsewhere:1", "pid": 1, "beat": 7})
    os.utime(folder.lease, (0, 0))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert start_over(folder, seen, "from-scratch", from_scratch=True)
    assert not folder.result.exists() and not slept


def test_tries_at_an_upstream_run_that_counts_no_longer_are_no_tries_at_the_next(
    tmp_path: Path, grid: Grid, own_signals: None
) -> None:
    """Nor is how far they came: an attempt that begins anew has gained with its first step."""
    tree = Tree(tmp_path / "runs")
    stage = next(s for s in grid.stages.values() if s.kind == "wsp" and s.config.upstream)
    folder = store.write_stage(tree, stage)
    for number in (1, 2):
        begin(folder, folder.new_attempt(), {})
        note_end(folder, number, "preempted", None)
    (folder.checkpoints / "step_9000").mkdir(parents=True)
    (folder.checkpoints / "step_9000" / "COMPLETE").touch()
    write_json(folder.lineage, {"schema": 1, "attempt": 2, "upstream_uids": {"mae": "first"}})
    begin(folder, folder.new_attempt(), {})
    assert [a.progress for a in read_attempts(folder)] == [0, 0, 9000]
    lease = Lease.acquire(folder.lease)
    zero = RankZero(tree, folder, stage, 3, 1, lease, Stop(folder))
    zero._start_clean_if_stale({"mae": "second"})
    lease.release()
    assert [(a.number, a.progress) for a in read_attempts(folder)] == [(3, 0)]
    assert (read_json(folder.lineage) or {})["attempt"] == 3
