"""A stage that would run says what of it is new, or what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli.why import why
from harness.ledger import store
from harness.ledger.files import write_json
from harness.ledger.states import read_states
from harness.ledger.tree import Tree
from harness.ledger.why import Why, reasons
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL

Write = Callable[..., Path]


def finish_all(tree: Tree, grid: Grid) -> None:
    for stage in grid.stages.values():
        folder = store.write_stage(tree, stage)
        uids = {u: f"uid-{u}" for u in stage.config.upstream.values()}
        write_json(folder.result, {"uid": f"uid-{stage.id}", "upstream_uids": uids})
        write_json(folder.status, {"state": "done", "attempt": 1})


def found(tree: Tree, grid: Grid) -> dict[str, Why]:
    return {w.stage: w for w in reasons(tree, grid.stages, read_states(tree, grid.stages))}


def test_of_a_changed_recipe_the_field_is_named_and_once(tmp_path: Path, study_file: Write) -> None:
    tree, old = Tree(tmp_path / "runs"), build_grid(load_study(study_file()))
    assert {w.text.split(":")[0] for w in found(tree, old).values()} == {"new"}
    assert all(w.nearest is None for w in found(tree, old).values())
    finish_all(tree, old)
    assert found(tree, old) == {}
    text = SMALL.replace(
        "stages:", "overrides:\n- {match: {init: mae}, set: {wsp.lr: 0.5}}\nstages:"
    )
    new = build_grid(load_study(study_file(text, "new.yaml")))
    told = found(tree, new)
    assert set(told) == set(new.stages) - set(old.stages)
    for stage_id, w in told.items():
        config = new.stages[stage_id].config
        if w.kind == "wsp":
            assert w.text == "new" and w.nearest in old.stages
            assert [line.split(":")[0] for line in w.diff] == ["recipe.lr"]
            assert w.diff[0].endswith("-> 0.5")
        else:
            (upstream,) = config.upstream.values()
            assert w.text == f"new: it starts from {upstream}, which is new"
            assert (w.nearest, w.diff) == (None, [])


def test_what_has_begun_says_what_became_of_it(tmp_path: Path, study_file: Write) -> None:
    tree, grid = Tree(tmp_path / "runs"), build_grid(load_study(study_file()))
    finish_all(tree, grid)
    mae = next(s for s in grid.stages.values() if s.kind == "mae")
    behind = [s.id for s in grid.stages.values() if mae.id in s.config.upstream.values()]
    write_json(tree.stage("mae", mae.id).result, {"uid": "another", "upstream_uids": {}})
    told = found(tree, grid)
    assert mae.id not in told
    assert all("would run again: its upstream stage was run again" in told[s].text for s in behind)
    tree.stage("mae", mae.id).result.unlink()
    failed = {
        "state": "failed",
        "attempt": 1,
        "reason": "data",
        "message": "shard-3.tar is damaged",
    }
    write_json(tree.stage("mae", mae.id).status, failed)
    told = found(tree, grid)
    assert told[mae.id].text == "data: shard-3.tar is damaged"
    assert all(told[s].state == "blocked" for s in behind)


def test_the_command_prints_it_and_the_json_has_all(
    tmp_path: Path, study_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = study_file(), tmp_path / "runs"
    grid = build_grid(load_study(file))
    assert why(file=file, selection=["init=mae"], root=root) == 0
    shown = capsys.readouterr().out.splitlines()
    wanted = {s for c in grid.cells if c.axes["init"] == "mae" for s in c.stages.values()}
    assert {line.split()[0] for line in shown} == wanted
    assert why(file=file, as_json=True, root=root) == 0
    assert {w["stage"] for w in json.loads(capsys.readouterr().out)["stages"]} == set(grid.stages)
    finish_all(Tree(root), grid)
    assert why(file=file, root=root) == 0
    assert capsys.readouterr().out == "nothing would run: all stages are done\n"
