"""The short copy of cells.jsonl says what that file says, or is not looked at."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import NotFoundError
from harness.ledger import cell_rows, store, study_graph, summary
from harness.ledger.states import graph_of_rows
from harness.ledger.study_graph import read_study
from harness.ledger.tree import Tree
from harness.study.cells import build_grid, only
from harness.study.schema import load_study

Write = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, study_file: Write, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(study_graph, "_WORTH_KEEPING", 1)
    tree, grid = Tree(tmp_path / "runs"), build_grid(load_study(study_file()))
    store.register(tree, grid, [])
    return tree


def name_of(tree: Tree) -> str:
    (name,) = tree.studies()
    return name


def copy_of(tree: Tree) -> Path:
    return tree.index / f"{name_of(tree)}.graph.json"


def assert_is_the_file(tree: Tree) -> None:
    rows = cell_rows.read_cells(tree, name_of(tree))
    found = read_study(tree, name_of(tree))
    wanted = {s: (n.kind, n.upstream) for s, n in graph_of_rows(rows).items()}
    assert {s: (n.kind, n.upstream) for s, n in found.nodes.items()} == wanted
    assert list(found.nodes) == list(wanted)
    assert found.cells == [tuple(row["stages"].values()) for row in rows]


def test_the_copy_is_written_once_and_says_the_same(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not copy_of(tree).exists()
    assert_is_the_file(tree)
    whole = summary.summarise(tree)
    assert copy_of(tree).exists()
    assert_is_the_file(tree)

    def refuse(*_: object) -> None:
        raise AssertionError("the long file was read")

    monkeypatch.setattr(cell_rows, "read_cells", refuse)
    assert summary.summarise(tree) == whole


def test_another_submission_makes_another_copy(tree: Tree, study_file: Write) -> None:
    assert_is_the_file(tree)
    old = read_study(tree, name_of(tree))
    grid = build_grid(load_study(study_file()))
    store.register(tree, only(grid, grid.cells[:2]), [])
    assert_is_the_file(tree)
    assert len(read_study(tree, name_of(tree)).nodes) < len(old.nodes)


@pytest.mark.parametrize("damage", ["cut", "rubbish", "schema", "places", "kinds"])
def test_a_damaged_copy_does_not_count(tree: Tree, damage: str) -> None:
    assert_is_the_file(tree)
    path = copy_of(tree)
    content = json.loads(path.read_bytes())
    if damage == "schema":
        content["schema"] = 99
    elif damage == "places":
        content["cells"][0] = [10**6]
    elif damage == "kinds":
        content["kind"] = content["kind"][:-1]
    raw = json.dumps(content).encode()
    path.write_bytes({"cut": raw[: len(raw) // 2], "rubbish": b"\xff\x00"}.get(damage, raw))
    assert_is_the_file(tree)


def test_a_study_that_is_gone_is_not_there(tree: Tree) -> None:
    name = name_of(tree)
    assert_is_the_file(tree)
    os.rename(tree.study(name), tree.root / "elsewhere")
    with pytest.raises(NotFoundError, match=name):
        read_study(tree, name)


def test_who_may_not_write_reads_the_long_file(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(study_graph, "write_bytes", refuse)
    assert_is_the_file(tree)
    assert not copy_of(tree).exists()
