"""The pool of this machine: real zygotes and forks, and a worker that needs no torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.launch.hosts import RECONNECT_S
from harness.launch.machine import Device, Host, Machine, this_machine
from harness.launch.pool import Pool, meeting_address
from harness.ledger.tree import Tree
from tests.launch.made import end, is_alive, noted, poll_until, stage, start, wait_for

MakePool = Callable[[Device, int], Pool]


@pytest.fixture
def make_pool(tmp_path: Path) -> Iterator[MakePool]:
    made: list[Pool] = []

    def make(device: Device, slots: int) -> Pool:
        pool = Pool(this_machine(device, slots), Tree(tmp_path), worker="tests.launch.small_worker")
        made.append(pool)
        return pool

    yield make
    for pool in made:
        end(pool)


def everybody_noted(pool: Pool, *stage_ids: str) -> Callable[[], bool]:
    def condition() -> bool:
        gone = [s for s in stage_ids if s not in pool.running]
        assert not gone, f"ended already: {gone}"
        return all(len(noted(pool.tree, s)) == pool.running[s].ranks for s in stage_ids)

    return condition


def test_ranks_know_their_places_and_meet_at_a_port_that_is_open(make_pool: MakePool) -> None:
    pool = make_pool("cpu", 8)
    start(pool, stage("sleep-a", ranks=3, threads=2))
    start(pool, stage("sleep-b", ranks=2))
    assert pool.free == []
    poll_until(pool, everybody_noted(pool, "sleep-a", "sleep-b"))
    ports = set()
    for name, ranks in (("sleep-a", 3), ("sleep-b", 2)):
        rows = noted(pool.tree, name)
        for rank, row in enumerate(rows):
            assert (row["RANK"], row["LOCAL_RANK"]) == (str(rank), str(rank))
            assert (row["WORLD_SIZE"], row["LOCAL_SIZE"]) == (str(ranks), str(ranks))
            assert (row["MASTER_ADDR"], row["listens"]) == ("127.0.0.1", rank == 0)
        (port,) = {int(row["MASTER_PORT"]) for row in rows}
        ports.add(port)
        # Rank 0 has it open since before it was forked: whoever comes first is let in, and nobody
        # else can have it.
        socket.create_connection(("127.0.0.1", port)).close()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    assert len(ports) == 2
    # Only rank 0 holds the port: when it is gone, so is the port.
    os.kill(noted(pool.tree, "sleep-b")[0]["pid"], signal.SIGKILL)
    poll_until(pool, lambda: "sleep-b" not in pool.running)
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(noted(pool.tree, "sleep-b")[1]["MASTER_PORT"])))


def test_a_lost_rank_ends_the_others_and_its_code_is_the_stages(make_pool: MakePool) -> None:
    pool = make_pool("cpu", 2)
    start(pool, stage("code-7", ranks=2))
    (ended,) = poll_until(pool, lambda: not pool.running).values()
    assert (ended.code, ended.gone) == (7, None)
    assert ended.running.codes == {0: 7, 1: -signal.SIGKILL}
    assert len(pool.free) == 2


def test_stages_share_a_gpu_up_to_their_number_and_whole_sets_stay_whole(
    make_pool: MakePool,
) -> None:
    pool = make_pool("cuda", 3)
    shared = [stage(f"sleep-{i}", share=2) for i in range(3)]
    for one in shared:
        assert pool.fits(one)
        start(pool, one)
    assert pool.needs(shared[0]) == 0.5
    assert not pool.fits(stage("sleep-large", ranks=2))
    start(pool, stage("sleep-whole"))
    assert not pool.fits(stage("sleep-other")) and pool.fits(stage("sleep-small", share=2))
    names = [*(s.id for s in shared), "sleep-whole"]
    poll_until(pool, everybody_noted(pool, *names))
    seen = [noted(pool.tree, name)[0]["CUDA_VISIBLE_DEVICES"] for name in names]
    assert seen == ["0", "0", "1", "2"]
    pool.stop(pool.running["sleep-2"], kill=True)
    pool.stop(pool.running["sleep-whole"], kill=True)
    poll_until(pool, lambda: len(pool.running) == 2)
    start(pool, stage("sleep-pair", ranks=2))
    poll_until(pool, everybody_noted(pool, "sleep-pair"))
    rows = noted(pool.tree, "sleep-pair")
    assert [r["CUDA_VISIBLE_DEVICES"] for r in rows] == ["1,2", "1,2"]


def test_a_zygote_that_dies_is_started_again_and_its_stages_count_as_killed(
    make_pool: MakePool,
) -> None:
    pool = make_pool("cpu", 2)
    start(pool, stage("sleep-a"))
    poll_until(pool, everybody_noted(pool, "sleep-a"))
    before = noted(pool.tree, "sleep-a")[0]
    start(pool, stage("die-a"))
    ended = poll_until(pool, lambda: not pool.running)
    assert {e.code for e in ended.values()} == {-signal.SIGKILL}
    assert all("the pool's process is gone (exit code -9)" in str(e.gone) for e in ended.values())
    assert wait_for(lambda: not is_alive(before["pid"]))
    start(pool, stage("sleep-a"))
    start(pool, stage("code-0"))
    done = poll_until(pool, lambda: "code-0" not in pool.running)
    poll_until(pool, lambda: bool(noted(pool.tree, "sleep-a", attempt=2)))
    after = noted(pool.tree, "sleep-a", attempt=2)[0]
    assert done["code-0"].code == 0
    assert after["zygote"] not in (before["zygote"], os.getpid())


def test_a_zygote_that_dies_twice_in_a_row_ends_the_pool(make_pool: MakePool) -> None:
    pool = make_pool("cpu", 1)
    for _ in range(2):
        start(pool, stage("die-a"))
        poll_until(pool, lambda: not pool.running)
    with pytest.raises(HarnessError, match=r"the pool's process is gone \(exit code -9\); see .*"):
        pool.poll(0.1)


def test_a_zygote_that_cannot_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    pool = Pool(this_machine("cpu", 1), Tree(tmp_path), worker="harness.no_such_module")
    with pytest.raises(HarnessError, match=r"did not start .*No module named"):
        poll_until(pool, lambda: False)
    pool.close()


def test_nothing_outlives_a_closed_pool(make_pool: MakePool) -> None:
    pool = make_pool("cpu", 3)
    start(pool, stage("polite-a", ranks=2))
    start(pool, stage("polite-b"))
    poll_until(pool, everybody_noted(pool, "polite-a", "polite-b"))
    rows = [*noted(pool.tree, "polite-a"), *noted(pool.tree, "polite-b")]
    pool.close()
    assert not any(is_alive(r["pid"]) or is_alive(r["zygote"]) for r in rows)


def test_a_zygote_that_hears_nothing_for_long_ends(tmp_path: Path) -> None:
    """A network that is cut closes nothing: only silence tells."""
    command = [sys.executable, "-m", "harness.launch.zygote", "--silence", "0.2"]
    zygote = subprocess.Popen(
        [*command, "--worker", "tests.launch.small_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert zygote.stdin and zygote.stdout and b"ready" in zygote.stdout.readline()
    request = {"start": "a#0", "group": "a", "args": [], "listener": None}
    env = {"HARNESS_STAGE": "polite-a", "HARNESS_ATTEMPT": "1", "RANK": "0"}
    request |= {"env": env | {"HARNESS_RUN_DIR": str(tmp_path)}}
    request |= {"stdout": str(tmp_path / "out"), "stderr": str(tmp_path / "err")}
    zygote.stdin.write(json.dumps(request).encode() + b"\n")
    zygote.stdin.flush()
    pid = json.loads(zygote.stdout.readline())["pid"]
    assert zygote.wait(timeout=60) == 0 and not is_alive(pid)
    zygote.stdin.close()
    zygote.stdout.close()


def test_a_stage_asked_to_stop_before_its_ranks_are_forked_never_starts(
    make_pool: MakePool,
) -> None:
    pool = make_pool("cpu", 2)
    start(pool, stage("sleep-a", ranks=2))
    pool.stop(pool.running["sleep-a"])
    (ended,) = poll_until(pool, lambda: not pool.running).values()
    assert ended.code == -signal.SIGTERM and noted(pool.tree, "sleep-a") == []


def test_a_host_that_never_answers_is_given_up_and_what_needs_it_is_named(tmp_path: Path) -> None:
    now = 0.0
    hosts = (Host(slots=("0",)), Host(name="far", slots=("0", "1"), remote=True))
    pool = Pool(
        Machine(device="cpu", hosts=hosts),
        Tree(tmp_path),
        ssh=[sys.executable, "-c", "raise SystemExit('ssh: far is down')"],
        worker="tests.launch.small_worker",
        clock=lambda: now,
    )
    large, small = stage("code-0-large", ranks=2), stage("code-0-small")
    ran = tries = 0
    with pytest.raises(HarnessError) as error:
        while tries < 100:
            # A round of the driver: the large stage is first in line all the time, and the small
            # one can run until nobody tries to reach the host any more.
            assert not pool.fits(large)
            if tries < 20 and pool.fits(small):
                start(pool, small)
            for ended in pool.poll(0.1):
                ran += ended.code == 0
            if "far" in pool.away:
                tries, now = tries + 1, now + RECONNECT_S
    pool.close()
    assert ran > 2
    assert "no host is left that could run code-0-large: host far did not start" in str(error.value)
    assert "ssh: far is down" in str(error.value)


@pytest.mark.parametrize(
    ("name", "reached_at", "address"),
    [
        ("worker-1", "10.0.0.7", "10.0.0.7"),
        ("me@worker-1", "127.0.1.1", "worker-1"),  # as Debian's /etc/hosts names its own host
        ("worker-1", "::1", "worker-1"),
        ("worker-1", "2001:db8::7", "2001:db8::7"),
        ("worker-1", "", "worker-1"),
    ],
)
def test_other_hosts_meet_where_ssh_reached_rank_zeros(
    name: str, reached_at: str, address: str
) -> None:
    assert meeting_address(name, reached_at) == address
