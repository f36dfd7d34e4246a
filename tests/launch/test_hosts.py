"""Hosts of a plain list: a real sshd, one machine under two names."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.errors import HarnessError
from harness.launch.driver import Driver
from harness.launch.hostfile import machine_of_hostfile
from harness.launch.hosts import RECONNECT_S
from harness.launch.machine import Machine, this_machine
from harness.launch.pool import Pool
from harness.launch.progress import Progress
from harness.ledger.files import read_json
from harness.ledger.tree import Tree
from harness.study.cells import build_grid
from harness.study.cost import Speeds
from harness.study.schema import load_study
from tests.launch.made import end, is_alive, noted, poll_until, stage, start, wait_for
from tests.launch.small_study import CHECKPOINTING, numbers

TOP = Path(__file__).parents[2]
SSH = shutil.which("ssh") or "ssh"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path(SSHD).exists(), reason="needs sshd (openssh-server)"),
]

Ssh = list[str]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """The ssh command for a server of our own, with keys that are thrown away."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "MaxStartups": "100",
    }
    (folder / "config").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd demands it of root
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")])

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    assert wait_for(answers), "sshd does not start"
    key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[localhost]:{port} {key}[127.0.0.1]:{port} {key}")
    options = [f"UserKnownHostsFile={folder / 'known'}", "IdentitiesOnly=yes", "AddressFamily=inet"]
    yield [
        *(SSH, "-F", "none", "-p", str(port), "-i", str(folder / "user")),
        *(word for option in options for word in ("-o", option)),
    ]
    server.terminate()
    server.wait()


@pytest.fixture
def two_hosts(tmp_path: Path) -> Machine:
    file = tmp_path / "hosts"
    file.write_text("localhost slots=2\n127.0.0.1 slots=2\n")
    return machine_of_hostfile(file, "cpu")


MakePool = Callable[..., Pool]


@pytest.fixture
def make_pool(tmp_path: Path, two_hosts: Machine) -> Iterator[MakePool]:
    made: list[Pool] = []

    def make(ssh: Ssh, **options: Any) -> Pool:
        tree = Tree(tmp_path / "runs")
        made.append(Pool(two_hosts, tree, ssh=ssh, worker="tests.launch.small_worker", **options))
        return made[-1]

    yield make
    for pool in made:
        end(pool)


def both_ready(pool: Pool) -> Callable[[], bool]:
    return lambda: len(pool.free) == 4


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_stage_larger_than_a_host_takes_whole_hosts_and_its_ranks_know_where_they_are(
    ssh: Ssh, make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder and variables that no shell on the way may touch.
    odd = tmp_path / 'it\'s a "folder" of $HOME; echo'
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOP), str(odd)]))
    monkeypatch.setenv("HARNESS_MARK", "a 'b' \"c\" $HOME `id`\n# {}")
    monkeypatch.setenv("SECRET_OF_MINE", "not for others")
    pool = make_pool(ssh)
    poll_until(pool, both_ready(pool))
    start(pool, stage("sleep-small"))
    assert not pool.fits(stage("sleep-large", ranks=3))
    pool.stop(pool.running["sleep-small"], kill=True)
    poll_until(pool, lambda: not pool.running)
    start(pool, stage("sleep-large", ranks=3))
    assert pool.free == []  # the fourth slot is not for others
    poll_until(pool, lambda: len(noted(pool.tree, "sleep-large")) == 3)
    rows = noted(pool.tree, "sleep-large")
    placed = [(r["RANK"], r["LOCAL_RANK"], r["LOCAL_SIZE"], r["WORLD_SIZE"]) for r in rows]
    assert placed == [("0", "0", "2", "3"), ("1", "1", "2", "3"), ("2", "0", "1", "3")]
    assert rows[0]["zygote"] == rows[1]["zygote"] != rows[2]["zygote"]
    # Reached at a loopback address, which says nothing to others: the name in the list does.
    assert {r["MASTER_ADDR"] for r in rows} == {"localhost"}
    (port,) = {int(r["MASTER_PORT"]) for r in rows}
    socket.create_connection(("localhost", port)).close()
    assert {r["HARNESS_MARK"] for r in rows} == {os.environ["HARNESS_MARK"]}
    command = Path(f"/proc/{rows[2]['zygote']}/cmdline").read_bytes()
    assert b"HARNESS_MARK" not in command  # anybody on the host may read that


