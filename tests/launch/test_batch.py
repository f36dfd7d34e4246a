"""What sbatch is asked for: the resources of a stage in the words of the site's profile."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.launch import batch, slurm
from harness.launch.settings import Slurm
from harness.ledger.tree import Tree
from harness.study.cells import Grid
from harness.study.schema import Retry
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.made import stage

GPUS = {"gpus_per_node", "gres", "gpus_per_task", "num_gpus"}
"""Parameters by which submitit asks for GPUs."""


def options(profile: Slurm, after: str = "", **execution: Any) -> dict[str, Any]:
    return batch.options_of(stage("a", **execution), profile, "small", "small.t", 0, after)


def memory(profile: Slurm, **execution: Any) -> str | None:
    return options(profile, **execution)["additional_parameters"].get("mem")


def profile(**about: Any) -> Slurm:
    """As the settings file would give it."""
    return Slurm.model_validate({"kind": "slurm", **about})


# --- a stage's needs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "asked"),
    [
        ("gpus_per_node", {"gpus_per_node": 4}),
        ("gres", {"gres": "gpu:4"}),
        ("none", {}),
    ],
)
def test_gpus_of_a_node_are_asked_for_as_the_site_has_it(
    option: str, asked: dict[str, Any]
) -> None:
    on_gpus = profile(gpu_option=option, gpus_per_node=4)
    found = options(on_gpus, ranks=8)
    assert {k: v for k, v in found.items() if k in GPUS} == asked
    assert (found["nodes"], found["ntasks_per_node"]) == (2, 4)  # whatever it asks for
    on_cores = profile(gpu_option=option, device="cpu")
    assert GPUS.isdisjoint(options(on_cores, ranks=8))


@pytest.mark.parametrize(
    ("device", "ranks", "nodes", "expected"),
    [
        ("cuda", 1, 1, (1, 1)),
        ("cuda", 8, 1, (1, 8)),
        ("cuda", 12, 1, (2, 6)),  # not 8 and 4: every node of a job gets as many
        ("cuda", 16, 1, (2, 8)),
        ("cuda", 8, 4, (4, 2)),  # more nodes than it needs: the study says so
        ("cuda", 32, 2, (4, 8)),  # fewer than it needs
        ("cpu", 16, 1, (1, 16)),  # a node has no GPUs to count ranks by
        ("cpu", 16, 2, (2, 8)),
    ],
)
def test_a_stage_gets_the_nodes_its_gpus_need_or_more_where_the_study_wants_more(
    device: str, ranks: int, nodes: int, expected: tuple[int, int]
) -> None:
    found = options(profile(device=device, gpus_per_node=8), ranks=ranks, nodes=nodes)
    assert (found["nodes"], found["ntasks_per_node"]) == expected


@pytest.mark.parametrize(
    ("ranks", "nodes", "found"),
    [
        (9, 1, "9 ranks on 2 nodes"),
        (4, 3, "4 ranks on 3 nodes"),
        (2, 4, "2 ranks on 4 nodes"),
    ],
)
def test_ranks_that_the_nodes_cannot_share_evenly_are_a_mistake_in_one_line(
    ranks: int, nodes: int, found: str
) -> None:
    with pytest.raises(UserError) as caught:
        options(profile(gpus_per_node=8), ranks=ranks, nodes=nodes)
    assert str(caught.value) == (
        f"a: {found} of at most 8 GPUs do not divide; choose resources.ranks or nodes to fit"
    )


@pytest.mark.parametrize(
    ("about", "execution", "asked"),
    [
        ({}, {}, None),
        ({}, {"memory_gib": 30}, "30720M"),
        # sbatch takes the memory of a node, the study gives that of all ranks.
        ({}, {"memory_gib": 10, "ranks": 3, "nodes": 3}, "3414M"),
        ({"memory_gib_per_gpu": 60.5}, {"ranks": 8}, "495616M"),
        ({"memory_gib_per_gpu": 60.5, "gpus_per_node": 4}, {"ranks": 8}, "247808M"),
        ({"memory_gib_per_gpu": 60.5}, {"memory_gib": 30, "ranks": 8}, "30720M"),
        ({"memory_gib_per_gpu": 60.5, "device": "cpu"}, {"ranks": 8}, None),
    ],
)
def test_the_memory_of_a_node_is_what_the_study_says_or_else_the_profile(
    about: dict[str, Any], execution: dict[str, Any], asked: str | None
) -> None:
    assert memory(profile(**about), **execution) == asked


@pytest.mark.parametrize(
    ("device", "threads", "cpus"),
    [("cuda", 1, 12), ("cuda", 12, 12), ("cuda", 16, 16), ("cpu", 1, 1), ("cpu", 16, 16)],
)
def test_a_gpu_comes_with_the_cores_of_the_profile_and_never_fewer_than_threads(
    device: str, threads: int, cpus: int
) -> None:
    assert (
        options(profile(device=device, cpus_per_gpu=12), threads=threads)["cpus_per_task"] == cpus
    )


def test_a_stage_that_would_share_a_gpu_gets_one_of_its_own() -> None:
    assert options(profile(), share=4) == options(profile())


@pytest.mark.parametrize(("time_s", "minutes"), [(5400.0, 90), (61.0, 2), (30.0, 1), (None, 1440)])
def test_the_time_limit_is_in_whole_minutes_and_never_less_than_was_asked_for(
    time_s: float | None, minutes: int
) -> None:
    assert options(profile(time="1d"), time_s=time_s)["time"] == minutes


def test_what_waits_for_a_stage_that_failed_leaves_the_queue() -> None:
    behind = options(profile(), after="afterok:7_0:7_3")
    assert behind["dependency"] == "afterok:7_0:7_3"
    assert behind["additional_parameters"]["kill-on-invalid-dep"] == "yes"
    first = options(profile())
    assert "dependency" not in first
    assert "kill-on-invalid-dep" not in first["additional_parameters"]


# --- what the site wants of every job ------------------------------------------------------


def jobs(site: FakeSlurm, tree: Tree, grid: Grid, about: Slurm) -> tuple[list[set[str]], set[str]]:
    """The options in the batch scripts: of each array of stages, and of the caretaker."""
    slurm.submit(tree, "small", grid.stages, about, Retry())
    texts = {p.read_text() for p in tree.root.glob("slurm/*/jobs/*submission*.sh")}
    assert len(texts) == site.calls("sbatch")
    found = [set(re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)) for text in texts]
    (caretaker,) = [o for o in found if any(x.startswith("comment=caretaker.") for x in o)]
    return [o for o in found if o != caretaker], caretaker


def test_every_job_is_asked_for_as_the_profile_says(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    named = {"partition": "gpu", "account": "vision", "qos": "long", "constraint": "h100"}
    sbatch = {"mail-type": "FAIL", "exclusive": True, "nice": 10}
    stages, caretaker = jobs(site, tree, grid, profile(**named, sbatch=sbatch, signal_s=300))
    wanted = {f"{k}={v}" for k, v in named.items()} | {"mail-type=FAIL", "exclusive", "nice=10"}
    assert len(stages) > 1
    for found in [*stages, caretaker]:
        assert wanted <= found
    for found in stages:
        assert {"gpus-per-node=1", "cpus-per-task=8", "signal=USR2@300", "requeue"} <= found
    assert not any(option.startswith(("gpus", "mem")) for option in caretaker)


def test_a_site_that_is_told_nothing_is_asked_for_nothing(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    stages, caretaker = jobs(site, tree, grid, profile())
    left_out = ("partition=", "account=", "qos=", "constraint=", "mem")
    for found in [*stages, caretaker]:
        assert not any(option.startswith(left_out) for option in found)


@pytest.mark.parametrize("requeue", [True, False])
def test_jobs_may_be_started_again_where_the_profile_allows_it(
    requeue: bool, site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    stages, caretaker = jobs(site, tree, grid, profile(requeue=requeue))
    for found in stages:
        assert ("requeue" in found, "no-requeue" in found) == (requeue, not requeue)
    # The caretaker puts itself back while there is no room for its jobs.
    assert "requeue" in caretaker and "no-requeue" not in caretaker


@pytest.mark.parametrize("parallel", [None, 2])
def test_so_many_tasks_of_an_array_run_at_a_time(
    parallel: int | None, site: FakeSlurm, tree: Tree, grid: Grid, tmp_path: Path
) -> None:
    stages, _ = jobs(site, tree, grid, profile(parallel=parallel))
    arrays = [o.removeprefix("array=0-") for found in stages for o in found if "array=" in o]
    sizes = [(int(last) + 1, int(most)) for last, most in (a.split("%") for a in arrays)]
    assert max(size for size, _ in sizes) > 2
    # Without a word in the profile all of them: submitit's own default is 256.
    assert all(most == min(size, parallel or size) for size, most in sizes)
    assert options(profile(parallel=parallel))["array_parallelism"] == (parallel or 100_000)


def test_ranks_need_no_file_that_is_named_after_the_job(
    site: FakeSlurm, tree: Tree, grid: Grid
) -> None:
    """A submission may be killed, or sbatch's answer lost, while the job begins."""
    slurm.submit(tree, "small", grid.stages, profile(device="cpu"), Retry())
    texts = {p.read_text() for p in tree.root.glob("slurm/*/jobs/*submission*.sh")}
    stages = [text for text in texts if "comment=caretaker." not in text]
    for text in stages:
        (tasks,) = re.findall(r"launch\.job begin (\S+)\)", text)
        (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
        assert line.endswith(f" {sys.executable} -u -m harness.launch.job rank {tasks}")
        assert Path(tasks).exists()
