"""What sbatch does not take: it is taken back, told, and holds up nothing else."""

from __future__ import annotations

import re

import pytest

from harness.cli import show_study
from harness.errors import UserError
from harness.launch import caretaker, queue, slurm
from harness.launch.settings import Slurm
from harness.ledger.files import read_json, write_json
from harness.ledger.tree import Tree
from harness.study.cells import Grid
from harness.study.schema import Retry
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.submitting import (
    COUNT,
    states,
    submissions,
    submit,
    takes_only,
)


def test_claims_are_taken_back_also_where_slurm_answers_no_more(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    takes_only(site, 1)
    site.says("scancel", "exit 1")
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(tree, grid)
    assert set(states(tree, grid).values()) <= {"planned", "waiting"}


def test_resources_that_fit_no_node_are_refused_before_anything_is_submitted(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """One bad line of the study: else what comes before it runs, and a caretaker tries for days."""
    last = list(grid.stages.values())[-1]
    too_odd = last.model_copy(update={"execution": last.execution.model_copy(update={"ranks": 20})})
    stages = {**grid.stages, last.id: too_odd}
    with pytest.raises(UserError, match="20 ranks on 3 nodes of at most 8 GPUs do not divide"):
        slurm.submit(tree, "small", stages, Slurm(device="cuda"), Retry())
    assert site.calls("sbatch") == 0 and not submissions(tree)
    assert set(states(tree, grid).values()) <= {"planned", "waiting"}


def test_a_caretaker_that_sbatch_refuses_is_told(
    site: FakeSlurm, tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    """On partitions that take no job without a GPU: lost nodes are not taken care of."""
    refusal = '{ echo "sbatch: error: no GPU asked for" >&2; exit 1; }'
    own = f'grep -q "comment=caretaker" "$1" && {refusal}'
    site.says("sbatch", f'{own}; echo "Submitted batch job {COUNT.format(site.folder)}"')
    done = submit(tree, grid)
    assert set(done.jobs) == set(grid.stages) and done.caretaker is None
    show_study.submitted(done, grid, "lab", queue.read_states(tree, grid.stages))
    out = " ".join(capsys.readouterr().out.split())
    assert "no caretaker was taken: submit again if a node is lost" in out
    assert "no GPU asked for" in out


def test_a_large_submission_goes_part_by_part_behind_what_is_in_the_queue(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_PART", 5)
    done = submit(tree, grid, max_array=1)
    assert set(done.jobs) == set(grid.stages) and done.left == 0
    (token,) = submissions(tree)
    numbers = set()
    for stage in grid.stages.values():
        script = (tree.root / "slurm" / token / "jobs").glob(f"{done.jobs[stage.id]}_submission.sh")
        (text,) = {path.read_text() for path in script}
        found = re.search(r"--dependency=(\S+)", text)
        terms = set(found[1].split(",")) if found else set()
        assert terms == {f"afterok:{done.jobs[u]}" for u in stage.config.upstream.values()}
        numbers.add(re.search(r"--comment=(\S+)", text)[1])  # type: ignore[index]
    assert len(numbers) == done.arrays == len(grid.stages)  # a job is found by it, and by it alone


def test_of_a_large_submission_that_is_refused_on_its_way_the_first_parts_stay(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_PART", 5)
    takes_only(site, 1 + 6)
    done = submit(tree, grid, max_array=1)
    first, *_ = parts = list(grid.stages)[:5], list(grid.stages)[5:10]
    assert set(first) < set(done.jobs) < {*first, *parts[1]} and len(done.jobs) == 6
    assert done.left == len(grid.stages) - 6 and done.refused
    # After three refusals of a kind no more of it are claimed, only to be taken back.
    tried = [s for s in grid.stages.values() if tree.stage(s.kind, s.id).attempt_numbers()]
    kinds = {s.kind for s in grid.stages.values()}
    assert len(tried) < len(grid.stages) and site.calls("sbatch") <= 1 + 6 + 3 * len(kinds)


def test_what_sbatch_refuses_for_itself_does_not_hold_up_the_rest(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """One kind of stage asks for more than the partition has."""
    refusal = '{ echo "sbatch: error: Requested time limit is invalid" >&2; exit 1; }'
    wsp = f'grep -q "job-name=small.wsp" "$1" && {refusal}'
    site.says("sbatch", f'{wsp}; echo "Submitted batch job {COUNT.format(site.folder)}"')
    done = submit(tree, grid)
    assert set(done.jobs) == {s for s, v in grid.stages.items() if v.kind == "mae"}
    assert done.caretaker and "Requested time limit is invalid" in str(done.refused)
    assert done.left == len(grid.stages) - len(done.jobs)
    assert {v for s, v in states(tree, grid).items() if s not in done.jobs} <= {
        "planned",
        "waiting",
    }
    probe = f'grep -q "job-name=small.linear_probe" "$1" && {refusal}'
    site.says("sbatch", f'{probe}; echo "Submitted batch job {COUNT.format(site.folder)}"')
    site.holds(*((job, "x") for job in done.jobs.values()))
    again = submit(tree, grid)
    kinds = {grid.stages[s].kind for s in again.jobs}
    assert "wsp" in kinds and "features" in kinds and "linear_probe" not in kinds


def test_of_a_caretaker_one_stage_that_fits_no_node_does_not_hold_up_the_rest(
    site: FakeSlurm, tree: Tree, grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another study asks for other ranks of a stage that they share, since this was submitted."""
    last = list(grid.stages.values())[-1]
    odd = last.model_copy(
        update={"execution": last.execution.model_copy(update={"ranks": 3, "nodes": 2})}
    )
    stages = {**grid.stages, last.id: odd}
    done = slurm.submit(tree, "small", stages, Slurm(device="cpu"), Retry(), refusals=0)
    assert set(done.jobs) == set(grid.stages) - {last.id}
    assert f"{last.id}: 3 ranks on 2 nodes do not divide" in capsys.readouterr().err


def test_arrays_refused_in_a_row_hold_up_nothing_of_another_kind(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """Four stages of one kind, an array each; what comes after asks for what the site has."""
    refusal = '{ echo "sbatch: error: Requested time limit is invalid" >&2; exit 1; }'
    features = f'grep -q "job-name=small.features" "$1" && {refusal}'
    site.says("sbatch", f'{features}; echo "Submitted batch job {COUNT.format(site.folder)}"')
    stages = dict(grid.stages)
    behind = {
        s: v.model_copy(update={"config": v.config.model_copy(update={"upstream": {}})})
        for s, v in stages.items()
        if v.kind == "linear_probe"
    }
    order = sorted((stages | behind).values(), key=lambda v: v.kind == "linear_probe")
    done = slurm.submit(
        tree, "small", {v.id: v for v in order}, Slurm(device="cpu", max_array=1), Retry()
    )
    assert len([v for v in order if v.kind == "features"]) > 3
    assert set(done.jobs) == {v.id for v in order if v.kind != "features"}
    # Of those that ask for the same, three are enough to know.
    assert site.calls("sbatch") == 1 + len(done.jobs) + 3


def test_where_a_site_takes_large_arrays_a_part_is_no_whole_study(
    site: FakeSlurm, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is claimed and not yet queued is lost for long if the submission is killed."""
    site.write("scontrol", "ClusterName = lab\nMaxArraySize = 100001\n")
    sizes: list[int] = []
    whole = slurm._parts
    monkeypatch.setattr(slurm, "_parts", lambda s, size: sizes.append(size) or whole(s, size))
    submit(tree, grid)
    assert sizes == [4000]


def test_the_same_misfit_of_many_stages_is_one_line(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    execution = next(iter(grid.stages.values())).execution.model_copy(update={"ranks": 20})
    stages = {s: v.model_copy(update={"execution": execution}) for s, v in grid.stages.items()}
    with pytest.raises(UserError) as caught:
        slurm.submit(tree, "small", stages, Slurm(device="cuda"), Retry())
    assert len(caught.value.problems) == 1


def test_a_caretaker_that_finds_no_room_asks_for_few_of_each_kind(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """It knows stages from their files: equal needs are not one and the same object."""
    submit(tree, grid, max_array=1)
    (token,) = submissions(tree)
    for stage in grid.stages.values():
        path = tree.stage(stage.kind, stage.id).status
        write_json(path, {**(read_json(path) or {}), "job": None})
    takes_only(site, 1)
    before = site.calls("sbatch")
    done = caretaker.tend(tree.root / "slurm" / token)
    assert done.jobs == {}
    begins = {s.kind for s in grid.stages.values() if not s.config.upstream}
    assert begins == {"mae", "wsp"} and site.calls("sbatch") <= before + 1 + 3 * len(begins)
