"""One owner per stage."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from harness.errors import LeaseLostError, StorageError
from harness.ledger import lease as leases
from harness.ledger.files import write_json
from harness.ledger.lease import Lease, LeaseHeldError, owner_is_dead, read_lease, this_host
from harness.ledger.tree import StageFolder


def test_a_held_lease_is_refused_and_a_released_one_is_free(tmp_path: Path) -> None:
    first = Lease.acquire(tmp_path / "lease")
    with pytest.raises(LeaseHeldError, match="held by process"):
        Lease.acquire(tmp_path / "lease")
    first.check()
    first.release()
    assert not (tmp_path / "lease").exists()
    Lease.acquire(tmp_path / "lease").release()


def test_the_lease_of_a_dead_process_on_this_host_is_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    code = (
        "import sys, pathlib; from harness.ledger.lease import Lease;"
        "Lease.acquire(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    held = read_lease(path)
    assert held is not None and owner_is_dead(held) is True
    Lease.acquire(path).check()


def test_a_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    Lease.acquire(path)
    held = json.loads(path.read_text())
    assert owner_is_dead(held) is False
    assert owner_is_dead({**held, "started": "1"}) is True


def test_an_owner_of_another_pid_namespace_is_judged_by_its_heartbeat_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lease"
    Lease.acquire(path)
    held = json.loads(path.read_text())
    name, boot, _ = held["host"].split(":")
    # Its pid is another process here, or none. An older version wrote no namespace.
    for host in (f"{name}:{boot}:1", f"{name}:{boot}"):
        assert owner_is_dead({**held, "host": host, "started": "1"}) is None
    readlink = os.readlink
    monkeypatch.setattr(
        os, "readlink", lambda p, **k: "pid:[7]" if p == "/proc/self/ns/pid" else readlink(p, **k)
    )
    assert leases.this_host() == f"{name}:{boot}:7"
    assert owner_is_dead({**held, "started": "1"}) is None


TAKER = """
import pathlib, sys
from harness.ledger.lease import Lease, LeaseHeldError
try:
    Lease.acquire(pathlib.Path(sys.argv[1]), expiry_s=2)
except LeaseHeldError:
    sys.exit(76)
"""
COUPLE = """
import pathlib, subprocess, sys
from harness.ledger.lease import Lease, owner_is_dead, read_lease
path = pathlib.Path(sys.argv[1])
if not path.exists():
    Lease.acquire(path)
    subprocess.run([sys.executable, "-c", sys.argv[2], str(path)], check=True)
    path.unlink()
    take = "import sys; from harness.ledger.lease import *; Lease.acquire(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", take, str(path)], check=True)
