"""A host that took an attempt with it gets the next one only where no other could run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.launch.machine import Host, Machine
from harness.launch.pool import Pool
from harness.ledger.files import write_json
from harness.ledger.tree import Tree
from tests.launch.made import stage


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """Host a has two cores, host b has one; both are this machine."""
    hosts = (Host(name="a", slots=("0", "1")), Host(name="b", slots=("0",)))
    made = Pool(
        Machine(device="cpu", hosts=hosts), Tree(tmp_path), worker="tests.launch.small_worker"
    )
    yield made
    made.close()


def test_a_host_is_avoided_while_another_could_run_the_stage(pool: Pool) -> None:
    one, other = stage("sleep-1"), stage("sleep-2")
    assert pool.fits(one, avoid=["a"])
    folder = pool.tree.stage(one.kind, one.id)
    write_json(folder.stage, {"schema": 1})
    assert pool.start(one, folder.new_attempt()).hosts == ["b"]
    assert not pool.fits(other, avoid=["a"])  # it waits for b
    assert pool.fits(stage("sleep-3"))  # others do not
    pool.stop(pool.running[one.id], kill=True)


@pytest.mark.parametrize("avoid", [["a"], ["a", "b"]])
def test_a_stage_that_only_that_host_can_run_gets_it(pool: Pool, avoid: list[str]) -> None:
    assert pool.fits(stage("sleep-1", ranks=2), avoid=avoid)
