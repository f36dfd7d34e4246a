"""Two cells side by side: what they share is said once, what differs by name, and by how much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli.diff import diff
from harness.ledger import store
from harness.ledger.files import write_json
from harness.ledger.tree import Tree
from harness.study.cells import Ablation, Cell, Grid, build_grid
from harness.study.schema import load_study

Write = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path, study_file: Write) -> tuple[Tree, Grid, Cell, Cell]:
    """A cell and its ablation, registered; nothing has begun."""
    loaded = load_study(study_file())
    parent = next(c for c in build_grid(loaded).cells if c.axes["init"] == "mae")
    values = {k: v for k, v in parent.axes.items()}
    changed = Ablation(parent=parent.id, values=values, set={"wsp.lr": 0.5}, tag="high")
    grid = build_grid(loaded, [changed])
    tree = Tree(tmp_path / "runs")
    store.register(tree, grid, [changed])
    own = next(c for c in grid.cells if c.tag == "high")
    return tree, grid, next(c for c in grid.cells if c.id == parent.id), own


def finish(tree: Tree, grid: Grid, stage_id: str, code: str, **metrics: float) -> None:
    stage = grid.stages[stage_id]
    folder = store.write_stage(tree, stage)
    uids = {u: f"uid-{u}" for u in stage.config.upstream.values()}
    about = {"uid": f"uid-{stage_id}", "upstream_uids": uids, "attempts": 1, "metrics": metrics}
    write_json(folder.result, about)
    write_json(folder.status, {"state": "done", "attempt": 1})
    write_json(folder.attempt(1) / "git.json", {"sha": code, "code": code})


def shown(tree: Tree, a: Cell, b: Cell, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert diff(first=a.id, second=b.id, as_json=True, root=tree.root) == 0
    return json.loads(capsys.readouterr().out)


def test_an_ablation_differs_from_its_parent_in_what_was_set(
    study: tuple[Tree, Grid, Cell, Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    tree, grid, parent, own = study
    assert shown(tree, parent, own, capsys)["axes"] == ["wsp.lr: (default) -> 0.5"]
    finish(tree, grid, parent.stages["mae"], "aaa")
    finish(tree, grid, parent.stages["wsp"], "aaa", val_loss=0.25)
    finish(tree, grid, own.stages["wsp"], "bbb", val_loss=0.75)
    stages = {s["role"]: s for s in shown(tree, parent, own, capsys)["stages"]}
    assert list(stages) == list(parent.stages)
    assert stages["mae"]["stages"] == [parent.stages["mae"]] * 2
    assert [line.split(":")[0] for line in stages["wsp"]["fields"]] == ["recipe.lr"]
    assert stages["wsp"]["code"] == ["aaa", "bbb"]
    assert stages["wsp"]["metrics"] == {"val_loss": [0.25, 0.75]}
    assert stages["probe"]["metrics"] == {} and stages["probe"]["fields"] == []


def test_people_read_what_is_shared_what_differs_and_the_difference(
    study: tuple[Tree, Grid, Cell, Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    tree, grid, parent, own = study
    finish(tree, grid, parent.stages["mae"], "aaa")
    finish(tree, grid, parent.stages["wsp"], "aaa", val_loss=0.25)
    finish(tree, grid, own.stages["wsp"], "bbb", val_loss=0.75)
    assert diff(first=parent.name, second="high", root=tree.root) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"mae: both use {parent.stages['mae']} (done)" in lines
    assert "code: aaa -> bbb" in lines
    assert "val_loss 0.25 0.75 +0.5" in lines
    assert any(line.startswith("recipe.lr: ") and line.endswith("-> 0.5") for line in lines)
