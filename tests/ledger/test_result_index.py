"""The index of results is a cache: with it or without, states are the same."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli.status import status
from harness.ledger import index, store
from harness.ledger.files import write_json
from harness.ledger.speeds import measured_speeds
from harness.ledger.states import graph_of, graph_of_rows, read_graph, read_states
from harness.ledger.tree import Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study

Write = Callable[..., Path]


@pytest.fixture
def grid(study_file: Write) -> Grid:
    return build_grid(load_study(study_file()))


@pytest.fixture(autouse=True)
def always_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_WORTH_KEEPING", 1)


def finish(tree: Tree, grid: Grid, stage_id: str, uid: str) -> None:
    stage = grid.stages[stage_id]
    folder = store.write_stage(tree, stage)
    uids = {}
    for upstream in stage.config.upstream.values():
        path = tree.stage(grid.stages[upstream].kind, upstream).result
        uids[upstream] = json.loads(path.read_text())["uid"] if path.exists() else "none"
    write_json(folder.result, {"uid": uid, "upstream_uids": uids, "metrics": {"loss": 1.0}})
    write_json(folder.status, {"state": "done", "attempt": 1})


def as_a_new_process() -> None:
    index._read.clear()


def without_index(tree: Tree, grid: Grid) -> dict[str, str]:
    as_a_new_process()
    shutil.rmtree(tree.root / "index", ignore_errors=True)
    return {k: v.state for k, v in read_states(tree, grid.stages).items()}


def test_whatever_happens_states_are_those_of_the_files(tmp_path: Path, grid: Grid) -> None:
    (tmp_path / "with").mkdir()
    tree, rng, ids = Tree(tmp_path / "with"), random.Random(0), list(grid.stages)
    seen = set()
    for turn in range(150):
        stage_id = rng.choice(ids)
        folder = tree.stage(grid.stages[stage_id].kind, stage_id)
        what = rng.choice(["finish", "finish", "finish", "fail", "unlink", "remove", "rubbish"])
        if what == "finish":
            finish(tree, grid, stage_id, uid=f"{turn:04d}")
        elif what == "fail":
            folder.result.unlink(missing_ok=True)
            write_json(folder.status, {"state": "failed", "attempt": 2})
        elif what == "unlink":
            folder.result.unlink(missing_ok=True)
        elif what == "remove":
            shutil.rmtree(folder.path, ignore_errors=True)
        elif (tree.root / "index").exists():
            for path in (tree.root / "index").iterdir():
                path.write_bytes(path.read_bytes()[: rng.randrange(200)])
        if rng.random() < 0.5:
            as_a_new_process()
        found = {k: v.state for k, v in read_states(tree, grid.stages).items()}
        seen |= set(found.values())
        copy = Tree(tmp_path / "without")
        shutil.rmtree(copy.root, ignore_errors=True)
        shutil.copytree(tree.root, copy.root)
        kept = dict(index._read)
        assert found == without_index(copy, grid)
        index._read.update(kept)
    assert {"done", "planned", "waiting", "failed", "blocked"} <= seen


def test_a_row_is_used_without_reading_the_result_again(tmp_path: Path, grid: Grid) -> None:
    tree = Tree(tmp_path)
    for stage_id in grid.stages:
        finish(tree, grid, stage_id, uid=stage_id)
    assert {v.state for v in read_states(tree, grid.stages).values()} == {"done"}
    as_a_new_process()
    path = next((tmp_path / "index").iterdir())
    content = json.loads(path.read_text())
    stage_id, place = content["stages"][0], content["keys"].index("rest")
    content["columns"][place][0] = '{"metrics":{"loss":123.0}}'
    path.write_text(json.dumps(content))
    assert (read_states(tree, grid.stages)[stage_id].result or {})["metrics"] == {"loss": 123.0}


def test_rows_of_cells_give_the_same_graph_as_the_stages(tmp_path: Path, grid: Grid) -> None:
    rows = [store.cell_row(cell, grid) for cell in grid.cells]
    graph = graph_of_rows(rows)
    wanted = {s: (n.kind, n.upstream) for s, n in graph_of(grid.stages).items()}
    assert graph == wanted
    done: set[str] = set()
    for stage_id, node in graph.items():
        assert set(node.upstream) <= done, "a stage stands before what it rests on"
        done.add(stage_id)
    assert read_graph(Tree(tmp_path), graph) == read_states(Tree(tmp_path), grid.stages)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("rest", "x"),
        ("rest", "[]"),
        ("total_s", "2"),
        ("attempts", [1]),
        ("flops", "many"),
        ("upstream_uids", []),
        ("told", 1),
    ],
)
def test_an_index_that_somebody_edited_ends_no_command(
    tmp_path: Path, grid: Grid, column: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = Tree(tmp_path)
    store.register(tree, grid, [])
    for stage_id in grid.stages:
        finish(tree, grid, stage_id, uid=stage_id)
    read_states(tree, grid.stages)
    for path in (tmp_path / "index").glob("*.json"):
        content = json.loads(path.read_text())
        if "columns" in content:
            content["columns"][content["keys"].index(column)][0] = value
            path.write_text(json.dumps(content))
    as_a_new_process()
    assert {v.state for v in read_states(tree, grid.stages).values()} == {"done"}
    as_a_new_process()
    assert status(study=None, as_json=True, root=tmp_path) == 0
    capsys.readouterr()
    measured_speeds(tree, "cpu")


@pytest.mark.parametrize(
    "odd",
    [
        {"wall_s": [1]},
        {"wall_s": {"total": "2", "harness": 1.0}},
        {"wall_s": {"total": -2.0}, "flops": 1e9},
        {"attempts": [1]},
        {"size": ["b"]},
        {"metrics": {"a": "\ud800", "b": float("nan"), "c": 2**70}},
        {"metrics": None, "flops": 10**400},
    ],
)
def test_an_odd_result_ends_no_command(
    tmp_path: Path, grid: Grid, odd: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = Tree(tmp_path)
    store.register(tree, grid, [])
    for stage_id, stage in grid.stages.items():
        finish(tree, grid, stage_id, uid=stage_id)
        folder = tree.stage(stage.kind, stage_id)
        about = json.loads(folder.result.read_text()) | {"kind": stage.kind, "size": "b"} | odd
        folder.result.write_text(json.dumps(about))
    for _ in range(2):  # from the files, and from the index
        as_a_new_process()
        assert status(study=None, as_json=True, root=tmp_path) == 0
        assert '"done"' in capsys.readouterr().out
        speeds = measured_speeds(tree, "cpu")
        assert all(speed > 0 for speed in speeds.flops_per_s.values())