@pytest.mark.parametrize("what", ["connection", "zygote"])
def test_a_lost_host_takes_its_stages_along_and_is_back_after_a_while(
    ssh: Ssh, make_pool: MakePool, what: str
) -> None:
    ahead = 0.0
    pool = make_pool(ssh, clock=lambda: time.monotonic() + ahead)
    poll_until(pool, both_ready(pool))
    for name, ranks in (("polite-pair", 2), ("polite-a", 1), ("polite-b", 1)):
        start(pool, stage(name, ranks=ranks))
    names = ["polite-pair", "polite-a", "polite-b"]
    poll_until(pool, lambda: all(len(noted(pool.tree, n)) == pool.running[n].ranks for n in names))
    (lost,) = pool.running["polite-pair"].hosts
    assert lost not in pool.running["polite-a"].hosts
    rows = noted(pool.tree, "polite-pair")
    zygote = rows[0]["zygote"]
    os.kill(parent_of(zygote) if what == "connection" else zygote, signal.SIGKILL)
    poll_until(pool, lambda: bool(pool.away))
    assert f"host {lost} is gone" in pool.away[lost]
    # Whichever it was, nobody needs to go there to end the workers.
    assert wait_for(lambda: not any(is_alive(pid) for pid in (zygote, *(r["pid"] for r in rows))))
    ahead = RECONNECT_S / 2
    (ended,) = poll_until(pool, lambda: len(pool.running) == 2).values()
    assert ended.running.stage.id == "polite-pair" and ended.code == -signal.SIGKILL
    assert ended.gone == pool.away[lost]
    assert not pool.fits(stage("code-0-a"))
    ahead = RECONNECT_S + 1
    start(pool, stage("code-0-a"))
    assert pool.running["code-0-a"].hosts == [lost] and not pool.away
    done = poll_until(pool, lambda: len(pool.running) == 2)
    assert done["code-0-a"].code == 0


def test_a_rank_lost_with_its_host_ends_the_ranks_on_others(ssh: Ssh, make_pool: MakePool) -> None:
    ahead = 0.0
    pool = make_pool(ssh, clock=lambda: time.monotonic() + ahead)
    poll_until(pool, both_ready(pool))
    start(pool, stage("sleep-all", ranks=4))
    poll_until(pool, lambda: len(noted(pool.tree, "sleep-all")) == 4)
    rows = noted(pool.tree, "sleep-all")
    os.kill(rows[3]["zygote"], signal.SIGKILL)
    poll_until(pool, lambda: bool(pool.away))
    assert wait_for(lambda: not any(is_alive(r["pid"]) for r in rows))
    ahead = RECONNECT_S / 2
    (ended,) = poll_until(pool, lambda: not pool.running).values()
    assert "host 127.0.0.1 is gone" in str(ended.gone)
    assert is_alive(rows[0]["zygote"]) and len(pool.free) == 2


def test_a_host_that_cannot_be_reached_is_named_and_the_others_go_on(
    ssh: Ssh, make_pool: MakePool, tmp_path: Path
) -> None:
    known = next(w for w in ssh if w.startswith("UserKnownHostsFile="))
    strict = [f"UserKnownHostsFile={tmp_path / 'known'}" if w == known else w for w in ssh]
    (tmp_path / "known").write_text("")
    pool = make_pool(strict)
    with pytest.raises(HarnessError) as error:
        poll_until(pool, lambda: False)
    for name in ("localhost", "127.0.0.1"):
        told = f"host {name} did not start (Host key verification failed.); see "
        assert told in str(error.value)
    lines = Path(known.partition("=")[2]).read_text().splitlines()
    (tmp_path / "known").write_text(lines[0] + "\n")
    pool = make_pool(strict)
    poll_until(pool, lambda: bool(pool.away) and bool(pool.free))
    start(pool, stage("code-0-a"))
    done = poll_until(pool, lambda: not pool.running)
    assert done["code-0-a"].code == 0 and list(pool.away) == ["127.0.0.1"]


