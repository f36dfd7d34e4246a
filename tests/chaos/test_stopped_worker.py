"""A worker that stood still while another took its stage over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import EXIT_BUSY
from harness.ledger import attempts
from harness.ledger.files import read_json, read_jsonl
from harness.ledger.store import read_stage
from harness.ledger.tree import StageFolder
from tests.chaos.tiny_study import STUDY, environment, numbers, undisturbed

ONLY_WSP = STUDY.partition("  transfer:")[0].replace("[random, mae]", "[random]") + (
    "resources: {checkpoint_every: 0.15}\n"
)


def worker(root: Path, folder: StageFolder, host: str) -> subprocess.Popen[bytes]:
    number = folder.new_attempt()
    attempts.begin(folder, number, {})
    stage = read_stage(folder)
    command = [sys.executable, "-m", "harness.worker", "--root", str(root)]
    command += ["--kind", stage.kind, "--stage", stage.id, "--attempt", str(number)]
    env = environment(root, HARNESS_HOST=host, HARNESS_LEASE_EXPIRY_S="3")
    return subprocess.Popen(command, env=env)


def content(folder: StageFolder) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}


@pytest.mark.long
def test_a_worker_continued_after_a_takeover_writes_not_a_byte(tmp_path: Path) -> None:
    root, _ = undisturbed(tmp_path, ONLY_WSP)
    expected = numbers(root)
    (path,) = root.glob("stages/wsp/*")
    folder = StageFolder(path)
    for name in ("result.json", "status.json", "metrics.jsonl", "weights.safetensors"):
        (path / name).unlink()
    for left in folder.checkpoints.glob("*"):
        left.rename(tmp_path / left.name)
    old = worker(root, folder, "old")
    try:
        while not list(folder.checkpoints.glob("*/COMPLETE")):
            assert old.poll() is None, "ended before it could be stopped"
            time.sleep(0.01)
        os.kill(old.pid, signal.SIGSTOP)
        # The other host hears no heartbeat, by its own clock.
        assert worker(root, folder, "new").wait(300) == 0
        assert (read_json(folder.status) or {})["host"].startswith("new")
        before = content(folder)
        os.kill(old.pid, signal.SIGCONT)
        assert old.wait(60) == EXIT_BUSY
        assert content(folder) == before
    finally:
        old.kill()
        old.wait()
    assert numbers(root) == expected
    assert [e["event"] for e in read_jsonl(folder.events)].count("done") == 2  # one of the oracle
