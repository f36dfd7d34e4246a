"""Several commands write down one study at a time, and nothing that one of them added is lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.ledger import cell_rows, store
from harness.ledger.tree import Tree
from harness.study.cells import Ablation, Grid, build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL

Write = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "runs")


@pytest.fixture
def grid(tree: Tree, study_file: Write) -> Grid:
    grid = build_grid(load_study(study_file()))
    store.register(tree, grid, [])
    return grid


def ablation(grid: Grid, number: int) -> Ablation:
    parent = grid.cells[0]
    changed = {"wsp.lr": 1e-4 * (number + 1)}
    return Ablation(parent=parent.id, values=parent.axes, set=changed, tag=f"t{number}")


def tags(tree: Tree) -> list[str | None]:
    """Of the ablations among the cells, as both files say."""
    found = [a.tag for a in store.read_ablations(tree, "small")]
    rows = cell_rows.read_cells(tree, "small")
    assert [row["tag"] for row in rows if row["parent"]] == found
    return found


@pytest.mark.parametrize("verb", ["run", "grid"])
def test_ablations_added_at_once_are_all_there(tree: Tree, grid: Grid, verb: str) -> None:
    def add(number: int) -> None:
        new = [ablation(grid, number)]
        if verb == "run":
            store.add_ablations(tree, "small", new)
        else:  # a study that was read before the others wrote
            store.register(tree, build_grid(grid.loaded, new), new)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert sorted(map(str, tags(tree))) == [f"t{n}" for n in range(8)]
    before = tags(tree)
    add(3)
    assert tags(tree) == before
    assert not (tree.study("small") / "changing").exists()


def test_a_submission_keeps_what_was_added_since_it_read_the_study(tree: Tree, grid: Grid) -> None:
    first, second, third = (ablation(grid, n) for n in (2, 0, 1))
    store.add_ablations(tree, "small", [first])
    stale = [first, third]
    store.add_ablations(tree, "small", [second])
    store.register(tree, build_grid(grid.loaded, stale), stale)
    assert tags(tree) == ["t2", "t0", "t1"]
    assert len(cell_rows.read_cells(tree, "small")) == len(grid.cells) + 3


def test_an_ablation_is_added_to_the_study_as_it_is_by_now(
    tree: Tree, grid: Grid, study_file: Write
) -> None:
    changed = study_file(SMALL.replace("[1k, 4k]", "[1k, 2k, 4k]"))
    larger = build_grid(load_study(changed))
    store.register(tree, larger, [])
    text = (tree.study("small") / "study.yaml").read_bytes()
    store.add_ablations(tree, "small", [ablation(grid, 0)])
    rows = cell_rows.read_cells(tree, "small")
    assert {c.id for c in larger.cells} < {row["id"] for row in rows}
    assert (tree.study("small") / "study.yaml").read_bytes() == text


def test_the_file_is_kept_as_it_was_read(tree: Tree, study_file: Write) -> None:
    path = study_file()
    grid = build_grid(load_study(path))
    study_file(SMALL.replace("[1k, 4k]", "[2k]"))
    store.register(tree, grid, [])
    assert (tree.study("small") / "study.yaml").read_text() == SMALL
