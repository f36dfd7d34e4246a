"""Two hosts whose clocks are twenty minutes apart, on one root."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from harness.ledger.files import read_json, read_jsonl
from harness.ledger.lease import read_lease
from tests.chaos.tiny_study import STUDY, flaws, kill_all, processes, start

FOLDER = Path(__file__).parent / "other_clock"
SHORT = STUDY.replace("steps: 300", "steps: 60").replace(
    "steps: 60}, batch: 32, tr", "steps: 20}, batch: 32, tr"
)


def host(root: Path, file: Path, name: str, shift_s: float) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    about = {"HARNESS_HOST": name, "TEST_CLOCK_SHIFT": str(shift_s), "PYTHONPATH": path}
    return start(root, file, HARNESS_CORES="1", HARNESS_LEASE_EXPIRY_S="4", **about)


def kill_host(root: Path, name: str) -> None:
    needle = f"HARNESS_HOST={name}\0".encode()
    while left := [p for p in processes(root) if needle in _environ(p)]:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return b""


def started(root: Path) -> dict[str, int]:
    return {
        folder.name: sum(e["event"] == "started" for e in read_jsonl(folder / "events.jsonl"))
        for folder in root.glob("stages/*/*")
    }


@pytest.mark.long
def test_clocks_ten_minutes_off_either_way_take_nothing_from_anybody(tmp_path: Path) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(SHORT)
    try:
        hosts = [host(root, file, "early", -600), host(root, file, "late", 600)]
        assert [h.wait(600) for h in hosts] == [0, 0], (tmp_path / "output.log").read_text()
    finally:
        kill_all(root)
    assert set(started(root).values()) == {1}
    assert flaws(root) == []
    owners = {
        (read_json(p) or {})["host"].partition(":")[0] for p in root.glob("stages/*/*/status.json")
    }
    assert owners == {"early", "late"}
    ended = [(read_json(p) or {})["ended"] for p in root.glob("stages/*/*/status.json")]
    assert max(ended) - min(ended) > 1000, "the clocks were not apart"


@pytest.mark.long
@pytest.mark.parametrize("shift_s", [-600, 600])
def test_a_dead_host_is_replaced_whatever_its_clock_said(tmp_path: Path, shift_s: int) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(SHORT.replace("steps: 60", "steps: 200"))
    try:
        dead = host(root, file, "dead", shift_s)
        while not any(read_lease(p) for p in root.glob("stages/*/*/lease")):
            assert dead.poll() is None
            time.sleep(0.05)
        living = host(root, file, "living", -shift_s)
        time.sleep(8)  # it sees the other's heartbeat for two expiries
        assert sum(started(root).values()) - len(list(root.glob("stages/*/*/result.json"))) <= 2
        kill_host(root, "dead")
        assert living.wait(600) == 0, (tmp_path / "output.log").read_text()
    finally:
        kill_all(root)
    counts = sorted(started(root).values())
    assert counts[-1] <= 2 and counts[:-1] == [1] * (len(counts) - 1)
    assert [f for f in flaws(root) if "has no end" not in f] == []
