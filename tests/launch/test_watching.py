"""What watchers are told of stages that nobody runs, and when they stop waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import logs, shared, show_study, status, steer, tune
from harness.errors import UserError
from harness.launch.modes import Mode
from harness.launch.progress import Summary
from harness.ledger import attempts, store, summary
from harness.ledger.files import write_json
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "runs")


@pytest.fixture
def grid(tree: Tree, study_file: Callable[..., Path]) -> Grid:
    text = SMALL.replace("name: small", 'name: small\nquestion: "why\\x1b[31m not"')
    grid = build_grid(load_study(study_file(text)))
    store.register(tree, grid, [])
    return grid


def ended(tree: Tree, grid: Grid, kind: str, state: str, message: str) -> StageFolder:
    stage = next(s for s in grid.stages.values() if s.kind == kind)
    folder = store.write_stage(tree, stage)
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    attempts.close(folder, number, state, state, message)
    return folder


def shown(tree: Tree, capsys: pytest.CaptureFixture[str]) -> str:
    assert status.status(study="small", watch=False, as_json=False, root=tree.root) == 0
    return capsys.readouterr().out


def test_status_says_why_a_stage_is_not_running(
    tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ended(tree, grid, "mae", "preempted", "the node is wanted")
    lines = shown(tree, capsys).splitlines()
    (own,) = [line for line in lines if line.startswith(f"  preempted {folder.path.name}")]
    assert "the node is wanted" in own
    waiting = [line for line in lines if line.startswith("  waiting ")]
    assert waiting and all("waits for" in line or "more waiting" in line for line in waiting)


def test_status_says_of_a_lost_stage_what_is_known(
    tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    write_json(store.write_stage(tree, stage).status, {"state": "running", "attempt": 1})
    lines = shown(tree, capsys).splitlines()
    assert f"  lost {stage.id}  its process is gone without a word" in lines


def test_of_many_stages_in_a_queue_ten_are_shown(
    tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    # Slurm is not asked about what another user submitted.
    about = {"state": "submitted", "attempt": 1, "cluster": "slurm", "user": "somebody else"}
    for number, stage in enumerate(grid.stages.values()):
        write_json(store.write_stage(tree, stage).status, {**about, "job": str(number)})
    lines = [line for line in shown(tree, capsys).splitlines() if "submitted" in line]
    assert sum(line.startswith("  submitted ") for line in lines) == 10
    assert f"  ... and {len(grid.stages) - 10} more submitted; --json has all" in lines
    found = summary.summarise(tree)["studies"][0]
    assert len(found["running"]) == len(grid.stages) > 10 and found["active"]


def test_what_a_message_tells_the_terminal_is_shown_not_done(
    tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tree, grid, "mae", "failed", "bad \x1b[2Jthing [bold]")
    said = shown(tree, capsys)
    assert "\x1b[2J" not in said and r"bad \x1b[2Jthing [bold]" in said


def test_following_ends_when_nobody_runs_the_cell(
    tree: Tree,
    grid: Grid,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "_QUIET_S", 0.0)
    monkeypatch.setattr(status, "_QUIET_S", 0.0)
    folder = ended(tree, grid, "mae", "lost", "its node is gone")
    cell = next(c for c in grid.cells if folder.path.name in c.stages.values())
    assert logs.logs(cell=cell.name, stage="mae", follow=True, study=None, root=tree.root) == 0
    assert "nobody runs this cell now: mae is lost" in capsys.readouterr().err
    assert status.status(study="small", watch=True, as_json=False, root=tree.root) == 0


def test_the_last_lines_of_an_attempt_are_printed_before_the_next_one(
    tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printer = ended(tree, grid, "mae", "preempted", "put back"), logs._Printer()
    log = folder.attempt(1) / "stdout.log"
    log.write_text("one\n")
    printer.print_new("mae", folder)
    log.write_text("one\ntwo\n")
    attempts.begin(folder, folder.new_attempt(), {"job": "12_3", "token": "small.1"})
    (folder.attempt(2) / "stdout.log").write_text("three\n")
    jobs = tree.root / "slurm" / "small.1" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "12_3_0_log.out").touch()
    printer.print_new("mae", folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("one", "two", "three")] == ["one", "two", "three"]
    assert f"   job 12_3: {jobs / '12_3_0_log.out'}" in lines


def test_a_search_and_a_stop_at_the_first_failure_need_a_command_that_stays(
    tree: Tree, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("cluster: lab\nprofiles: {lab: {kind: slurm}}\n")
    monkeypatch.setenv("HARNESS_SETTINGS", str(settings))
    monkeypatch.delenv("HARNESS_CLUSTER", raising=False)
    with pytest.raises(UserError, match=r"'lab' is a Slurm cluster.*--cluster local"):
        tune._profile(None, "cached")
    monkeypatch.setenv("HARNESS_CLUSTER", "lab")
    with pytest.raises(UserError, match="'lab' is a Slurm cluster"):
        tune._profile(None, "cached")
    assert tune._profile("local", "cached").kind == "local"
    machine, plan = shared.plan(tree, grid, cluster="local")
    with pytest.raises(UserError, match="--fail-fast: on cluster 'lab'"):
        shared.submit(tree, grid, machine, plan, "cached", "lab", fail_fast=True)


def test_more_than_ten_stages_are_only_named_without_yes(
    tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    def cancel(*, yes: bool, dry: bool = False) -> int:
        about = {"shared_too": False, "study": None, "as_json": False, "root": tree.root}
        return steer.cancel(["size=d16x2"], yes=yes, dry=dry, **about)

    assert cancel(yes=False) == 2
    said = capsys.readouterr().out
    assert said.count("would cancel") > 10 and "add --yes" in said
    assert cancel(yes=True, dry=True) == 0
    assert not list(tree.root.glob("stages/*/*/stop.json"))
    assert cancel(yes=True) == 0
    assert len(list(tree.root.glob("stages/*/*/stop.json"))) > 10


@pytest.mark.parametrize(("mode", "then"), [("retry", ""), ("force", " without --mode force")])
def test_who_stops_a_run_is_told_what_goes_on_with_it(
    mode: Mode, then: str, tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = list(grid.stages)
    about = {"failed": {}, "blocked": [], "held": [], "wall_s": 1.0}
    stopped = Summary(ran=stages[:1], done=[], left=stages, interrupted=True, **about)
    show_study.summary(stopped, grid, tree, mode)
    said = capsys.readouterr().out
    assert f"stopped; the same command{then} goes on from the last checkpoints" in said
