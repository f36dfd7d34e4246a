"""Arrays of a Slurm submission: every stage once, behind all it needs, within the site's limit."""

from __future__ import annotations

import random

import pytest

from harness.launch.arrays import Array, plan_arrays
from harness.study.stages import StageFile
from tests.launch.made import stage


def made(name: str, *upstream: str, ranks: int = 1) -> StageFile:
    """A stage that starts from others."""
    plain = stage(name, ranks=ranks)
    roles = {f"role{n}": u for n, u in enumerate(upstream)}
    return plain.model_copy(update={"config": plain.config.model_copy(update={"upstream": roles})})


def waits_for(arrays: list[Array], number: int, task: int) -> set[str]:
    """What Slurm makes of the dependency of a task: the stages that must have succeeded."""
    found = set()
    for term in filter(None, arrays[number].after.split(",")):
        how, _, what = term.partition(":")
        if how == "aftercorr":
            found.add(arrays[int(what)].stages[task])
        elif what.startswith("job:"):
            found.add(what)
        else:
            array, _, other = what.partition("_")
            found.add(arrays[int(array)].stages[int(other)])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_any_graph_is_submitted_whole_and_in_order(seed: int) -> None:
    draw = random.Random(seed)
    stages: list[StageFile] = []
    for n in range(draw.randint(1, 60)):
        most = min(len(stages), draw.choice([0, 1, 1, 1, 3]))
        upstream = draw.sample([s.id for s in stages], draw.randint(0, most))
        stages.append(made(f"s{n}", *upstream, ranks=draw.choice([1, 1, 2])))
    running = {s.id: f"9{n}" for n, s in enumerate(stages) if draw.random() < 0.1}
    todo = [s for s in stages if s.id not in running]
    limit = draw.choice([1, 3, 1000])
    arrays = plan_arrays(todo, limit, running)
    assert sorted(s for a in arrays for s in a.stages) == sorted(s.id for s in todo)
    by_id = {s.id: s for s in stages}
    for number, array in enumerate(arrays):
        assert len(array.stages) <= limit
        assert len({by_id[s].execution.ranks for s in array.stages}) == 1
        for task, name in enumerate(array.stages):
            upstream = set(by_id[name].config.upstream.values())
            wanted = {f"job:{running[u]}" if u in running else u for u in upstream}
            assert waits_for(arrays, number, task) == wanted


def test_a_scaling_study_takes_few_arrays() -> None:
    """8 sizes x 50 data sizes x {random, mae} with 10 tasks each: 8808 stages."""
    stages = [made(f"mae{size}", ranks=4) for size in range(8)]
    for size in range(8):
        for data in range(50):
            stages.append(made(f"wsp{size}.{data}r", ranks=2))
            stages.append(made(f"wsp{size}.{data}m", f"mae{size}", ranks=2))
    for wsp in [s.id for s in stages if s.id.startswith("wsp")]:
        stages += [made(f"{wsp}.task{n}", wsp) for n in range(10)]
    # mae; random wsp; wsp behind mae, by data size; ten tasks behind each array of wsp.
    assert len(plan_arrays(stages, 1000)) == 1 + 1 + 50 + 10 * (1 + 50)
