"""Which nodes are avoided, and which of a job's are known to be lost."""

from __future__ import annotations

import time

import pytest

from harness.launch import nodes
from tests.launch.fake_slurm import FakeSlurm

SINFO = """\
a1|gpu*|idle|gpu:h100:8|ib
a2|gpu*|mixed|gpu:h100:8|ib
a3|gpu*|down*|gpu:h100:8|ib
c1|gpu*|idle|(null)|
a1|debug|idle|gpu:h100:8|ib
"""


@pytest.mark.parametrize(
    ("lost", "partition", "count", "avoided"),
    [
        (["a1"], None, 1, ("a1",)),
        (["a1"], "gpu", 2, ()),  # a3 is down, c1 has no GPU
        (["a1", "a2"], "gpu", 1, ()),
        (["a3"], "gpu", 2, ("a3",)),
        (["a1"], "debug", 1, ()),
        (["c1"], "gpu", 1, ()),
        (["a1"], "debug,gpu", 1, ("a1",)),
        (["a1"], "debug,gpu", 2, ()),  # a node of two partitions is one
        (["gone"], "gpu", 1, ()),
        ([], "gpu", 1, ()),
    ],
)
def test_a_node_is_avoided_where_enough_of_its_kind_are_up(
    lost: list[str], partition: str | None, count: int, avoided: tuple[str, ...], site: FakeSlurm
) -> None:
    site.write("sinfo", SINFO)
    assert nodes.avoidable(lost, partition, count) == avoided


@pytest.mark.parametrize(
    ("state", "booted", "is_lost"),
    [
        ("IDLE", "2026-01-01T00:00:00", False),
        ("ALLOCATED", "2026-01-01T00:00:00", False),
        ("DOWN*", "2026-01-01T00:00:00", True),
        ("IDLE+NOT_RESPONDING", "2026-01-01T00:00:00", True),
        ("IDLE", "2099-01-01T00:00:00", True),
        ("DOWN", "None", True),
    ],
)
def test_a_node_was_lost_if_it_is_down_or_was_started_since(
    state: str, booted: str, is_lost: bool, site: FakeSlurm
) -> None:
    site.write("scontrol", f"NodeName=a1 Arch=x86_64\n   State={state} BootTime={booted}\n")
    found = nodes.lost_of({"node": "a1", "job_started": time.time()})
    assert found == (["a1"] if is_lost else [])


def test_without_an_answer_nothing_is_known_of_a_node(site: FakeSlurm) -> None:
    site.says("scontrol", "exit 1")
    assert nodes.lost_of({"nodes": ["a1", "a2"], "job_started": 1.0}) is None
