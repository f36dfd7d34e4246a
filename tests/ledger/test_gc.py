"""What is removed is read by nobody: no stage runs again for it, and what runs is not touched."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.ledger import gc, store
from harness.ledger.files import read_json, temporary_name, write_json
from harness.ledger.lease import Lease
from harness.ledger.states import read_graph, read_states
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study
from tests.conftest import Harness


@pytest.fixture
def grid(study_file: Callable[..., Path]) -> Grid:
    return build_grid(load_study(study_file()))


@pytest.fixture
def tree(tmp_path: Path, grid: Grid) -> Tree:
    """All pretraining done, each with weights and a checkpoint; the transfers wait to be run."""
    tree = Tree(tmp_path / "runs")
    store.register(tree, grid, [])
    for stage in grid.stages.values():
        if stage.kind not in ("mae", "wsp"):
            continue
        folder = store.write_stage(tree, stage)
        uids = {u: f"uid-{u}" for u in stage.config.upstream.values()}
        result = {"schema": 1, "uid": f"uid-{stage.id}", "upstream_uids": uids, "attempts": 1}
        write_json(folder.result, result)
        write_json(folder.status, {"schema": 1, "state": "done", "attempt": 1})
        folder.weights.write_bytes(b"weights")
        checkpoint(folder, 30)
    return tree


def checkpoint(folder: StageFolder, step: int, name: str = "", *, is_whole: bool = True) -> Path:
    path = folder.checkpoints / (name or f"step_{step}")
    (path / "deepspeed").mkdir(parents=True)
    (path / "deepspeed" / "state.pt").write_bytes(b"x" * 1000)
    if is_whole:
        (path / "COMPLETE").touch()
    return path


def of_kind(tree: Tree, grid: Grid, kind: str) -> list[StageFolder]:
    return [tree.stage(kind, s.id) for s in grid.stages.values() if s.kind == kind]


def collect(tree: Tree, study: str | None = None) -> list[gc.Waste]:
    graph = gc.graph_of_all(tree)
    states = read_graph(tree, graph)
    return gc.remove(tree, gc.find(tree, graph, states, gc.stages_of(tree, study)), states)


def files(root: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_only_checkpoints_of_done_stages_go_and_no_state_changes(tree: Tree, grid: Grid) -> None:
    before, states = files(tree.root), read_states(tree, grid.stages)
    gone = collect(tree, "small")
    after = files(tree.root)
    assert {w.why for w in gone} == {"checkpoint of a done stage"}
    assert sum(w.size for w in gone) == 1000 * len(gone) > 0
    assert {p for p in before if "checkpoints" not in p.parts} == set(after)
    assert all(after[p] == before[p] for p in after)
    # The same words of every stage: what is done stays so, what waits can start from its weights.
    assert read_states(tree, grid.stages) == states
    assert {s.state for s in states.values()} == {"done", "planned", "waiting"}
    assert collect(tree) == []


def test_a_stage_that_may_go_on_keeps_its_last_checkpoint(tree: Tree, grid: Grid) -> None:
    folder = of_kind(tree, grid, "mae")[0]
    folder.result.unlink()
    write_json(folder.status, {"schema": 1, "state": "preempted", "attempt": 1})
    left = [
        checkpoint(folder, 20),
        checkpoint(folder, 40, is_whole=False),
        checkpoint(folder, 40, "step_40.partial-00ff00", is_whole=False),
    ]
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = temporary_name("weights.safetensors").split("-")
    name[-1] = f"{dead.pid}.weights.safetensors"
    left.append(folder.path / "-".join(name))
    left[-1].write_bytes(b"half of it")
    gone = {w.path: w.why for w in collect(tree) if w.stage == folder.path.name}
    assert gone == dict.fromkeys(left, "left by an attempt that was killed")
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step_30"]


def test_a_stage_that_is_to_run_again_as_its_upstream_did_keeps_it_too(
    tree: Tree, grid: Grid
) -> None:
    stale = next(s for s in grid.stages.values() if s.kind == "wsp" and s.config.upstream)
    upstream = tree.stage("mae", next(iter(stale.config.upstream.values())))
    write_json(upstream.result, {**(read_json(upstream.result) or {}), "uid": "another run"})
    assert stale.id not in {w.stage for w in collect(tree)}


@pytest.mark.parametrize("state", ["running", "submitted"])
def test_a_stage_at_work_is_untouched(tree: Tree, grid: Grid, state: str) -> None:
    folder = of_kind(tree, grid, "mae")[0]
    lease = Lease.acquire(folder.lease)
    folder.result.unlink()
    write_json(folder.status, {"schema": 1, "state": state, "attempt": 1, "host": "b:0", "pid": 1})
    checkpoint(folder, 31, "step_31.partial-00ff00", is_whole=False)
    before = files(folder.path)
    collect(tree)
    assert files(folder.path) == before
    lease.release()


def test_a_checkpoint_of_a_done_stage_goes_though_its_dead_host_left_a_lease(
    tree: Tree, grid: Grid
) -> None:
    folder = of_kind(tree, grid, "mae")[0]
    write_json(folder.lease, {"token": "t", "host": "b:0:1", "pid": 1, "started": "1", "beat": 7})
    collect(tree)
    assert folder.checkpoints.exists()
    os.utime(folder.lease, (0, 0))
    collect(tree)
    assert not folder.checkpoints.exists()


def test_a_stage_that_was_taken_between_the_look_and_the_removal_is_untouched(
    tree: Tree, grid: Grid
) -> None:
    graph = gc.graph_of_all(tree)
    states = read_graph(tree, graph)
    waste = gc.find(tree, graph, states, gc.stages_of(tree, None))
    taken, owned = of_kind(tree, grid, "mae")[:2]
    write_json(taken.status, {"schema": 1, "state": "planned", "reason": "force"})
    lease = Lease.acquire(owned.lease)
    gone = {w.stage for w in gc.remove(tree, waste, states)}
    assert gone == {w.stage for w in waste} - {taken.path.name, owned.path.name}
    lease.release()


def test_the_command_is_dry_without_yes_and_says_how_much(tree: Tree, harness: Harness) -> None:
    before = files(tree.root)
    said = json.loads(harness("gc", "small", "--json").stdout)
    assert not said["applied"]
    assert said["bytes"] == sum(len(c) for p, c in before.items() if "checkpoints" in p.parts)
    assert f"would remove {said['bytes']:,} bytes" in harness("gc").stdout
    assert files(tree.root) == before
    assert f"removed {said['bytes']:,} bytes" in harness("gc", "--yes").stdout
    assert "nothing to remove" in harness("gc").stdout
    assert not list(tree.root.glob("stages/*/*/checkpoints"))
