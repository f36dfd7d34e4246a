"""The state of a stage is what its files say, read in the order of the graph."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.ledger import store
from harness.ledger.drift import check_drift
from harness.ledger.files import write_json
from harness.ledger.lease import MOST_SKEW_S, process_started, this_host
from harness.ledger.speeds import measured_speeds
from harness.ledger.states import read_states
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study

Write = Callable[..., Path]


@pytest.fixture
def grid(study_file: Write) -> Grid:
    return build_grid(load_study(study_file()))


def finish(tree: Tree, grid: Grid, stage_id: str, uid: str | None = None) -> None:
    stage = grid.stages[stage_id]
    folder = store.write_stage(tree, stage)
    uids = {}
    for upstream in stage.config.upstream.values():
        path = tree.stage(grid.stages[upstream].kind, upstream).result
        uids[upstream] = json.loads(path.read_text())["uid"]
    result = {
        "uid": uid or f"uid-{stage_id}",
        "upstream_uids": uids,
        "kind": stage.kind,
        "size": stage.config.size,
        "flops": stage.flops,
        "wall_s": {"total": 2.0, "harness": 0.5},
        "processes": 1,
        "device": "cpu",
        "metrics": {},
    }
    write_json(folder.result, result)


def states(tree: Tree, grid: Grid) -> dict[str, str]:
    return {k: v.state for k, v in read_states(tree, grid.stages).items()}


def chain(grid: Grid) -> tuple[str, str, str]:
    cell = next(c for c in grid.cells if c.axes["init"] == "mae")
    return cell.stages["mae"], cell.stages["wsp"], cell.stages["probe"]


def test_an_empty_root_is_planned_and_waiting(tmp_path: Path, grid: Grid) -> None:
    found = states(Tree(tmp_path), grid)
    for stage in grid.stages.values():
        assert found[stage.id] == ("waiting" if stage.config.upstream else "planned")


def test_removing_a_stage_makes_it_and_its_dependants_stale_and_nothing_else(
    tmp_path: Path, grid: Grid
) -> None:
    tree = Tree(tmp_path)
    for stage_id in grid.stages:
        finish(tree, grid, stage_id)
    assert set(states(tree, grid).values()) == {"done"}
    mae, wsp, probe = chain(grid)
    tree.stage("mae", mae).result.unlink()
    below = {s for c in grid.cells if c.stages.get("mae") == mae for s in c.stages.values()}
    found = states(tree, grid)
    assert {s for s, state in found.items() if state != "done"} == below
    assert found[mae] == "planned" and found[wsp] == "waiting" and found[probe] == "waiting"
    # Run again it has another uid: what was computed from the old one does not count.
    finish(tree, grid, mae, uid="another")
    found = states(tree, grid)
    assert found[mae] == "done" and found[wsp] == "planned" and found[probe] == "waiting"


def test_a_failure_blocks_dependants_only(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    mae, wsp, probe = chain(grid)
    folder = store.write_stage(tree, grid.stages[mae])
    write_json(folder.status, {"state": "diverged", "reason": "diverged", "message": "step 7"})
    found = states(tree, grid)
    assert (found[mae], found[wsp], found[probe]) == ("diverged", "blocked", "blocked")
    blocked = {s for s, state in found.items() if state == "blocked"}
    assert blocked == {
        s for c in grid.cells if c.stages.get("mae") == mae for s in c.stages.values() if s != mae
    }


def test_running_without_a_living_owner_is_lost(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    folder = store.write_stage(tree, grid.stages[chain(grid)[0]])
    write_json(folder.status, {"state": "running", "attempt": 1})
    owner = {
        "token": "t",
        "host": this_host(),
        "pid": os.getpid(),
        "started": process_started(os.getpid()),
        "beat": 0,
    }
    write_json(folder.lease, owner)
    assert states(tree, grid)[folder.path.name] == "running"
    write_json(folder.lease, {**owner, "started": "1"})
    assert states(tree, grid)[folder.path.name] == "lost"
    write_json(folder.lease, {**owner, "host": "elsewhere:1"})
    assert states(tree, grid)[folder.path.name] == "running"  # its heartbeat is not ours to judge
    at_most = time.time() - MOST_SKEW_S - 30  # of clocks ten minutes ahead and behind
    os.utime(folder.lease, (at_most, at_most))
    assert states(tree, grid)[folder.path.name] == "running"
    days_ago = time.time() - 3 * 86_400
    os.utime(folder.lease, (days_ago, days_ago))
    assert states(tree, grid)[folder.path.name] == "lost"
    folder.lease.unlink()
    assert states(tree, grid)[folder.path.name] == "lost"


def test_a_claim_whose_command_on_another_host_never_started_it_is_lost_after_long(
    tmp_path: Path, grid: Grid
) -> None:
    tree = Tree(tmp_path)
    folder = store.write_stage(tree, grid.stages[chain(grid)[0]])
    own = {"host": this_host(), "pid": os.getpid(), "pid_started": process_started(os.getpid())}
    elsewhere = {**own, "host": "elsewhere:1"}
    days_ago = time.time() - 3 * 86_400
    for about, expected in ((own, "submitted"), (elsewhere, "lost")):
        write_json(folder.status, {"state": "submitted", "attempt": 1, **about})
        assert states(tree, grid)[folder.path.name] == "submitted"
        os.utime(folder.status, (days_ago, days_ago))
        assert states(tree, grid)[folder.path.name] == expected


def test_what_became_of_a_new_attempt_at_a_stale_stage_is_in_its_status(
    tmp_path: Path, grid: Grid
) -> None:
    """The old result stays until a worker sets it aside: not before that can it have failed."""
    tree = Tree(tmp_path)
    mae, wsp, probe = chain(grid)
    for stage_id in grid.stages:
        finish(tree, grid, stage_id)
    finish(tree, grid, mae, uid="another run")
    folder = tree.stage("wsp", wsp)
    assert states(tree, grid)[wsp] == "planned"
    held = {"schema": 1, "reason": "cancelled by me", "time": 0.0}
    write_json(folder.stop, held)
    assert states(tree, grid)[wsp] == "cancelled"
    folder.stop.unlink()
    about = {"attempt": 2, "host": "elsewhere:1", "pid": 1, "pid_started": "1"}
    for state, expected in (
        ("failed", "failed"),
        ("submitted", "submitted"),
        ("preempted", "preempted"),
        ("running", "lost"),  # it has no lease
    ):
        write_json(folder.status, {"schema": 1, "state": state, "reason": "code", **about})
        assert states(tree, grid)[wsp] == expected
        blocked = expected == "failed"
        assert (states(tree, grid)[probe] == "blocked") is blocked
    folder.result.unlink()
    write_json(folder.status, {"schema": 1, "state": "done", "attempt": 2})
    finish(tree, grid, wsp, uid="anew")
    assert states(tree, grid)[wsp] == "done"


@pytest.mark.parametrize("state", ["failed", "diverged"])
def test_how_a_stage_ended_on_an_upstream_run_that_counts_no_longer_counts_no_longer(
    tmp_path: Path, grid: Grid, state: str
) -> None:
    tree = Tree(tmp_path)
    mae, wsp, probe = chain(grid)
    finish(tree, grid, mae, uid="first")
    folder = store.write_stage(tree, grid.stages[wsp])
    write_json(folder.status, {"schema": 1, "state": state, "reason": "code", "attempt": 1})
    write_json(folder.lineage, {"schema": 1, "attempt": 1, "upstream_uids": {mae: "first"}})
    assert (states(tree, grid)[wsp], states(tree, grid)[probe]) == (state, "blocked")
    tree.stage("mae", mae).result.unlink()  # it is run again
    assert (states(tree, grid)[wsp], states(tree, grid)[probe]) == ("waiting", "waiting")
    finish(tree, grid, mae, uid="second")
    found = read_states(tree, grid.stages)
    assert (found[wsp].state, found[wsp].reason) == ("planned", "stale")
    assert found[probe].state == "waiting"
    finish(tree, grid, mae, uid="first")
    assert states(tree, grid)[wsp] == state
    # The next attempt failed before it began: it would be started for ever.
    write_json(folder.status, {"schema": 1, "state": state, "reason": "code", "attempt": 2})
    finish(tree, grid, mae, uid="second")
    assert states(tree, grid)[wsp] == state


def test_a_stored_config_that_is_not_its_ids_is_shown_as_a_field_diff(
    tmp_path: Path, grid: Grid
) -> None:
    tree = Tree(tmp_path)
    stage = grid.stages[chain(grid)[1]]
    folder = store.write_stage(tree, stage)
    assert check_drift(tree, grid) == []
    raw = json.loads(folder.stage.read_text())
    raw["config"]["recipe"]["lr"] = 0.5
    folder.stage.write_text(json.dumps(raw))
    assert check_drift(tree, grid) == [
        f"{stage.id}: stored config differs: recipe.lr: 0.5 -> (default)"
    ]


def test_speeds_are_measured_from_results(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    mae = grid.stages[chain(grid)[0]]
    finish(tree, grid, mae.id)
    speeds = measured_speeds(tree, "cpu")
    assert speeds.flops_per_s[mae.kind, mae.config.size] == pytest.approx(mae.flops / 2.0)
    assert measured_speeds(tree, "cuda").flops_per_s == {}


def test_starting_over_keeps_the_old_files_with_their_attempt(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    mae = chain(grid)[0]
    folder = tree.stage("mae", mae)
    assert folder.new_attempt() == 1
    finish(tree, grid, mae)
    folder.metrics.write_text('{"step": 1}\n')
    store.set_aside(folder)
    assert not folder.result.exists() and not folder.metrics.exists()
    assert (folder.attempt(1) / "superseded" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert folder.new_attempt() == 2


def test_what_one_attempt_set_aside_and_what_it_left_are_both_kept(tmp_path: Path) -> None:
    """It found an older run of its upstream, failed, and a user asks for a start from scratch."""
    folder = StageFolder(tmp_path)
    folder.new_attempt()
    for run in ("stale", "failed", "third"):
        (folder.path / "features").mkdir()
        (folder.path / "features" / "0.safetensors").write_text(run)
        folder.metrics.write_text(run)
        store.set_aside(folder)
        store.set_aside(folder)  # nothing is left: no empty folder either
    assert [p.name for p in folder.path.iterdir()] == ["attempts"]
    for name, run in (("", "stale"), (".2", "failed"), (".3", "third")):
        kept = folder.attempt(1) / f"superseded{name}"
        assert kept.joinpath("metrics.jsonl").read_text() == run
        assert kept.joinpath("features", "0.safetensors").read_text() == run
    assert len(list(folder.attempt(1).iterdir())) == 3