print(owner_is_dead(read_lease(path)), flush=True)
"""


def in_another_pid_namespace(code: str, path: Path, *options: str) -> "subprocess.Popen[str]":
    """Python in a container that is no more than pids of its own. Skips where that is forbidden."""
    unshare = ["unshare", "--pid", "--fork", *options]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("`unshare --pid` is missing or not permitted; as root it is")
    command = [*unshare, sys.executable, "-c", code, str(path), code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_container_with_our_host_name_takes_no_living_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    lease = Lease.acquire(tmp_path / "lease")
    lease.start_beating()
    try:
        taker = in_another_pid_namespace(TAKER, lease.path, "--mount-proc")
        assert taker.wait(60) == 76
        lease.check()
    finally:
        lease.release()


def test_without_a_proc_of_its_own_a_container_still_tells_its_living_from_its_dead(
    tmp_path: Path,
) -> None:
    couple = in_another_pid_namespace(COUPLE, tmp_path / "lease")
    assert couple.communicate(timeout=60)[0].split() == ["False", "True"]


def test_a_silent_owner_on_another_host_expires_by_our_clock(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    Lease.acquire(path)
    foreign = {**json.loads(path.read_text()), "host": "elsewhere:1", "token": "theirs"}
    path.write_text(json.dumps(foreign))
    # Its clock may be an hour off in either direction: file times do not count.
    os.utime(path, (time.time() + 3600, time.time() + 3600))
    taken = Lease.acquire(path, expiry_s=0.3)
    taken.check()


def test_a_beating_owner_on_another_host_keeps_its_lease(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    Lease.acquire(path)
    foreign = {**json.loads(path.read_text()), "host": "elsewhere:1", "token": "theirs"}
    path.write_text(json.dumps(foreign))
    beat = (
        "import json,sys,time,os\n"
        "p=sys.argv[1]; d=json.load(open(p))\n"
        "for i in range(40):\n"
        "    d['beat']=i+1; open(p+'.n','w').write(json.dumps(d)); os.replace(p+'.n',p)\n"
        "    time.sleep(.1)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", beat, str(path)])
    try:
        with pytest.raises(LeaseHeldError, match="elsewhere"):
            Lease.acquire(path, expiry_s=2.0)
    finally:
        other.kill()
        other.wait()


def test_an_owner_that_lost_its_lease_notices(tmp_path: Path) -> None:
    first = Lease.acquire(tmp_path / "lease")
    (tmp_path / "lease").unlink()
    second = Lease.acquire(tmp_path / "lease")
    with pytest.raises(LeaseLostError, match="lost the lease"):
        first.check()
    first.release()  # must not remove the new owner's
    second.check()


@pytest.mark.parametrize("look", [1, 2])
def test_a_lease_cannot_be_taken_between_the_last_look_and_its_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    lease, other = Lease.acquire(tmp_path / "lease"), Lease(tmp_path / "lease", "other")
    is_ours, looks, is_taken = lease.is_ours, 0, False

    def stopped() -> bool:
        nonlocal looks, is_taken
        answer, looks = is_ours(), looks + 1
        if looks == look:
            is_taken = other._take_over(lease.token, 60)
        return answer

    monkeypatch.setattr(lease, "is_ours", stopped)
    lease.release()
    assert looks >= look
    assert [p.name for p in tmp_path.iterdir()] == ["lease"] * is_taken
    assert other.is_ours() == is_taken


def test_a_release_gets_past_the_guard_of_a_dead_taker_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(tmp_path / "lease")
    dead = {**json.loads(lease.path.read_text()), "started": "1", "token": "dead"}
    leases.takeover_guard(lease.path).write_text(json.dumps(dead))
    lease.release()
    assert list(tmp_path.iterdir()) == []

    def full(path: Path, *_: object) -> None:
        raise StorageError(path, OSError(errno.ENOSPC, "No space left on device"))

    lease = Lease.acquire(tmp_path / "lease")
    monkeypatch.setattr(leases, "write_bytes", full)
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_release_waits_for_a_taker_that_stands_still_no_longer_than_the_expiry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(tmp_path / "lease")
    Lease.acquire(leases.takeover_guard(lease.path))  # by this very process, which lives
    monkeypatch.setattr(leases, "EXPIRY_S", 0.3)
    began = time.monotonic()
    lease.release()
    assert 0.3 < time.monotonic() - began < 10
    assert lease.is_ours()


def _race(path: Path, together: Barrier, wins: "multiprocessing.Queue[int]") -> None:
    together.wait()
    try:
        Lease.acquire(path)
        wins.put(os.getpid())
    except LeaseHeldError:
        pass
    # A winner that ends leaves a dead owner's lease, which a slow racer may rightly take.
    together.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_exactly_one_gets_it(tmp_path: Path, stale: bool) -> None:
    path = tmp_path / "lease"
    if stale:
        Lease.acquire(path)
        dead = {**json.loads(path.read_text()), "started": "1", "token": "dead"}
        path.write_text(json.dumps(dead))
    context = multiprocessing.get_context("fork")
    wins: multiprocessing.Queue[int] = context.Queue()
    together = context.Barrier(8)
    racers = [context.Process(target=_race, args=(path, together, wins)) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert wins.qsize() == 1


def test_the_heartbeat_counts_up_and_stops_when_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    lease = Lease.acquire(tmp_path / "lease")
    lease.start_beating()
    deadline = time.monotonic() + 10
    while (read_lease(lease.path) or {})["beat"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (read_lease(lease.path) or {})["beat"] >= 3
    lease.release()
    assert not lease.path.exists()


@pytest.mark.parametrize("shift_s", [-600, 600])
def test_the_guard_of_a_dead_taker_is_passed_whatever_the_clocks_say(
    tmp_path: Path, shift_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a takeover, on a file server whose clock is ten minutes off."""
    for name in ("lease", "lease.takeover"):
        path = tmp_path / name
        Lease.acquire(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": "1"}))
        moment = time.time() + shift_s
        os.utime(path, (moment, moment))
    Lease.acquire(tmp_path / "lease").check()
    assert [p.name for p in tmp_path.iterdir()] == ["lease"]
    # A guard whose owner lives is respected, however old its file looks.
    (tmp_path / "lease").write_text(
        json.dumps({**json.loads((tmp_path / "lease").read_text()), "started": "1"})
    )
    guard = Lease.acquire(tmp_path / "lease.takeover")
    os.utime(guard.path, (moment, moment))
    waiting = multiprocessing.get_context("fork").Process(
        target=Lease.acquire, args=(tmp_path / "lease",)
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    guard.release()
    waiting.join(10)
    assert waiting.exitcode == 0


def test_a_beat_goes_into_the_own_file_only(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path / "lease")
    lease._write_beat()
    assert (read_lease(lease.path) or {})["beat"] == 1
    successor = json.dumps({**json.loads(lease.path.read_text()), "token": "another"}, indent=1)
    lease.path.unlink()
    lease.path.write_text(successor)
    with pytest.raises(LeaseLostError):
        lease._write_beat()
    assert lease.path.read_text() == successor


def test_a_guarded_write_looks_again_after_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(tmp_path / "lease")
    lease.guard()
    lease.path.unlink()
    now = leases._clock()
    monkeypatch.setattr(leases, "_clock", lambda: now + 0.5)
    lease.guard()
    monkeypatch.setattr(leases, "_clock", lambda: now + 2)
    with pytest.raises(LeaseLostError):
        lease.guard()


def test_ranks_without_a_lease_see_a_later_attempt_as_another_owner(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    write_json(folder.status, {"state": "running", "attempt": 2})
    leases.AttemptGuard(folder, 2).guard()
    guard = leases.AttemptGuard(folder, 2)
    write_json(folder.status, {"state": "submitted", "attempt": 3})
    with pytest.raises(LeaseLostError, match="attempt 3 owns the stage now, not attempt 2"):
        guard.guard()


def test_the_clock_of_a_guard_counts_time_asleep() -> None:
    assert abs(leases._clock() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1


def test_where_only_the_existence_of_a_pid_can_be_asked_a_living_owner_is_not_dead() -> None:
    """A reader that entered the owner's pid namespace, but sees another's /proc; or the reverse."""
    own = {"token": "t", "host": this_host(), "pid": os.getpid(), "started": "unknown"}
    assert owner_is_dead(own) is False
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert owner_is_dead({**own, "pid": gone.pid}) is True


def test_a_link_whose_answer_was_lost_is_the_own_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS the client asks again, and the second answer is that the file exists."""
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    lease = Lease.acquire(tmp_path / "lease")
    lease.check()
    with pytest.raises(LeaseHeldError):
        Lease.acquire(tmp_path / "lease")


def test_who_waits_for_a_lock_for_long_says_once_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "_QUIET_S", 0.0)
    held = Lease.acquire(tmp_path / "lock")
    with pytest.raises(LeaseHeldError), leases.exclusive(tmp_path / "lock", patience_s=0.35):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("waiting: ") and f"held by process {os.getpid()} on " in line
    held.release()
    with leases.exclusive(tmp_path / "lock"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("about", "is_over"), [({}, True), ({"token": "t"}, False)])
def test_what_is_on_its_way_into_a_queue_is_never_silent(
    tmp_path: Path, about: dict[str, str], is_over: bool
) -> None:
    """A submission of thousands holds claims for minutes before they have jobs."""
    folder = StageFolder(tmp_path)
    status = {"schema": 1, "state": "submitted", "attempt": 1, "host": "elsewhere:1", **about}
    write_json(folder.status, status)
    silence = leases.Silence(expiry_s=0.0)
    assert not silence.is_over("a", folder)
    assert silence.is_over("a", folder) is is_over


def test_another_users_process_that_proc_does_not_show_is_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """/proc with `hidepid`: of two users of one machine each would take the other's stages."""
    other = os.getppid()
    lease = {"token": "t", "host": this_host(), "pid": other, "started": "4711", "beat": 3}
    assert owner_is_dead(lease) is True  # another process of that number, as far as /proc tells
    read = Path.read_text

    def hidden(path: Path, *about: str, **more: str) -> str:
        if str(path) == f"/proc/{other}/stat":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return read(path, *about, **more)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert owner_is_dead(lease) is False
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert owner_is_dead({**lease, "pid": gone.pid}) is True


def test_a_dead_lease_of_this_host_says_nothing_of_who_claimed_the_stage_since(
    tmp_path: Path,
) -> None:
    folder = StageFolder(tmp_path)
    dead = {"token": "t", "host": this_host(), "pid": 1, "started": "no process", "beat": 3}
    write_json(folder.lease, {"schema": 1, **dead})
    write_json(folder.status, {"state": "submitted", "attempt": 2, "host": "elsewhere:1"})
    silence = leases.Silence(expiry_s=0.0)
    assert not silence.is_over("a", folder)
    assert silence.is_over("a", folder)