def test_a_greeting_of_the_remote_shell_does_no_harm(
    ssh: Ssh, make_pool: MakePool, tmp_path: Path
) -> None:
    greeting = tmp_path / "ssh"
    greeting.write_text('#!/bin/sh\necho "Welcome to worker-1"\nexec "$@"\n')
    greeting.chmod(0o755)
    pool = make_pool([str(greeting), *ssh])
    poll_until(pool, both_ready(pool))
    assert "Welcome" in (pool.tree.root / "logs/pool.localhost.log").read_text()


# --- a whole study ------------------------------------------------------------------------


def driver(root: Path, file: Path, machine: Machine, watch: Callable[[Progress], None]) -> Driver:
    grid = build_grid(load_study(file))
    return Driver(grid, Tree(root), machine, Speeds(device="cpu", flops_per_s={}), watch)


def put_on_path(ssh: Ssh, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program `ssh` that is this command."""
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shlex.join(ssh)} "$@"\n')
    (folder / "ssh").chmod(0o755)


def test_a_study_on_two_hosts_survives_the_loss_of_one_with_the_same_numbers(
    ssh: Ssh, two_hosts: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of one rank, so that the bits are those of an undisturbed run on this machine."""
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    put_on_path(ssh, tmp_path, monkeypatch)
    file = tmp_path / "tiny.yaml"
    file.write_text(CHECKPOINTING.replace("steps: 40", "steps: 400"))
    seen: set[int] = set()
    lost: list[str] = []

    def watch(progress: Progress) -> None:
        """Cuts the connection to the first host on which a wsp stage is under way."""
        for running in progress.running:
            for pid in filter(is_alive, running.pids):
                seen.update((pid, parent_of(pid)))
            status = progress.live.get(running.stage.id, {})
            if lost or running.stage.kind != "wsp" or not status.get("step"):
                continue
            lost.extend([running.hosts[0], running.stage.id])
            os.kill(parent_of(parent_of(running.pids[0])), signal.SIGKILL)

    summary = driver(tmp_path / "runs", file, two_hosts, watch).run("cached")
    assert lost and not summary.failed and not summary.blocked and not summary.left
    assert wait_for(lambda: not any(map(is_alive, seen))), "orphans"
    attempts = [p.name for p in (tmp_path / "runs/stages/wsp" / lost[1] / "attempts").iterdir()]
    assert len(attempts) >= 2
    assert (
        f"Connection to {lost[0]} closed"
        in (tmp_path / f"runs/logs/pool.{lost[0]}.log").read_text()
    )
    alone = driver(tmp_path / "alone", file, this_machine("cpu", 2), lambda _: None).run("cached")
    assert not alone.failed and not alone.left
    assert numbers(tmp_path / "runs") == numbers(tmp_path / "alone")


def test_ranks_on_two_hosts_give_the_bits_of_two_ranks_on_one(
    ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    put_on_path(ssh, tmp_path, monkeypatch)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    file = tmp_path / "tiny.yaml"
    one_cell = CHECKPOINTING.replace("[500, 2k]", "[500]").replace("[random, mae]", "[random]")
    file.write_text(one_cell.replace("resources: {", "resources: {ranks: 2, "))
    hosts: set[tuple[str, ...]] = set()

    def watch(progress: Progress) -> None:
        hosts.update(tuple(running.hosts) for running in progress.running)

    two = machine_of_hostfile(hostfile, "cpu")
    for root, machine in (("two", two), ("one", this_machine("cpu", 2))):
        summary = driver(tmp_path / root, file, machine, watch).run("cached")
        assert not summary.failed and not summary.left
    assert hosts == {("localhost", "127.0.0.1"), ("localhost",)}
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")


def test_the_command_line_takes_hosts_from_a_profile(
    ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    put_on_path(ssh, tmp_path, monkeypatch)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    profile = {"kind": "hosts", "hostfile": str(tmp_path / "hosts"), "device": "cpu", "ssh": ssh}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"profiles": {"pair": profile}}))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        CHECKPOINTING.replace("[500, 2k]", "[500]").replace("[random, mae]", "[random]")
    )
    command = [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit"]
    done = subprocess.run(
        [*command, "--cluster", "pair", "--root", str(tmp_path / "runs")],
        env=os.environ | {"HARNESS_SETTINGS": str(tmp_path / "settings.yaml")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = list((tmp_path / "runs").glob("stages/*/*/attempts/1/attempt.json"))
    assert {(read_json(r) or {})["cluster"] for r in records} == {"hosts"}
