"""What a watcher of a submission is told of the time left."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.launch.driver import Driver
from harness.launch.machine import this_machine
from harness.launch.pool import Pool, Running
from harness.launch.progress import Progress
from harness.ledger.files import write_json
from harness.ledger.states import StageState
from harness.ledger.tree import Tree
from harness.study.cells import build_grid
from harness.study.cost import Speeds
from harness.study.schema import load_study


def test_the_time_left_follows_rates_and_ended_stages_not_the_plan(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    grid = build_grid(load_study(study_file()))
    told: list[Progress] = []
    tree = Tree(tmp_path / "runs")
    driver = Driver(grid, tree, this_machine("cpu", 1), Speeds(), told.append)
    wsp, other = [s for s in grid.stages.values() if s.kind == "wsp"][:2]
    done = StageState(state="done", status={})
    states = dict.fromkeys(grid.stages, done) | {wsp.id: StageState(state="running", status={})}
    running = {wsp.id: Running(stage=wsp, attempt=1, places=())}
    pool = cast(Pool, SimpleNamespace(running=running, needs=lambda stage: 1.0, elsewhere=[]))

    def left(states: dict[str, StageState], **status: Any) -> float:
        write_json(tree.stage("wsp", wsp.id).status, {"state": "running", **status})
        driver._tell(states, pool, time.monotonic())
        return told[-1].seconds_left

    plan = Speeds().seconds(wsp)
    assert left(states) == pytest.approx(plan, rel=0.1)
    # 1000 of 2000 samples at 2 a second: 500 s, whatever was planned; then less.
    half = {"steps": 16, "samples_per_s": 2.0}
    assert left(states, step=8, samples=1000, **half) == pytest.approx(500)
    assert left(states, step=12, samples=1500, **half) == pytest.approx(250)
    # A stage of the kind ended here and took ten times its estimate: so will the next.
    took = {"wall_s": {"total": 10 * Speeds().seconds(other)}}
    slow = StageState(state="done", status={}, kept=took)
    driver._ran.append(other.id)
    running.clear()
    assert left({**states, other.id: slow}) == pytest.approx(10 * plan)
