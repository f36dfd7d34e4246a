"""A driver that only waits takes a fiftieth of a core at most, however long its looks take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.launch import driver
from harness.launch.machine import this_machine
from harness.launch.pool import Pool
from harness.ledger import states
from harness.ledger.tree import Tree
from harness.study.cells import build_grid
from harness.study.cost import Speeds
from harness.study.schema import load_study


class Clock:
    """Time passes while somebody waits; CPU time where a test says so."""

    def __init__(self) -> None:
        self.now = self.cpu = 0.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu

    def work(self, seconds: float) -> None:
        self.cpu += seconds
        self.now += seconds


class Waiting:
    """A pool whose one stage runs for as long as the test does."""

    free = False
    elsewhere: tuple[str, ...] = ()

    def __init__(self, clock: Clock, stage: Any, own: driver.Driver, until: float) -> None:
        self.clock, self.own, self.until = clock, own, until
        running = SimpleNamespace(stage=stage, attempt=1, asked_to_stop=False)
        self.running = {stage.id: running}

    def needs(self, stage: Any) -> int:
        return 1

    def poll(self, timeout_s: float) -> list[Any]:
        self.clock.now += timeout_s
        if self.clock.now > self.until:
            self.running.clear()
            self.own.interrupted = True
        return []


@pytest.mark.parametrize(
    ("reading_s", "looking_s"),
    [
        (0.001, 0.0001),  # a dozen stages
        (0.4, 0.002),  # forty thousand, on a local disk
        (6.0, 0.03),  # on a slow file server
    ],
)
def test_waiting_costs_a_fiftieth_of_a_core_at_most(
    reading_s: float,
    looking_s: float,
    tmp_path: Path,
    study_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In CPU time; `reading_s` to read all files, `looking_s` for one turn without that."""
    clock, tree = Clock(), Tree(tmp_path)
    grid = build_grid(load_study(study_file()))
    own = driver.Driver(grid, tree, this_machine("cpu", 1), Speeds(device="cpu", flops_per_s={}))
    monkeypatch.setattr(driver, "time", clock)
    stage = next(s for s in grid.stages.values() if s.kind == "mae")
    found = states.read_states(tree, grid.stages)
    found[stage.id] = found[stage.id]._replace(state="running")
    reads: list[float] = []

    def read() -> dict[str, states.StageState]:
        reads.append(clock.now)
        clock.work(reading_s)
        return dict(found)

    monkeypatch.setattr(own, "_read_states", read)
    monkeypatch.setattr(own, "watch", lambda progress: clock.work(looking_s))
    hours = 4 * 3600.0
    todo = {k: v for k, v in own._todo(found).items() if k == stage.id}
    pool: Any = Waiting(clock, stage, own, until=hours)
    own._loop(pool, todo, 0.0)
    assert clock.cpu <= 0.02 * clock.now
    # And it is not asleep: what others did is seen in time, progress is shown.
    assert len(reads) > 1 and max(b - a for a, b in itertools.pairwise(reads)) <= max(
        20.0, 110 * reading_s
    )


def test_the_pool_that_waits_here_is_used_as_the_real_one() -> None:
    """Else the test above would wait for nobody."""
    assert all(hasattr(Pool, name) for name in ("poll", "needs", "free", "elsewhere"))
