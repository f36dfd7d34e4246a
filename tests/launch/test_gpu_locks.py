"""Two commands on one host: a GPU is of one of them at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.launch.gpu_locks import GpuLocks
from harness.launch.machine import this_machine
from harness.launch.pool import Pool
from harness.ledger.tree import Tree
from tests.launch.made import end, is_alive, noted, poll_until, stage, start, wait_for


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pool]]:
    """Two commands with roots of their own, on the same two GPUs."""
    monkeypatch.setenv("HARNESS_GPU_LOCKS", str(tmp_path / "locks"))
    with ExitStack() as stack:
        made = []
        for name in ("a", "b"):
            machine, tree = this_machine("cuda", 2), Tree(tmp_path / name)
            made.append(Pool(machine, tree, worker="tests.launch.small_worker"))
            stack.callback(end, made[-1])
        yield made


def gpu(pool: Pool, name: str) -> str:
    poll_until(pool, lambda: bool(noted(pool.tree, name)))
    return noted(pool.tree, name)[0]["CUDA_VISIBLE_DEVICES"]


def test_two_commands_get_different_gpus_and_a_third_stage_waits(pools: list[Pool]) -> None:
    a, b = pools
    start(a, stage("sleep-a"))
    start(b, stage("sleep-b"))
    assert {gpu(a, "sleep-a"), gpu(b, "sleep-b")} == {"0", "1"}
    assert not b.fits(stage("code-0-c"))
    assert b.elsewhere == [gpu(a, "sleep-a")]
    a.stop(a.running["sleep-a"], kill=True)
    poll_until(a, lambda: not a.running)
    a.poll(0)
    start(b, stage("code-0-c"))
    assert gpu(b, "code-0-c") == "0"


def test_a_stage_of_all_gpus_takes_none_while_one_is_in_use(pools: list[Pool]) -> None:
    a, b = pools
    start(a, stage("sleep-a"))
    assert not b.fits(stage("sleep-b", ranks=2))
    assert a.fits(stage("sleep-c"))  # the other is free still


def test_a_gpu_is_held_as_long_as_a_worker_lives(pools: list[Pool], tmp_path: Path) -> None:
    """The command is gone without a word: its file descriptors are closed, its worker is not."""
    a, _ = pools
    start(a, stage("sleep-a"))
    held = gpu(a, "sleep-a")
    pid = noted(a.tree, "sleep-a")[0]["pid"]
    a._locks.close()
    others = GpuLocks(this_machine("cuda", 2))
    try:
        assert others.take(["0", "1"]) == {held}
        os.kill(noted(a.tree, "sleep-a")[0]["zygote"], signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not is_alive(pid))
        assert wait_for(lambda: not others.take(["0", "1"]))
    finally:
        others.close()
