"""Which stages `cancel`, `resume` and `retry` act on: nothing of these studies is ever trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.cli import shared
from harness.launch import commands
from harness.ledger import cell_rows, store
from harness.ledger.files import write_json
from harness.ledger.lease import Lease
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Cell, Grid, build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL, Harness
from tests.launch.fake_slurm import FakeSlurm

Register = Callable[..., Grid]


@pytest.fixture
def register(tree: Tree, study_file: Callable[..., Path]) -> Register:
    """Submits a small study of a name, but for running it."""

    def write(name: str, text: str = SMALL) -> Grid:
        file = study_file(text.replace("name: small", f"name: {name}"), f"{name}.yaml")
        grid = build_grid(load_study(file))
        store.register(tree, grid, [])
        return grid

    return write


@pytest.fixture
def owned() -> Iterator[Callable[[StageFolder], None]]:
    """Makes this process the worker of stages."""
    leases: list[Lease] = []

    def own(folder: StageFolder) -> None:
        leases.append(Lease.acquire(folder.lease))
        write_json(folder.status, {"schema": 1, "state": "running", "attempt": 1})

    yield own
    for lease in leases:
        lease.release()


def cell(grid: Grid, name: str) -> Cell:
    return next(c for c in grid.cells if c.name == name)


def folder(tree: Tree, grid: Grid, stage: str) -> StageFolder:
    return store.write_stage(tree, grid.stages[stage])


def stopped(tree: Tree) -> set[str]:
    return {p.parent.name for p in tree.root.glob("stages/*/*/stop.json")}


def shared_mae(grid: Grid) -> tuple[str, list[Cell]]:
    """A MAE stage that several cells need, and these cells."""
    stage = next(s for s, n in grid.feeds.items() if n > 1 and grid.stages[s].kind == "mae")
    return stage, [c for c in grid.cells if stage in c.stages.values()]


# Both inits of the weak supervision begin at the same MAE stage.
SHARED = SMALL.replace("init: [random, mae]", "init: [mae]\n  wsp.lr: [1e-3, 2e-3]")


def test_a_filter_by_state_cancels_what_is_in_it(
    tree: Tree, register: Register, owned: Callable[[StageFolder], None], here: Harness
) -> None:
    grid = register("one", SHARED)
    stage, cells = shared_mae(grid)
    owned(folder(tree, grid, stage))
    # Of these axes not all cells that need it are.
    some = f"wsp.lr={cells[0].axes['wsp.lr']},state=running"
    assert "1 stages feed cells that were not selected" in here("cancel", some).stdout
    assert stopped(tree) == set()
    here("cancel", f"size={cells[0].axes['size']},state=running")
    assert stopped(tree) == {stage}
    (tree.stage("mae", stage).stop).unlink()
    here("cancel", "state=running")
    assert stopped(tree) == {stage}


def test_a_stage_asked_for_beside_a_cell_frees_none_of_the_cell(
    tree: Tree, register: Register, here: Harness
) -> None:
    grid = register("one", SHARED)
    stage, cells = shared_mae(grid)
    here("cancel", cells[0].id, "stage=probe", "--yes")
    probes = {c.stages["probe"] for c in grid.cells}
    assert stopped(tree) == probes | set(cells[0].stages.values()) - {stage}
    here("cancel", stage[:-3])
    assert stage in stopped(tree)


def test_a_cell_beside_a_state_frees_no_stage_in_another(
    tree: Tree, register: Register, owned: Callable[[StageFolder], None], here: Harness
) -> None:
    grid = register("one", SHARED)
    stage, cells = shared_mae(grid)
    other = next(s for s in grid.stages.values() if s.kind == "mae" and s.id != stage)
    owned(folder(tree, grid, other.id))
    here("cancel", cells[0].id, "state=running")
    assert stopped(tree) == {other.id} | set(cells[0].stages.values()) - {stage}


def test_what_another_study_needs_is_spared(tree: Tree, register: Register, here: Harness) -> None:
    one = register("one")
    two = register("two", SMALL.replace("[1k, 4k]", "[1k]").replace("probe:", "other:"))
    both = set(one.stages) & set(two.stages)
    kinds = {one.stages[s].kind for s in both}
    assert {"mae", "wsp"} <= kinds
    said = here("cancel", "init=mae", "--study", "one", "--yes").stdout
    of_mae = {s for c in one.cells if c.axes["init"] == "mae" for s in c.stages.values()}
    assert stopped(tree) == of_mae - both
    assert f"{len(of_mae & both)} stages feed cells that were not selected" in said
    here("cancel", "init=mae", "--yes")
    assert of_mae <= stopped(tree)


def test_a_selector_counts_where_it_means_something(
    tree: Tree, register: Register, here: Harness
) -> None:
    register("one", SMALL.replace("init: [random, mae]", "init: [random]"))
    two = register("two", SHARED)
    assert "would cancel" in here("cancel", "wsp.lr=1e-3", "--dry-run").stdout  # no axis of one
    here("cancel", "stage=mae")  # no stage of one
    assert stopped(tree) == {s.id for s in two.stages.values() if s.kind == "mae"}
    done = here("cancel", "wsp.lr=7", check=4)
    assert "selector 'wsp.lr=7' matches no cell; wsp.lr has 0.001, 0.002" in done.stderr
    assert "no axis" not in done.stderr
    done = here("cancel", "siez=d16x2", check=2)
    assert done.stderr == "selector: no axis 'siez'; did you mean 'size'?\n"
    assert "no stage 'maee'; stages: " in here("cancel", "stage=maee", check=2).stderr
    assert "'d1-' means no stage" in here("cancel", "stage=mae", "d1-", check=4).stderr


def test_a_study_that_cannot_be_read_is_passed_over(
    tree: Tree, register: Register, here: Harness
) -> None:
    register("one")
    two = register("two")
    path = tree.study("one") / "study.yaml"
    path.write_text(path.read_text().replace("scenes-4k", "/gone/images"))
    ids = {s.id for s in two.stages.values() if s.kind == "mae"}
    for stage in ids:
        failed = {"schema": 1, "state": "failed", "attempt": 1}
        write_json(folder(tree, two, stage).status, failed)
    done = here("retry", "stage=mae", "--no-submit")
    assert {line.split()[1] for line in done.stdout.splitlines()} == ids
    (line,) = done.stderr.splitlines()
    assert line.startswith("study one cannot be read: ") and line.endswith("it is passed over")
    assert "/gone/images" in line
    alone = here("retry", "stage=mae", "--study", "one", "--no-submit", check=2)
    assert "study one cannot be read: " in alone.stderr and "passed over" not in alone.stderr


def test_a_study_whose_images_are_gone_can_still_be_cancelled(
    tree: Tree, register: Register, here: Harness, owned: Callable[[StageFolder], None]
) -> None:
    one = register("one", SHARED)
    path = tree.study("one") / "study.yaml"
    path.write_text(path.read_text().replace("scenes-4k", "/gone/images"))
    stage, _ = shared_mae(one)
    owned(folder(tree, one, stage))
    done = here("cancel", "state=running", "wsp.lr=1e-3,stage=wsp")
    (line,) = done.stderr.splitlines()
    assert line.startswith("study one cannot be read: ") and line.endswith("as they were submitted")
    wsp = {c.stages["wsp"] for c in one.cells if c.axes["wsp.lr"] == 1e-3}
    assert stopped(tree) == {stage, *wsp}
    # Nobody has begun the second: held all the same, once the images are back.
    path.write_text(path.read_text().replace("/gone/images", "scenes-4k"))
    rows = json.loads(here("status", "one", "--json").stdout)["studies"][0]["stages"]
    assert {r["id"] for r in rows if r["state"] == "cancelled"} == wsp


def test_a_stage_that_one_of_its_studies_still_describes_is_written_down(
    tree: Tree, register: Register, here: Harness
) -> None:
    two = register("one") and register("two")
    path = tree.study("one") / "study.yaml"
    path.write_text(path.read_text().replace("scenes-4k", "/gone/images"))
    here("cancel", "stage=mae")
    stages = [s for s in two.stages.values() if s.kind == "mae"]
    assert stages
    for stage in stages:
        assert store.read_stage(tree.stage("mae", stage.id)) == stage


def test_a_stage_of_two_studies_is_retried_once(
    tree: Tree, register: Register, here: Harness
) -> None:
    grid = register("one")
    register("two")
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    write_json(folder(tree, grid, stage.id).status, {"schema": 1, "state": "failed", "attempt": 1})
    done = here("retry", "state=failed", "--no-submit")
    assert done.stdout == f"retry {stage.id}  (failed)\n" and done.stderr == ""


def queued(tree: Tree, grid: Grid, **about: str) -> str:
    """A MAE stage whose job waits in a queue."""
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    status = {"state": "submitted", "attempt": 1, "cluster": "slurm", "job": "77", "token": "t"}
    write_json(folder(tree, grid, stage.id).status, {"schema": 1, **status, **about})
    return stage.id


def test_without_scancel_a_note_is_left_and_the_job_is_named(
    tree: Tree, register: Register, here: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tree.root))
    monkeypatch.setattr(commands, "_config", dict)
    stage = queued(tree, register("one"), site="lab")
    done = here("cancel", stage)
    assert stopped(tree) == {stage}
    assert done.stderr == (
        "job 77: in the queue of lab until started, and over at once then; or `scancel 77` there\n"
    )


def test_a_job_of_another_cluster_is_left_to_it(
    tree: Tree, register: Register, here: Harness, site: FakeSlurm
) -> None:
    site.holds(("77", "t.0"))
    stage = queued(tree, register("one"), site="elsewhere")
    assert "in the queue of elsewhere until" in here("cancel", stage).stderr
    assert stopped(tree) == {stage} and site.calls("scancel") == 0
    queued(tree, register("one"), site="lab")
    tree.stage("mae", stage).stop.unlink()
    assert here("cancel", stage).stderr == ""
    assert (site.folder / "scancel.calls").read_text() == "--quiet 77\n"


def test_jobs_of_one_number_on_two_clusters_are_two(
    tree: Tree, register: Register, here: Harness, site: FakeSlurm
) -> None:
    site.holds(("77", "t.0"))
    grid = register("one", SHARED)
    wsp = [s.id for s in grid.stages.values() if s.kind == "wsp"]
    for stage, place in zip(wsp, ("elsewhere", "lab", "elsewhere"), strict=False):
        status = {"state": "submitted", "attempt": 1, "cluster": "slurm", "job": "77", "token": "t"}
        write_json(folder(tree, grid, stage).status, {"schema": 1, **status, "site": place})
    done = here("cancel", *wsp[:3])
    assert done.stderr.startswith("job 77: in the queue of elsewhere until")
    assert (site.folder / "scancel.calls").read_text() == "--quiet 77\n"


def test_a_note_is_taken_back_from_a_stage_that_still_runs(
    tree: Tree, register: Register, owned: Callable[[StageFolder], None], here: Harness
) -> None:
    grid = register("one")
    stage = next(s.id for s in grid.stages.values() if s.kind == "mae")
    owned(folder(tree, grid, stage))
    here("cancel", stage)
    assert here("resume", stage, "--no-submit").stdout == f"resume {stage}  (running)\n"
    assert stopped(tree) == set()
    assert "nothing to resume" in here("resume", stage, "--no-submit").stdout


def test_a_cell_of_two_studies_is_one_cell_to_read_and_two_to_run(
    tree: Tree, register: Register, here: Harness
) -> None:
    cells = register("one").cells
    register("two")
    register("three", SMALL.replace("samples: 2k}\n  transfer", "samples: 3k}\n  transfer"))
    for text in (cells[0].id, cells[0].id[:-2]):
        assert f"no attempt of {cells[0].name} has a log" in here("logs", text).stderr
        done = here("run", text, check=2)
        assert done.stderr == f"cell '{cells[0].id}' is in studies one and two; add --study one\n"
    done = here("logs", cells[0].name, check=2)  # by this name there are two
    assert f"'{cells[0].name}' is in studies one and three and two; add" in done.stderr
    assert "means 8 cells" in here("logs", "d16x2", check=2).stderr


def test_stages_that_were_left_out_are_named_and_can_be_cancelled(
    tree: Tree,
    register: Register,
    owned: Callable[[StageFolder], None],
    here: Harness,
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = register("one")
    active = [s for s in whole.stages.values() if s.kind == "wsp" and s.config.size == "d32x3"]
    for stage in active:
        owned(folder(tree, whole, stage.id))
    register("other", SMALL.replace("data: [1k, 4k]", "data: [1k]"))  # needs some of them
    needed = cell_rows.stages_needed(tree, ["other"])
    loose = [s.id for s in active if s.id not in needed]
    assert 0 < len(loose) < len(active)

    text = SMALL.replace("name: small", "name: one").replace("[d16x2, d32x3]", "[d16x2]")
    rest = build_grid(load_study(study_file(text, "one.yaml")))
    assert set(rest.stages) < set(whole.stages)
    shared.register(tree, rest, [])
    assert capsys.readouterr().err == (
        f"{len(loose)} stages that are no longer in the study still run or wait:"
        f" {', '.join(loose)}; `harness cancel ID` stops them\n"
    )
    shared.register(tree, rest, [])
    assert capsys.readouterr().err == ""
    first, *others = loose
    assert here("cancel", first).stdout == f"cancel {first}  (running)\n"
    assert stopped(tree) == {first}
    done = here("cancel", *(s[:-2] for s in others), "state=running", "--json")
    stages = [s for s in json.loads(done.stdout)["stages"] if s["study"] is None]
    assert [(s["id"], s["kind"]) for s in stages] == [(s, "wsp") for s in others]
    assert stopped(tree) >= set(loose)
    assert "means no stage" in here("resume", first, check=4).stderr
    assert "a selector is empty" in here("cancel", "", check=2).stderr


def test_a_cancelled_stage_keeps_what_it_was_submitted_with(
    tree: Tree, register: Register, here: Harness
) -> None:
    grid = register("one")
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    on_gpu = stage.execution.model_copy(update={"device": "cuda", "zero_config": "/kept/z.json"})
    submitted = stage.model_copy(update={"execution": on_gpu})
    path = store.write_stage(tree, submitted)
    here("cancel", stage.id)
    assert stopped(tree) == {stage.id} and store.read_stage(path) == submitted
